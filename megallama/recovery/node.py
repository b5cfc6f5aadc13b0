"""What supervisors see of the ranks of their host, and what they write about them for `megallama status`."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from megallama.comm import flight_record as flight
from megallama.recovery.flight_reader import FlightReader
from megallama.train.signals import STACKS

ANSWER = 0.25  # seconds in which a trainer writes where its threads stand
MOST = 1 << 14  # bytes of them that are told
STATUS_PERIOD = 5.0  # seconds between status files
SILENT = 3.0  # seconds without a beat after which a supervisor, or a host, is silent


def reader_of(pid: int, numbers: Iterable[int]) -> FlightReader:
    """The record of another supervisor, from the numbers of its files. Raises: OSError, ValueError."""
    return FlightReader(*(os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC) for number in numbers))


class Node:
    """The records of the ranks on one host, as one of their supervisors has them mapped."""

    early = False  # the trainers of now have not told of the run, but those before them have, or `Siblings` knows it

    def __init__(self, about: dict[str, Any], own: FlightReader) -> None:
        self.about, self.rank, self.folder = about, about["rank"], Path(about["folder"])
        self.logs = self.folder / f"logs/rank-{about['seats'][self.rank]:04d}.log", self.folder / "run.log"
        self.host, self.hosts = about["host_of"][self.rank], [about["hosts"][host] for host in about["host_of"]]
        self.records = {self.rank: own}
        self._moved: dict[int, tuple[int, float]] = {}  # on CUDA: actions completed, and since when
        self._stopped: dict[int, float] = {}  # trainers that stand still by SIGSTOP: since when
        for rank in (r for r, host in enumerate(about["host_of"]) if host == self.host and r != self.rank):
            with suppress(OSError, ValueError):  # another user's, or gone: it is not seen
                pid, *numbers = about["records"][rank]
                self.records[rank] = reader_of(pid, numbers)
        self.born = time.monotonic()

    def close(self) -> None:
        """Let go of the others' records."""
        for rank in self.records.keys() - {self.rank}:
            os.close(self.records[rank].file)
            os.close(self.records[rank].stacks)

    def begin_generation(self, number: int, place: dict[str, Any] | None = None) -> None:
        """The next trainers of this host begin, of the ranks that have a place."""
        for rank in self.able():
            begin_generation(self.records[rank], number, place and place | {"seat": self.about["seats"][rank]})

    @property
    def leader(self) -> bool:
        """Whether this supervisor speaks for its host: the first whose supervisor is not silent."""
        return all(self.silent(rank) or self.lost(rank) is not None for rank in self.records if rank < self.rank)

    def silent(self, rank: int) -> bool:
        """Whether the supervisor of `rank` has not looked for a while."""
        beat = self.records[rank].words[flight.BEAT] / 1e9
        return time.monotonic() - max(beat, self.born) > SILENT and not self.gone(rank)

    def gone(self, rank: int) -> bool:
        """Whether the trainer of `rank`, or its supervisor with it, has left."""
        return self.ended(rank) or self.lost(rank) is not None

    def ended(self, rank: int) -> bool:
        """Whether the trainer of `rank` is known to have left."""
        return self.records[rank].words[flight.ENDED] != 0

    def lost(self, rank: int) -> dict[str, Any] | None:
        """The cause, where the supervisor of `rank` has died, and the rank with it."""
        pid = self.about["records"][rank][0]
        if rank == self.rank or process_state(pid) not in "XZ":
            return None
        text = f"its supervisor (process {pid}) was killed"
        return {"status": -signal.SIGKILL, "text": text, "echo": False, "final": True}

    def able(self) -> list[int]:
        """Ranks of this host that can have another trainer."""
        return [rank for rank in self.records if self.lost(rank) is None]

    def overdue(self, since: float) -> list[int]:
        """Ranks that wait or are stopped too long, or whose device is; counted from `since` on."""
        now, found = time.monotonic(), []
        for rank, record in self.records.items():
            if self.ended(rank):
                continue
            words = record.words  # alone: this is done many times a second
            limit, completed = words[flight.LIMIT] / 1e9, words[flight.COMPLETED]
            waited = now - words[flight.SINCE + 1] / 1e9 if words[flight.SINCE] else 0.0
            if completed and self._moved.get(rank, (-1, now))[0] != completed:
                self._moved[rank] = completed, now
            if words[flight.LAUNCHED] > completed > 0:
                waited = max(waited, now - self._moved[rank][1])
            late = limit and min(waited, now - since) >= limit
            if late or self._stopped_for(rank, now - since) >= self.about["timeout_seconds"]:
                found.append(rank)
        return found

    def _stopped_for(self, rank: int, most: float) -> float:
        """Seconds since its trainer was first seen stopped; a paused run of one rank holds up nobody."""
        words, now = self.records[rank].words, time.monotonic()
        moves = now - words[flight.CHANGED] / 1e9 < 1.0
        if moves or len(self.hosts) == 1 or process_state(words[flight.TRAINER]) != "T":
            self._stopped.pop(rank, None)
            return 0.0
        return min(most, now - self._stopped.setdefault(rank, now))

    def reports(self) -> dict[int, dict[str, Any]]:
        """Where every rank of this host stands, with the stacks of those that answer."""
        living = [rank for rank in self.records if self.records[rank].words[flight.TRAINER] and not self.ended(rank)]
        before = {rank: os.fstat(self.records[rank].stacks).st_size for rank in living}
        states = {rank: self.records[rank].state() for rank in self.records}  # before anything is disturbed
        for rank in living:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.records[rank].words[flight.TRAINER], STACKS)
        time.sleep(ANSWER if living else 0)
        for rank, state in states.items():
            state["process"] = "X" if self.ended(rank) else process_state(self.records[rank].words[flight.TRAINER])
            file, start = self.records[rank].stacks, before.get(rank)
            if start is not None and (size := os.fstat(file).st_size) > start:
                state["stacks"] = os.pread(file, min(size - start, MOST), start).decode(errors="replace")
            keys = ("number", "group", "operation", "rows", "bytes", "done")
            state["calls"] = [[call[key] for key in keys] for call in self.records[rank].calls()]
        return states

    def busy(self) -> dict[int, tuple[int, list[int]]]:
        """For `Stragglers`."""
        return {rank: (record.state()["steps"], record.busy()) for rank, record in self.records.items()}

    def write_status(self, members: dict[str, Any]) -> None:
        """RUNFOLDER/status/NODE.json, whole or not at all; where the disk does not want it, not now."""
        if members and self.about["min_replicas"]:
            write_json(self.folder / "status" / "members.json", members)
        ranks = {}
        for rank, record in self.records.items():
            state, times = record.state(), record.busy()
            state["process"] = "X" if self.ended(rank) else process_state(record.words[flight.TRAINER])
            state["own_seconds_per_step"] = median(times) / 1e9 if times else None
            state["cause"], state["supervisor_silent"] = record.told("cause"), self.silent(rank)
            state["launched"] = self.about["seats"][rank]
            ranks[rank] = state
        name = self.hosts[self.rank]
        status = {"host": name, "time": time.time(), "ranks": ranks}
        write_json(self.folder / "status" / f"{name}.json", status)

    def write_exit(self, status: int, rank: int, cause: str) -> None:
        """RUNFOLDER/exit.json."""
        told = {"status": status, "rank": rank, "cause": cause, "host": self.hosts[rank], "time": time.time()}
        write_json(self.folder / "exit.json", told | {"step": self.records[self.rank].state()["step"]})


