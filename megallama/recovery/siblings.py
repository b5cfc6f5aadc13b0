"""Supervisors of one host find one another before their trainers have met: by the command, which all ranks share.

It shows the files of their records, in which trainers say what the launcher's environment has told them.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megallama.comm.flight_record import ENDED, GENERATION, LAUNCHER, PHASE, FlightRecord
from megallama.recovery.flight_reader import FlightReader
from megallama.recovery.node import Node, process_state, reader_of
from megallama.train.supervised import said_of

LOOK, STOPPED = 1.0, 60.0  # seconds between looks through all processes; for a trainer that was stopped at once
_FILES, _SEVERAL = 6, 8  # words of a supervisor's command; those before the second are its own


class Siblings:
    """The supervisors of one launch on this host, as far as they have been seen; `own` is the record of one."""

    def __init__(self, own: FlightReader) -> None:
        self._own, self._launcher, self._words = own, own.words[LAUNCHER], _command("self")
        self._seen = dict[int, FlightReader | None]()  # by process; None: of a start before, that leaves
        said = said_of(sys.argv[6:], "max_replacements", "0")
        self.max_replacements = int(said) if said.isdigit() else 0  # nobody has checked it so far
        self._next, self.expected = 0.0, False  # look; whether there are several ranks, and all on this host
        self._young = set[int]()  # children of the launcher that are no supervisors so far

    def meet(self, about: dict[str, Any]) -> Node | None:
        """What they are together, of which `about` is one; None before all that live have said which rank they are."""
        self.expected = about.get("ranks", 1) > 1 and about["launch"]["one_node"]
        same, size = self._words[:_FILES] + self._words[_SEVERAL:], int(about.get("ranks", 0))
        looks = (self.expected or not about) and time.monotonic() >= self._next
        self._next = time.monotonic() + LOOK if looks else self._next
        for entry in [*self._children(), *(os.listdir("/proc") if looks else ())]:
            with suppress(OSError, ValueError, IndexError):  # gone by now, or no supervisor
                if int(entry) not in self._seen and (words := _command(entry))[:_FILES] + words[_SEVERAL:] == same:
                    record = reader_of(int(entry), map(int, words[_FILES].split(b",")))
                    ended = record.words[ENDED] and _started("self") - _started(entry) > 2.0
                    over = ended or record.words[PHASE] or record.words[GENERATION] != self._own.words[GENERATION]
                    self._seen[int(entry)] = None if over else record
        for pid in [pid for pid in self._young - self._seen.keys() if process_state(pid) in "XZ"]:
            self._seen[pid] = dead = FlightReader(FlightRecord.create(), os.memfd_create("none"))
            dead.words[LAUNCHER] = self._launcher
        found = {pid: record for pid, record in self._seen.items() if record}
        told = {pid: found[pid].told("about") for pid in found}
        ranks = {said["rank"]: pid for pid, said in told.items() if said and said["launch"] == about.get("launch")}
        unknown = [pid for pid, own in found.items() if not told[pid] and own.words[LAUNCHER] == self._launcher]
        ranks |= dict(zip(sorted({*range(size)} - ranks.keys()), unknown, strict=False))  # one alone is the missing one
        if len(ranks) < size or not self.expected or any(process_state(pid) not in "XZ" for pid in unknown):
            return None
        known: dict[str, Any] = {"hosts": [about["host"]], "host_of": [0] * size, "stage": [0] * size}
        known |= {"records": [[ranks[rank]] for rank in range(size)], "seats": [*range(size)], "replicas": ["", ""]}
        known |= {"max_replacements": self.max_replacements, "min_replicas": 0, "folder": os.devnull, "dp": [1, 1]}
        node = Node(about | known | {"port": 0, "token": "", "timeout_seconds": STOPPED}, self._own)
        node.records |= {rank: found[pid] for rank, pid in ranks.items() if rank != node.rank}
        node.early = True
        return node

    def _children(self) -> list[str]:
        """Of the launcher: a rank may be killed before it has a supervisor."""
        found, own = list[str](), [b"-m", *self._words[_SEVERAL + 1 :]]
        with suppress(OSError):
            found = Path(f"/proc/{self._launcher}/task/{self._launcher}/children").read_text().split()
            self._young |= {int(pid) for pid in found if _command(pid)[1:] == own}
        return found


def _started(pid: str) -> float:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) / 100  # ticks -> seconds


def _command(pid: str) -> list[bytes]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
