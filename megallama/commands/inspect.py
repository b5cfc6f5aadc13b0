"""Look into a checkpoint or a .bin/.idx pair: `megallama inspect PATH`, which decides by what PATH is.

    megallama inspect runs/x [OTHER] [--verify]                                      a checkpoint
    megallama inspect PREFIX [--tokenizer PATH] [--document N] [--verify]            a .bin/.idx pair

A checkpoint is a step folder, or a checkpoints or run folder (its newest step is taken). OTHER, to compare it with,
may also be a Hugging Face folder, Meta's release or Megatron-style shards. --verify compares every block with its
digest, of a pair every 64 KiB with PREFIX.sums, which --write-sums makes where there is none. Exit status: 0 as it
should be, 1 damaged or different, 2 no checkpoint or pair, or it cannot be read now.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megallama.commands.parser import Parser
from megallama.config.errors import ConfigError, counted
from megallama.data.blocks import File
from megallama.data.indexed import CHUNK, IndexedDataset
from megallama.data.look import document, verify
from megallama.data.tokenizer import load_tokenizer
from megallama.data.writer import SumsWriter, naming
from megallama.text.progress import ByteProgress


def run(argv: Sequence[str]) -> int:
    """0, or 1 for what is damaged or different. Raises: MegallamaError."""
    parser = Parser("inspect", __doc__)
    parser.add_argument("path", help="a checkpoint, a run folder, or a pair with or without .bin or .idx")
    parser.add_argument("other", type=Path, nargs="?", help="compare the checkpoint with this one, tensor by tensor")
    parser.add_argument("--verify", action="store_true", help="read everything: digests, offsets, every token id")
    ids = "of a pair: to decode documents and to check ids against its vocabulary"
    parser.add_argument("--tokenizer", metavar="PATH", help=ids)
    parser.add_argument("--document", type=int, metavar="N", help="show document N (text with --tokenizer, else ids)")
    parser.add_argument("--write-sums", action="store_true", help="verify, and write PREFIX.sums if it cannot be used")
    args = parser.parse_intermixed_args(list(argv))
    path = Path(args.path)
    if path.suffix in (".bin", ".idx") or (Path(f"{path}.idx").exists() and not path.is_dir()):
        if args.other is not None:
            parser.error(f"a pair is not compared with {args.other}; leave it out")
        inspect_pair(args)
        return 0
    if not path.exists():
        raise ConfigError(f"{path} does not exist; name a checkpoint, a run folder or a .bin/.idx pair")
    if args.tokenizer or args.document is not None or args.write_sums:
        parser.error(f"{path} is no pair, which --tokenizer, --document and --write-sums are for; leave them out")
    from megallama.commands.inspect_checkpoint import inspect_checkpoint

    return inspect_checkpoint(path, args.other, verified=args.verify)


def inspect_pair(args: argparse.Namespace) -> None:
    """Show a document, or the counts of the pair. Raises: MegallamaError."""
    dataset = IndexedDataset(args.path)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    if args.document is not None:
        ids = document(dataset, args.document)
        print(tokenizer.decode(ids.tolist()) if tokenizer else " ".join(map(str, ids)))
        return
    counts = np.zeros(64, np.int64)  # of documents, by powers of two of their length
    shortest, longest = dataset.num_tokens, 0
    for first in range(0, dataset.num_documents, CHUNK):
        lengths = np.diff(dataset.starts(first, min(first + CHUNK, dataset.num_documents)))
        bins = np.frexp(lengths.astype(np.float64))[1]  # bin k: 2^(k-1) <= length < 2^k
        counts += np.bincount(bins, minlength=64)[:64]
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
    mean = dataset.num_tokens / dataset.num_documents
    size = f"{counted(dataset.num_documents, 'document', ',')}, {counted(dataset.num_tokens, 'token', ',')}"
    print(f"{dataset.prefix}: {size} of {dataset.dtype.name}")
    print(f"document length: shortest {shortest:,}, mean {mean:,.1f}, longest {counted(longest, 'token', ',')}")
    for key, value in dataset.metadata.items():
        print(f"  {key}: {value}")
    for k in np.flatnonzero(counts):
        low, high = (0, 0) if k == 0 else (2 ** (int(k) - 1), 2 ** int(k) - 1)
        print(f"{low:>10,} .. {high:<10,} {counts[k]:>12,}  {'#' * max(1, int(50 * counts[k] / counts.max()))}")
    if not args.verify and not args.write_sums:
        return
    vocab_size = tokenizer.vocab_size if tokenizer else dataset.metadata.get("vocab_size")
    total = dataset.num_tokens * dataset.dtype.itemsize
    with ByteProgress("verifying") as bar:
        lacking = verify(dataset, vocab_size, lambda done: bar.update(done, total))
    below = f" below {vocab_size}" if vocab_size else ""
    print(f"verified: offsets, document marks and {counted(dataset.num_tokens, 'id', ',')}{below}")
    print(f"not verified: {lacking}" if lacking else f"verified: every 64 KiB is as {dataset.prefix}.sums says")
    if not (lacking and args.write_sums):
        return
    path, pair = Path(f"{dataset.prefix}.sums"), [File(dataset.prefix + suffix) for suffix in (".bin", ".idx")]
    sums = SumsWriter(f"{path}.tmp")
    with naming(str(path)), sums.file as file:
        for offset in range(0, pair[0].size, CHUNK):
            sums.add(pair[0].read(offset, min(CHUNK, pair[0].size - offset)))
        sums.finish(*pair)
        Path(file.name).replace(path)
    print(f"{path}: the checksums of the files as they are now")
