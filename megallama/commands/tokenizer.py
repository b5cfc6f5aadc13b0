"""Train a LLaMA-style SentencePiece tokenizer.

    megallama tokenizer corpus/ --vocab-size 32000 --output tokenizer.model

Input as for megallama prepare, of any size, read once; an even sample of the documents, always the same, is trained on,
which takes 13 times its size in memory. BPE, byte fallback, digits split, text unchanged; <unk>=0, <s>=1, </s>=2.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megallama.commands.parser import Parser, filled, size
from megallama.commands.prepare import add_input_options
from megallama.data.writer import alone
from megallama.text.inputs import Losses
from megallama.text.progress import ByteProgress
from megallama.text.train_tokenizer import train_tokenizer


def run(argv: Sequence[str]) -> None:
    """Train and write it. Raises: MegallamaError."""
    parser = Parser("tokenizer", __doc__)
    parser.add_argument("inputs", nargs="+", help="files, folders or patterns")
    parser.add_argument("--output", required=True, type=filled, metavar="PATH", help="the model to write, a .model")
    parser.add_argument("--vocab-size", type=int, default=32000, metavar="N", help="token ids in all (default 32000)")
    add_input_options(parser)
    most, cores = "train on an even sample of at most this much (200)", len(os.sched_getaffinity(0))
    parser.add_argument("--sample-mb", type=size, default=200, metavar="MB", help=most)
    parser.add_argument("--threads", type=int, default=cores, metavar="N", help="threads (default: the cores)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.read(argv)
    start = time.monotonic()
    losses = Losses(args.max_bad, args.max_bad_per_file, skip_files=args.skip_bad_files)
    with alone(Path(args.output)), ByteProgress("reading", then="training", quiet=args.quiet) as bar:
        path = train_tokenizer(
            args.inputs, args.output, args.vocab_size, json_key=args.json_key, sample_bytes=int(args.sample_mb * 1e6),
            threads=args.threads, progress=bar.update, losses=losses,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
    for line in losses.lines():
        print(line, file=sys.stderr)
    print(f"{path}: {args.vocab_size:,} ids, {time.monotonic() - start:.1f} s")
