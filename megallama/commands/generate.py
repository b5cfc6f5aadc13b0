"""Continue a text with a trained model: `megallama generate runs/quickstart --prompt "import "`.

CHECKPOINT is a step folder, a folder of steps or a run folder (the newest checkpoint is taken), or
any Hugging Face folder of a LLaMA.  The text goes to standard output as it is made, everything else
to standard error.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megallama.commands.parser import Parser
from megallama.config.errors import counted


def run(argv: Sequence[str]) -> None:
    """Load, then stream."""
    parser = Parser("generate", __doc__)
    parser.add_argument("checkpoint", type=Path, help="step folder, folder of steps, run folder or Hugging Face folder")
    parser.add_argument("--prompt", default="", help="text to continue; without it a document is begun")
    parser.add_argument("--max-tokens", type=int, default=200, help="most tokens to make (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="spread of the choice; 0 is greedy (0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from the likeliest tokens of this mass (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (0)")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    formats = ("auto", "bf16", "fp16", "fp32", "fp64")
    parser.add_argument("--dtype", choices=formats, default="auto", help="number format; auto is the saved one")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file or folder, if the checkpoint has none")
    options = parser.read(argv)
    import torch

    from megallama.config.errors import ConfigError, say
    from megallama.data.tokenizer import load_tokenizer
    from megallama.inference.generate import Sampling, encode_prompt, find_model, generate, load_llama, stream_text
    from megallama.train.speed import slow_format

    sampling = Sampling(0.0 if options.greedy else options.temperature, options.top_p, options.seed)
    if options.max_tokens < 1:
        raise ConfigError(f"--max-tokens={options.max_tokens} makes no text; use 1 or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device=cuda: this machine has no CUDA device that torch can use; use --device=cpu")
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
    folder = find_model(options.checkpoint, say)
    tokenizer = load_tokenizer(options.tokenizer or folder)
    llama = load_llama(folder, names.get(options.dtype), device)
    for note in llama.notes:
        say(note)
    prompt = encode_prompt(folder, tokenizer, options.prompt)
    kind = str(llama.embed.dtype).removeprefix("torch.")
    print(f"{folder} in {kind} on {device}; {counted(len(prompt), 'prompt token')}", file=sys.stderr)
    if slow := slow_format(device, llama.embed.dtype):
        say(f"{slow}; --dtype fp32 is faster")
    print(options.prompt, end="", flush=True)
    drawn = generate(llama, prompt, options.max_tokens, sampling, num_ids=tokenizer.vocab_size)
    start, count = time.perf_counter(), itertools.count()
    tokens = (token for token, _ in zip(drawn, count, strict=False))
    for piece in stream_text(tokens, tokenizer.decode, prompt):
        print(piece, end="", flush=True)
    print(flush=True)
    made = next(count)  # zip asks for a number after each token only
    rate = made / (time.perf_counter() - start)
    print(f"{counted(made, 'token')}, {rate:.1f} tokens/s", file=sys.stderr)
