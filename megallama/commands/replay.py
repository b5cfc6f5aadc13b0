"""Run a step again, alone or under torchrun: `megallama replay runs/my 1234`. Nothing of the run is changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megallama.commands.parser import Parser


def run(argv: Sequence[str]) -> None:
    """Print the numbers and the verdict. Raises: MegallamaError."""
    parser = Parser("replay", __doc__)
    parser.add_argument("folder", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("step", type=int, metavar="STEP", help="as the log counts, from 1")
    args = parser.read(argv)
    from megallama.recovery.replay import replay

    print(*replay(args.folder, args.step), sep="\n", end="")
