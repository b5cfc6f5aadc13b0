"""How a run is, and what it did with its time: `megallama status runs/mine`, while it runs and after, from any host.

Prints whether it runs, or how it ended and because of which rank; productive, waiting and lost time over all starts;
where every rank stands and what it waits for. Exit status 0; 2 where the folder holds no run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from megallama.commands.parser import Parser, filled


def run(argv: Sequence[str]) -> None:
    """Print it. Raises: MegallamaError."""
    parser = Parser("status", __doc__)
    parser.add_argument("folder", type=filled, help="run.folder of the run")
    parser.add_argument("--json", action="store_true", help="all that is known, as JSON")
    args = parser.read(argv)
    from megallama.recovery.status import lines, read

    found = read(Path(args.folder))
    print(json.dumps(found, indent=1) if args.json else "\n".join(lines(found, time.time())))
