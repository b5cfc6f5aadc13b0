"""What one generation of trainers leaves to the next: nothing by which that would be ended too."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from megallama.comm.flight_record import BEAT, CHANGED, ENDED, GENERATION, LAUNCHER, LIMIT, SINCE, TEXTS, TRAINER
from megallama.recovery.flight_reader import FlightReader
from megallama.recovery.link import Links
from megallama.recovery.membership import Members
from megallama.recovery.node import Node
from megallama.recovery.straggler import Stragglers
from megallama.recovery.supervisor import HASTE, PERIOD, REPLACED, Supervisor
from megallama.train import supervised


def test_the_next_trainers_begin_without_the_verdict_of_the_last() -> None:
    """A supervisor may see the new generation before the process that makes the trainers does."""
    records = {rank: FlightReader() for rank in range(2)}
    for record in records.values():
        for name in TEXTS:
            record.tell(name, {"again": True, "rank": 1})
        record.words[TRAINER], record.words[ENDED], record.words[BEAT] = 4711, 10, 99
        record.words[LIMIT], record.words[SINCE], record.words[SINCE + 1] = int(3e9), 5, 1  # killed while it waited
    node = Node.__new__(Node)
    node.records, node.rank, node.about = records, 0, {"seats": [0, 1], "records": [[os.getpid(), 0, 0]] * 2}
    node.begin_generation(3)
    for record in records.values():
        assert [record.told(name) for name in TEXTS] == [None] * len(TEXTS)
        assert [record.words[word] for word in (TRAINER, ENDED, GENERATION, BEAT)] == [0, 0, 3, 99]
    node.hosts, node._moved, node._stopped = ["a", "a"], {}, {}
    node.about["timeout_seconds"] = 3.0
    assert node.overdue(0.0) == []


def test_what_is_told_early_to_the_next_trainer_is_not_lost() -> None:
    """Its maker may come to it later than another rank's supervisor, that has a new verdict."""
    record = FlightReader()
    record.tell("verdict", {"again": False})
    record.words[ENDED] = 10
    record.begin_again()
    assert record.told("verdict") == {"again": False} and record.words[ENDED] == 0


def test_what_takes_long_is_imported_before_there_is_a_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is left alone by its garbage collection."""
    record, imported, frozen = FlightReader(), list[str](), list[bool]()
    monkeypatch.setattr(supervised.importlib, "import_module", imported.append)
    monkeypatch.setattr(supervised.gc, "disable", lambda: frozen.append(False))
    monkeypatch.setattr(supervised.gc, "freeze", lambda: frozen.append(True))
    monkeypatch.setattr(supervised.os, "fork", lambda: 0)
    monkeypatch.setattr(supervised, "_die_with", lambda parent: None)
    supervised._become_trainers(record)
    assert imported == ["megallama.train.loop", "torch.fx.experimental.symbolic_shapes"] and frozen == [False, True]
    assert record.words[TRAINER] == os.getpid()


def test_nobody_is_asked_for_stacks_while_there_is_no_trainer() -> None:
    """Process 0 would be all processes of the group, this one included."""
    record = FlightReader()
    node = Node.__new__(Node)
    node.records = {0: record}
    sent: list[int] = []
    real, os.kill = os.kill, lambda pid, number: sent.append(pid)
    try:
        assert node.reports()[0]["step"] == 0
    finally:
        os.kill = real
    assert sent == []


def supervisor_of(records: dict[int, FlightReader]) -> Supervisor:
    """Of rank 0, on one host with the ranks of `records`."""
    made = Supervisor.__new__(Supervisor)
    made._record, made._links, made._goodput, made._stragglers = records[0], Links(), None, Stragglers((0, 0))
    made._node, made._signals, made._sent, made._generation, made._warned = None, [], [], 0, set()
    made._writer = threading.Thread()
    made._begin()
    about = {"max_replacements": 5, "host_of": [0, 0], "hosts": ["a"], "port": 0, "records": [[os.getpid(), 0, 0]] * 2}
    about |= {"min_replicas": 0, "replicas": [], "seats": [0, 1], "dp": [1, 2], "timeout_seconds": 9.0}
    made._members = Members(about, made._links)
    node = made._node = Node.__new__(Node)
    node.about, node.rank, node.host, node.hosts, node.ranks = about, 0, 0, ["a", "a"], [0, 1]
    node.records, node.logs, node.folder, node._moved, node.born = records, (), Path("/nowhere"), {}, time.monotonic()
    node._stopped = {}
    made._next_beat = made._next_status = time.monotonic() + 100
    return made


def test_the_end_of_the_last_trainer_is_not_that_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's supervisor begins the next generation while that of rank 1 reads how its trainer has ended."""
    records = {rank: FlightReader() for rank in range(2)}
    root, other = supervisor_of(records), supervisor_of({0: records[1]})
    records[1].words[TRAINER], records[1].words[ENDED] = 4711, signal.SIGKILL + 1
    assert root._node is not None

    def meanwhile() -> int:
        assert root._node is not None
        root._node.begin_generation(1)
        return 0

    monkeypatch.setattr("megallama.recovery.supervisor.out_of_memory_kills", meanwhile)
    other._several, other._child, other._oom = True, 0, 0
    monkeypatch.setattr(other, "_reap_children", lambda: None)  # this process has children of its own
    other._reap(time.monotonic())
    assert other._status == signal.SIGKILL
    assert [record.told("cause") for record in records.values()] == [None, None]
    assert [record.words[ENDED] for record in records.values()] == [0, 0]
    records[1].ends(0, "finished")
    assert records[1].told("cause")["text"] == "finished"


