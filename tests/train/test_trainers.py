"""One trainer after the other, made by a process that never trains: without processes."""

from __future__ import annotations

import os
import signal
import time

import pytest

from megallama.comm.flight_record import ENDED, GENERATION, SUPERVISOR, TRAINER, FlightRecord
from megallama.train import supervised


@pytest.mark.parametrize("status", [0, 9, 256])
def test_the_supervisor_is_told_how_a_trainer_ended(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    record, told = FlightRecord(), list[tuple[int, int]]()
    record.words[SUPERVISOR] = 5

    def kill(process: int, number: int) -> None:
        told.append((process, number))
        raise EOFError

    monkeypatch.setattr(os, "fork", lambda: 77)
    monkeypatch.setattr(os, "waitpid", lambda process, options: (process, status) if process == 77 else None)
    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(EOFError):
        supervised._become_trainers(record)
    assert record.words[ENDED] == status + 1 and told == [(5, signal.SIGCHLD)]


def test_a_trainer_dies_with_its_maker_and_one_without_a_place_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    record, dies, slept = FlightRecord(), list[int](), list[float]()
    record.tell("place", {"seat": 3, "seats": [0, 1]})

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        record.words[GENERATION] = len(slept) // 2  # after the second look
        record.tell("place", {"seat": 3, "seats": [0, 3]})

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(os, "fork", lambda: 0)
    monkeypatch.setattr(supervised, "_die_with", dies.append)
    supervised._become_trainers(record)
    assert slept == [0.02, 0.02] and dies == [os.getpid()] and record.words[TRAINER] == os.getpid()
