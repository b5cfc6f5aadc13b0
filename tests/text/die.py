"""tools/preprocess_data.py with small jobs, told to kill itself: die.py RANK WHERE COUNT arguments...

The process of that MPI rank (0 without MPI) dies by SIGKILL at its COUNT-th call of WHERE (0: never);
before that it says which files in /dev/shm its job has mapped, which MPI would remove at its end.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from typing import Any

from megallama.cli import command
from megallama.data.writer import IndexedWriter
from megallama.text import preprocess, shards

PLACES: dict[str, tuple[Any, str]] = {
    "add": (shards.ShardWriter, "add"),  # a block of documents is encoded
    "end": (shards.ShardWriter, "end"),  # a job's documents are written, its line in the journal is not
    "join": (shards.WorkFolder, "read"),
    "commit": (IndexedWriter, "__exit__"),  # .bin, .sums and .idx get their names
    "replace": (os, "replace"),  # .bin, .idx, .json
    "remove": (shutil, "rmtree"),
}


def main(rank: str, where: str, count: str, *arguments: str) -> int:
    """Run the tool."""
    preprocess.TASK_BYTES = 20_000
    if int(count) and os.environ.get("PMI_RANK", "0") == rank:
        owner, name = PLACES[where]
        original, calls = getattr(owner, name), itertools.count(1)

        def fatal(*inputs: Any, **options: Any) -> Any:
            if next(calls) == int(count):
                with open("/proc/self/maps") as maps:
                    print(*(line.split()[-1] for line in maps if "/dev/shm/" in line), file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*inputs, **options)

        setattr(owner, name, fatal)
    return command("prepare")(arguments)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
