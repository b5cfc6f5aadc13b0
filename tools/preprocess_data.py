"""Tokenize text into a .bin/.idx pair.

    python tools/preprocess_data.py corpus/ --tokenizer tokenizer.model --output data/corpus

Input: JSON lines (.jsonl .json .ndjson), plain text (a file is a document), both also gzipped; files, folders,
patterns. Every document ends with the tokenizer's end-of-document token. The output is the same for any number of
workers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from megallama.config.errors import MegallamaError
from megallama.data.documents import MAX_DOCUMENT_BYTES
from megallama.data.preprocess import Summary, preprocess
from megallama.data.progress import ByteProgress


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; 0 is success, 2 an error of the input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="files, folders or patterns")
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx and PREFIX.json"
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="SentencePiece .model, tokenizer.json, or their folder"
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: the cores)"
    )
    parser.add_argument(
        "--split-valid",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="hold out this share: PREFIX_train, PREFIX_valid",
    )
    parser.add_argument(
        "--json-key", default="text", metavar="KEY", help="where JSON lines keep the text (default: text)"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad record instead of skipping it")
    limit = MAX_DOCUMENT_BYTES >> 20
    parser.add_argument(
        "--max-document-mb", type=float, default=limit, metavar="MB", help=f"longer ones are bad records ({limit})"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args(argv)
    start = time.monotonic()
    try:
        with ByteProgress("tokenizing", quiet=given.quiet) as bar:
            summary = preprocess(
                given.inputs,
                given.output,
                given.tokenizer,
                workers=given.workers,
                split_valid=given.split_valid,
                json_key=given.json_key,
                strict=given.strict,
                max_document_bytes=int(given.max_document_mb * (1 << 20)),
                progress=bar.update,
            )
    except (MegallamaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    report(summary, time.monotonic() - start)
    return 0


def report(summary: Summary, seconds: float) -> None:
    """Print what was written and what was skipped."""
    for out in summary.outputs:
        print(
            f"{out.prefix}.bin: {out.documents:,} documents, {out.tokens:,} tokens, "
            f"{out.text_bytes:,} bytes of text ({out.text_bytes / out.tokens:.2f} per token)"
        )
    size, tokens = sum(out.text_bytes for out in summary.outputs), sum(out.tokens for out in summary.outputs)
    print(f"{seconds:.1f} s, {size / seconds / 1e6:.1f} MB/s, {tokens / seconds / 1e6:.2f} M tokens/s")
    if summary.skipped:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary.skipped.most_common())
        print(f"skipped {summary.skipped.total():,} bad records: {kinds}", file=sys.stderr)
        for example in summary.examples:
            print(f"  {example}", file=sys.stderr)
        if summary.skipped.total() > len(summary.examples):
            print(f"  ... and {summary.skipped.total() - len(summary.examples):,} more", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