@pytest.mark.parametrize(("verdict", "seconds"), [(None, PERIOD), ({"again": True}, HASTE)])
def test_while_trainers_are_replaced_a_supervisor_looks_more_often(
    monkeypatch: pytest.MonkeyPatch, verdict: dict[str, bool] | None, seconds: float
) -> None:
    supervisor, waited = supervisor_of({0: FlightReader()}), list[float]()
    supervisor._verdict, supervisor._pipe = verdict, (0, 1)

    def select(read: list[int], write: list[int], other: list[int], most: float) -> None:
        waited.append(most)
        raise InterruptedError

    monkeypatch.setattr("megallama.recovery.supervisor.select.select", select)
    with pytest.raises(InterruptedError):
        supervisor.run()
    assert waited == [seconds]


def test_nobody_leaves_while_the_next_generation_begins() -> None:
    """The texts of the last one go first; its number comes after, and between the two there may be a look."""
    records = {rank: FlightReader() for rank in range(2)}
    supervisor = supervisor_of({0: records[1]})
    supervisor._status, supervisor._left = signal.SIGKILL, time.monotonic() - 100
    for name in TEXTS:
        records[1].tell(name, None)
    assert not supervisor._may_leave(time.monotonic())
    supervisor._verdict = {"again": False}  # who begins it has died before the number came
    assert supervisor._may_leave(time.monotonic())


def test_the_next_trainer_is_not_killed_by_the_verdict_of_the_last() -> None:
    """The number changes after a look at it: there is no next trainer yet, and the last one's number is not used."""
    records = {rank: FlightReader() for rank in range(2)}
    supervisor = supervisor_of(records)
    child = subprocess.Popen(["sleep", "100"])
    try:
        records[0].words[TRAINER], records[0].words[ENDED] = child.pid, signal.SIGKILL + 1
        supervisor._verdict = {"again": True, "hang": True, "commits": False}
        assert supervisor._node is not None
        supervisor._node.begin_generation(1)
        records[0].words[TRAINER] = child.pid  # quick
        supervisor._end_trainer({"finish_seconds": 0.0}, time.monotonic() + 100)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.2)
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("again", [False, True])
def test_a_trainer_that_no_signal_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """It is in a call of the kernel: a network disk that is gone, say."""
    supervisor, sent, left = supervisor_of({rank: FlightReader() for rank in range(2)}), list[int](), list[float]()
    supervisor._verdict, now = {"again": again, "hang": True, "commits": False}, time.monotonic()
    monkeypatch.setattr(supervisor, "_kill", sent.append)
    monkeypatch.setattr(supervisor, "_leave", lambda about: left.append(now))
    while not left and now < time.monotonic() + 60:
        now += 0.2
        supervisor._end_trainer({}, now)
    assert set(sent) == {signal.SIGKILL} and len(left) == 1
    assert REPLACED < left[0] - time.monotonic() < REPLACED + 1


