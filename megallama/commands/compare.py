"""Are the differences between evaluations more than noise? `megallama compare base.json other.json`.

RESULT is what megallama evaluate --output wrote, or lm-evaluation-harness.  The first is compared with each other
one, item by item where both files have the same items.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megallama.commands.parser import Parser


def run(argv: Sequence[str]) -> None:
    """Print the table. Raises: MegallamaError."""
    parser = Parser("compare", __doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="RESULT", help="two or more, the first is the base")
    args = parser.read(argv)
    if len({*args.files}) < 2:
        parser.error("give two results or more")
    from megallama.evaluation.results import compare, read_results

    print(*compare({str(file): read_results(file) for file in args.files}), sep="\n")
