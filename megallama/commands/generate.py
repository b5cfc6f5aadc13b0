"""Continue texts with a trained model: `megallama generate runs/quickstart --prompt "import "`.

CHECKPOINT is a step folder, a folder of steps or a run folder (the newest checkpoint is taken), or any Hugging Face
folder of a LLaMA.  Texts go to standard output, one as it is made, several when all are; the rest to standard error.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megallama.commands.parser import Parser
from megallama.config.errors import ConfigError, counted, say


def run(argv: Sequence[str]) -> None:
    """Load, then stream one text or make several together."""
    parser = Parser("generate", __doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="step folder, folder of steps, run folder or Hugging Face folder")
    add("--prompt", action="append", help="text to continue, once or several times; without it a document is begun")
    add("--prompts", type=Path, metavar="FILE", help='one prompt a line; in a .jsonl {"prompt": ...}')
    add("--json", action="store_true", help="JSON lines: prompt, text, tokens, ended (eos, stop, length, context)")
    add("--stop", action="append", default=[], help="end a text before this string; several times for several strings")
    add("--max-tokens", type=int, default=200, help="most tokens to make of each prompt (200)")
    add("--temperature", type=float, default=0.8, help="spread of the choice; 0 is greedy (0.8)")
    add("--top-k", type=int, default=0, help="draw from so many of the likeliest tokens; 0: from all (0)")
    add("--top-p", type=float, default=0.95, help="draw from the likeliest tokens of this mass (0.95)")
    add("--seed", type=int, default=0, help="same seed, same text; the next prompt has the next seed (0)")
    add("--greedy", action="store_true", help="always the likeliest token")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32", "fp64"), default="auto", help="auto is the saved one")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    add("--tokenizer", type=Path, help="tokenizer file or folder, if the checkpoint has none")
    options = parser.read(argv)
    import torch

    from megallama.data.tokenizer import load_tokenizer
    from megallama.inference import generate as g
    from megallama.train.assemble import DTYPES
    from megallama.train.speed import slow_format

    sampling = g.Sampling(0.0 if options.greedy else options.temperature, options.top_p, options.seed, options.top_k)
    if options.max_tokens < 1:
        raise ConfigError(f"--max-tokens={options.max_tokens} makes no text; use 1 or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device=cuda: this machine has no CUDA device that torch can use; use --device=cpu")
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    texts = [*(options.prompt or ()), *(g.read_prompts(options.prompts) if options.prompts else ())] or [""]
    if wrong := [text for text in texts if not isinstance(text, str) or re.search("[\ud800-\udfff]", text)]:
        raise ConfigError(f"the prompt {wrong[0]!r} is no text in UTF-8; write one")
    folder = g.find_model(options.checkpoint, say)
    tokenizer = load_tokenizer(options.tokenizer or folder)
    llama = g.load_llama(folder, DTYPES.get(options.dtype), device)
    prompts = [g.encode_prompt(folder, tokenizer, text) for text in texts]
    given = counted(sum(map(len, prompts)), "prompt token")
    print(f"{folder} in {str(llama.embed.dtype)[6:]} on {device}; {given}", file=sys.stderr)
    slow = slow_format(device, llama.embed.dtype)
    for note in [*llama.notes, *([f"{slow}; --dtype fp32 is faster"] if slow else ())]:
        say(note)
    start, made = time.perf_counter(), 0
    if len(texts) == 1 and not options.json:
        print(texts[0], end="", flush=True)
        transcript = g.Transcript(tokenizer.decode, prompts[0], options.stop)
        drawn = g.generate(llama, prompts[0], options.max_tokens, sampling, num_ids=tokenizer.vocab_size)
        while not transcript.stopped and (token := next(drawn, None)) is not None:
            print(transcript.push(token), end="", flush=True)
            made += 1
        print(transcript.end(), flush=True)
    else:
        rows = g.generate_batch(llama, prompts, options.max_tokens, sampling, tokenizer=tokenizer, stop=options.stop)
        made = sum(len(row.tokens) for row in rows)
        for number, (text, row) in enumerate(zip(texts, rows, strict=True), 1):
            line = {"prompt": text, "text": row.text, "tokens": row.tokens, "ended": row.ended}
            print(json.dumps(line) if options.json else f"--- {number} of {len(texts)} ---\n{text}{row.text}")
    print(f"{counted(made, 'token')}, {made / (time.perf_counter() - start):.1f} tokens/s", file=sys.stderr)
