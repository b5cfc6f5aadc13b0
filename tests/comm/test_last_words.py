"""What a rank says when it leaves, what it hears, and how long it waits for others: without processes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megallama.comm import launch as launch_module
from megallama.comm.flight_record import LIMIT, FlightRecord
from megallama.comm.group import ContactLost, Solo
from megallama.comm.launch import LAST_RESORT, Launch, World, _set_threads, keep_memory
from megallama.config.errors import MachineError, MegallamaError
from megallama.config.schema import RunConfig


class Told:
    """A star that has heard `first`, if anything, and remembers what it was told."""

    def __init__(self, first: tuple[str, int] | None = None) -> None:
        self.news, self.ends, self.left = first, list[tuple[str, int, bool]](), list[int]()
        self.waits: list[float] = []

    def first(self, seconds: float) -> tuple[str, int] | None:
        self.waits.append(seconds)
        return self.news

    def end(self, why: str, status: int, *, own: bool = False) -> None:
        self.ends.append((why, status, own))
        self.news = self.news or (why, status)


class Bounded(Solo):
    """A group that remembers how it was bound, and its barriers."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.limits: list[float] = []

    def bound(self, timeout: timedelta) -> None:
        self.limits.append(timeout.total_seconds())

    def barrier(self) -> None:
        self.limits.append(-1.0)


def world(star: Any = None, record: FlightRecord | None = None) -> World:
    launch, group = Launch(3, 4, host="node7"), Bounded("world")
    made = World(launch, torch.device("cpu"), group, ("node7",) * 4, star=star, record=record or FlightRecord())
    made.opened.append(group)  # type: ignore[arg-type]
    return made


def test_an_error_is_told_with_its_first_line_and_status() -> None:
    alone = world()
    assert alone.failed(ValueError("no")) is None and alone.whole
    star = Told()
    assert world(star).failed(ValueError("  no such key\nmore\n")) is None, "this rank was the first"
    assert star.ends == [("rank 3 (node7) failed first: ValueError: no such key", 1, True)]
    star = Told()
    world(star).failed(MegallamaError())
    assert star.ends == [("rank 3 (node7) failed first: MegallamaError: no message", 2, True)]
    star.left.append(1)
    assert not world(star).whole and world(Told()).whole


def test_what_all_ranks_raise_is_told_by_none() -> None:
    star = Told()
    assert world(star).failed(MachineError("full")) is None and not star.ends and not star.waits


def test_another_rank_that_was_first_is_named() -> None:
    star = Told(("rank 1 failed first", 4))
    assert world(star).failed(KeyError("x")) == ("rank 1 failed first", 4) and len(star.ends) == 1
    assert star.waits == [0.0], "nobody is waited for"


def test_lost_contact_is_an_echo_that_waits_for_the_reason() -> None:
    star = Told(("rank 1 failed first", 4))
    assert world(star).failed(ContactLost("lost rank 1")) == ("rank 1 failed first", 4)
    assert not star.ends and star.waits == [5.0, 0.0]
    star = Told()
    assert world(star).failed(ContactLost("lost rank 1")) is None
    assert star.ends == [("rank 3 (node7) lost contact with another rank first: ContactLost: lost rank 1", 1, True)]


def test_waits_are_bound_and_bound_again_after_a_patient_part() -> None:
    record = FlightRecord()
    made = world(record=record)
    made.bound(7.5)
    with made.patient(90.0):
        assert made.timeout.total_seconds() == 90 and record.words[LIMIT] == 90_000_000_000
    limits = made.opened[0].limits  # type: ignore[attr-defined]
    assert limits == [7.5, 90.0, -1.0, 7.5], "all meet before the short time-out counts again"
    assert made.timeout.total_seconds() == 7.5 and record.words[LIMIT] == 7_500_000_000


def test_a_supervisor_has_a_minute_before_a_wait_fails_by_itself() -> None:
    made = world(record=FlightRecord(FlightRecord.create()))
    made.bound(7.5)
    assert made.opened[0].limits == [67.5] and LAST_RESORT.total_seconds() == 60  # type: ignore[attr-defined]


class Made:
    """A communicator that only remembers what it was made of."""

    def __init__(self, own: Any, name: str, ranks: Any, rank: int, device: Any, down: Any, record: Any) -> None:
        self.own, self.down, self.ranks = own, down, ranks


@pytest.mark.parametrize(("kind", "name", "communicators"), [("cuda", "pp", 2), ("cuda", "tp", 1), ("cpu", "pp", 1)])
def test_on_gpus_the_messages_of_a_pipeline_have_a_communicator_for_each_direction(
    monkeypatch: pytest.MonkeyPatch, kind: str, name: str, communicators: int
) -> None:
    calls = list[tuple[Any, ...]]()

    def new_group(ranks: Any, limit: timedelta, use_local_synchronization: bool) -> int:
        calls.append((ranks, limit.total_seconds(), use_local_synchronization))
        return len(calls)

    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(launch_module, "C10d", Made)
    made = world()
    made.device, made.timeout = torch.device(kind), timedelta(seconds=9)
    group: Any = made.open_group(name, [(0, 1), (2, 3)])
    assert calls == [((2, 3), 9.0, True)] * communicators and group is made.opened[-1]
    assert (group.own, group.down) == ((2, 1) if communicators == 2 else (1, None)) and group.ranks == (2, 3)
    assert made.open_group("world", [(0, 1, 2, 3)]) is made.group and len(made.opened) == 2
    assert isinstance(made.open_group("cp", [(n,) for n in range(4)]), Solo) and len(calls) == communicators


@pytest.mark.parametrize(
    ("given", "cores", "sharing", "threads"), [(0, 8, 2, 4), (0, 8, 3, 2), (0, 2, 4, 1), (5, 2, 2, 5)]
)
def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch, given: int, cores: int, sharing: int, threads: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    set_to, notes = list[int](), list[str]()
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    _set_threads(RunConfig(threads=given), (sharing, ""), notes)
    assert set_to == [threads]
    many = "" if threads == 1 else "s"
    assert notes == [f"{threads} CPU thread{many} per rank ({cores} cores for {sharing} ranks)"]


class Libc:
    """What `mallopt` was asked, and its answers."""

    def __init__(self, refused: int) -> None:
        self.refused, self.asked = refused, list[tuple[int, int]]()

    def mallopt(self, option: int, value: int) -> int:
        self.asked.append((option, value))
        return int(option != self.refused)


def test_memory_is_kept_where_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("musl", "1"))
    assert not keep_memory()
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    for refused in (0, -4, -1, -2):
        libc = Libc(refused)
        monkeypatch.setattr("ctypes.CDLL", lambda name, libc=libc: libc)
        assert keep_memory() == (refused == 0)
        assert libc.asked == [(-4, 0), (-1, 2**31 - 1), (-2, 1 << 28)]  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
