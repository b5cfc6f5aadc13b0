"""What one generation of trainers leaves to the next: nothing by which that would be ended too."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megallama.comm.flight_reader import FlightReader
from megallama.comm.flight_record import BEAT, ENDED, GENERATION, TEXTS, TRAINER
from megallama.recovery.link import Links
from megallama.recovery.membership import Members
from megallama.recovery.node import Node
from megallama.recovery.straggler import Stragglers
from megallama.recovery.supervisor import Supervisor


def test_the_next_trainers_begin_without_the_verdict_of_the_last() -> None:
    """A supervisor may see the new generation before the process that makes the trainers does."""
    records = {rank: FlightReader() for rank in range(2)}
    for record in records.values():
        for name in TEXTS:
            record.tell(name, {"again": True, "rank": 1})
        record.words[TRAINER], record.words[ENDED], record.words[BEAT] = 4711, 10, 99
    node = Node.__new__(Node)
    node.records, node.rank, node.about = records, 0, {"seats": [0, 1], "records": [[os.getpid(), 0, 0]] * 2}
    node.begin_generation(3)
    for record in records.values():
        assert [record.told(name) for name in TEXTS] == [None] * len(TEXTS)
        assert [record.words[word] for word in (TRAINER, ENDED, GENERATION, BEAT)] == [0, 0, 3, 99]


def test_what_is_told_early_to_the_next_trainer_is_not_lost() -> None:
    """Its maker may come to it later than another rank's supervisor, that has a new verdict."""
    record = FlightReader()
    record.tell("verdict", {"again": False})
    record.words[ENDED] = 10
    record.begin_again()
    assert record.told("verdict") == {"again": False} and record.words[ENDED] == 0


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
    made._begin()
    about = {"max_replacements": 5, "host_of": [0, 0], "hosts": ["a"], "port": 0, "records": [[os.getpid(), 0, 0]] * 2}
    about |= {"min_replicas": 0, "replicas": [], "seats": [0, 1], "dp": [1, 2]}
    made._members = Members(about, made._links)
    node = made._node = Node.__new__(Node)
    node.about, node.rank, node.host, node.hosts, node.ranks = about, 0, 0, ["a", "a"], [0, 1]
    node.records, node.logs, node.folder, node._moved, node.born = records, (), Path("/nowhere"), {}, time.monotonic()
    made._next_beat = made._next_status = time.monotonic() + 100
    return made


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
