"""Average checkpoints of one model: `megallama average STEP STEP ... --output FOLDER`.

Writes FOLDER/step-N: the last STEP, but with the means of weights and moments, made tensor by tensor in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megallama.commands.parser import Parser
from megallama.config.errors import say


def run(argv: Sequence[str]) -> None:
    """Average. Raises: MegallamaError."""
    parser = Parser("average", __doc__)
    parser.add_argument("steps", nargs="+", type=Path, metavar="STEP", help="a step folder; of a run the newest step")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="a new folder")
    args = parser.read(argv)
    from megallama.checkpoint.average import average
    from megallama.data.writer import alone

    with alone(args.output):
        average(args.steps, args.output, say)