def begin_generation(record: FlightReader, number: int, place: dict[str, Any] | None) -> None:
    """The rank of this record goes on in the next generation; where worlds may change: in `place`."""
    if record.words[flight.GENERATION] == number:
        return
    for name in flight.TEXTS:  # before: a supervisor that is quick would end the next one by the last one's verdict
        record.tell(name, None)
    record.tell("place", place)
    record.begin_again()  # nor is the last one's end, or wait, the next one's, whose maker may take long
    record.words[flight.GENERATION] = number


def process_state(pid: int) -> str:
    """The kernel's letter for a process: R, S, D (cannot be interrupted), T (stopped), Z; X if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def write_json(path: Path, value: Any) -> None:
    """Write a file by rename; a disk that refuses it costs nothing else."""
    with suppress(OSError):
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(new, path)


def out_of_memory_kills(root: Path = Path("/")) -> int:
    """How often the kernel has killed for want of memory: in this control group, or else on this machine."""
    files = list[str]()
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                files.append(f"memory{path}/memory.oom_control" if controllers else f"{path[1:]}/memory.events")
    for name in [*(f"sys/fs/cgroup/{file}" for file in files), "proc/vmstat"]:
        with suppress(OSError, StopIteration):
            lines = (root / name).read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return 0


def signal_name(number: int) -> str:
    """SIGKILL (9)."""
    with suppress(ValueError):
        return f"{signal.Signals(number).name} ({number})"
    return f"signal {number}"
