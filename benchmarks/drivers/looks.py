"""A supervisor's looks, and a rank's words in its record, so many of each and no more: for counting instructions.

    valgrind --tool=cachegrind --cache-sim=no python -S -s looks.py ROOT looks RANKS NUMBER
    valgrind --tool=cachegrind --cache-sim=no python -S -s looks.py ROOT words WHICH NUMBER

The supervisor is rank 0's of RANKS ranks on one host, which makes the others' look cheap: it reads all records.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from megallama.comm import flight_record as flight  # noqa: E402 - torch is not wanted here
from megallama.recovery.flight_reader import FlightReader  # noqa: E402
from megallama.recovery.supervisor import Supervisor  # noqa: E402


class Counted(Supervisor):
    """Leaves after so many looks."""

    left = 0

    def _end(self, now: float) -> None:
        super()._end(now)
        self.left -= 1
        if not self.left:
            os.kill(self._record.words[flight.TRAINER], signal.SIGKILL)
            os._exit(0)


def looks(ranks: int, number: int) -> None:
    """Of the supervisor of rank 0."""
    records = [FlightReader(FlightReader.create(), os.memfd_create("stacks")) for _ in range(ranks)]
    trainer = os.fork()
    if not trainer:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it ends with the supervisor
        time.sleep(600)
        os._exit(0)
    folder = Path(tempfile.mkdtemp())
    (folder / "status").mkdir()
    for record in records:
        record.words[flight.TRAINER], record.words[flight.SUPERVISOR] = trainer, os.getpid()
        record.words[flight.STEPS] = 64  # whole lists of own work
        record.tell("groups", [["world", [*range(ranks)]], ["tp", [0, 1]], ["dp", [0, 1]]])
    records[0].tell("about", {
        "rank": 0, "host": "a", "launcher": "alone", "folder": str(folder), "hosts": ["a"], "host_of": [0] * ranks,
        "records": [[os.getpid(), record.file, record.stacks] for record in records], "stage": [0] * ranks,
        "finish_seconds": 60.0, "timeout_seconds": 600.0, "max_replacements": 9, "min_replicas": 0, "replicas": [],
        "seats": [*range(ranks)], "dp": [1, ranks], "launch": {}, "address": "127.0.0.1", "port": 0, "token": "x",
    })  # fmt: skip
    supervisor = Counted(records[0], trainer, several=False)
    supervisor.left = number
    supervisor.run()


def words(which: str, number: int) -> None:
    """What a rank writes: `layer`, `action`, `at` or `call` (a communication that is waited for)."""
    record = flight.FlightRecord(flight.FlightRecord.create())
    group = record.add_group("tp", (0, 1))
    for _ in range(number):
        if which == "layer":
            record.layer(3)
        elif which == "action":
            record.action("F", 0, 1)
        elif which == "at":
            record.at(phase="data")
        else:
            place = record.begins(group, "all_reduce", 512, 1 << 20)
            record.waits(place)
            record.arrived(place)


if __name__ == "__main__":
    if sys.argv[2] == "looks":
        looks(int(sys.argv[3]), int(sys.argv[4]))
    words(sys.argv[3], int(sys.argv[4]))
