"""What one generation of trainers leaves to the next: nothing by which that would be ended too."""

from __future__ import annotations

import os

from megallama.comm.flight_reader import FlightReader
from megallama.comm.flight_record import BEAT, ENDED, GENERATION, TEXTS, TRAINER
from megallama.recovery.node import Node


def test_the_next_trainers_begin_without_the_verdict_of_the_last() -> None:
    """A supervisor may see the new generation before the process that makes the trainers does."""
    records = {rank: FlightReader() for rank in range(2)}
    for record in records.values():
        for name in TEXTS:
            record.tell(name, {"again": True, "rank": 1})
        record.words[TRAINER], record.words[ENDED], record.words[BEAT] = 4711, 10, 99
    node = Node.__new__(Node)
    node.records = records
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
