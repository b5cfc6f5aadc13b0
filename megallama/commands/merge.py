"""Join .bin/.idx pairs: `megallama merge data/a data/b data/c --output data/all`.

The documents come in the order of the inputs. All must have the same tokenizer and token type.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megallama.commands.parser import Parser, filled
from megallama.config.errors import counted


def run(argv: Sequence[str]) -> None:
    """Join the pairs. Raises: MegallamaError."""
    parser = Parser("merge", __doc__)
    parser.add_argument("prefixes", nargs="+", help="the pairs, with or without .bin or .idx")
    parser.add_argument("--output", required=True, type=filled, metavar="PREFIX", help="of the .bin/.idx pair to write")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.read(argv)
    from megallama.text.preprocess import merge
    from megallama.text.progress import ByteProgress

    with ByteProgress("merging", quiet=args.quiet) as bar:
        merged = merge(args.prefixes, args.output, bar.update, lambda text: print(text, file=sys.stderr))
    documents, tokens = counted(merged.num_documents, "document", ","), counted(merged.num_tokens, "token", ",")
    print(f"{merged.prefix}.bin: {documents}, {tokens}")