@pytest.mark.parametrize("early", [True, False], ids=["told early", "told late"])
def test_a_launcher_that_dies_while_the_supervisor_starts_is_missed(
    capfd: pytest.CaptureFixture[str], early: bool
) -> None:
    """Noted by the first process, gone before the supervisor looks for the first time; its trainer tells of it late."""
    record, about = FlightReader(FlightReader.create()), {"rank": 0, "host": "a", "launcher": "torchrun"}
    record.words[LAUNCHER] = 1 << 22  # no process
    child = os.fork()
    if not child:
        trainer = os.fork()
        if not trainer:
            signal.signal(signal.SIGTERM, lambda *_: (record.ends(75, "stopped as asked"), os._exit(75)))
            record.words[TRAINER] = os.getpid()
            time.sleep(0.0 if early else 0.5)
            record.tell("about", about)
            signal.pause()
        while early and not record.told("about"):
            time.sleep(0.01)
        Supervisor(record, trainer, several=False).run()
    until = time.monotonic() + 20
    while not (left := os.waitpid(child, os.WNOHANG))[0]:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert os.waitstatus_to_exitcode(left[1]) == 75
    assert capfd.readouterr().err.count("warning: torchrun is gone; rank 0 saves and stops") == 1


def test_that_all_begin_again_is_said_though_all_have_ended_already(capfd: pytest.CaptureFixture[str]) -> None:
    """On a busy machine the trainers have gone before their end is seen."""
    records = {rank: FlightReader() for rank in range(2)}
    for rank, record in records.items():
        record.tell("cause", {"status": 1, "text": "ValueError: planted", "echo": rank == 0, "final": False})
        record.words[ENDED], record.words[BEAT] = 257, time.monotonic_ns()
    supervisor = supervisor_of(records)
    for _ in range(2):  # looks
        assert supervisor._node is not None
        now = time.monotonic()
        supervisor._status = 256
        supervisor._watch(supervisor._node, now)
        if records[0].words[GENERATION]:
            break
        supervisor._end(now)
    assert records[1].words[GENERATION] == 1
    said = capfd.readouterr().err
    assert "rank 1 (a) failed first: ValueError: planted\nall ranks start again (replacement 1 of 5)" in said


@pytest.mark.parametrize(
    ("silent", "still", "resumed", "lost"),
    [(11, 11, 11, True), (9, 11, 11, False), (11, 9, 11, False), (11, 11, 9, False), (None, 11, 11, False)],
    ids=["lost", "heard", "steps go on", "this one was stopped", "never heard"],
)
def test_a_host_is_lost_that_is_silent_while_all_stand_still(
    silent: int | None, still: int, resumed: int, lost: bool
) -> None:
    """For longer than a step may take (9 s), and a beat."""
    records, now = {0: FlightReader()}, time.monotonic() + 100
    root = supervisor_of(records)
    assert (node := root._node) is not None
    node.about |= {"host_of": [0, 1], "port": 1}
    records[0].words[CHANGED], root._resumed = int((now - still) * 1e9), now - resumed
    root._links.heard = {} if silent is None else {1: now - silent}
    assert root._cut_off(node, now) is lost
    root._hear(node, 1, {"end": 0}, now)  # it leaves, since its work is done
    assert not root._cut_off(node, now)


@pytest.mark.parametrize("known", [False, True])
def test_a_trainer_that_has_just_gone_is_not_signalled(known: bool) -> None:
    """Its maker has waited for it: the number is nobody's, or another's."""
    records = {rank: FlightReader() for rank in range(2)}
    child = subprocess.Popen(["sleep", "100"])
    try:
        supervisor = supervisor_of(records)
        records[0].words[TRAINER], records[0].words[ENDED] = child.pid, int(known)
        supervisor._kill(signal.SIGTERM)
        if known:
            assert child.poll() is None
        else:
            assert child.wait(10) == -signal.SIGTERM
            supervisor._kill(signal.SIGTERM)  # and not an error
    finally:
        child.kill()
        child.wait()
