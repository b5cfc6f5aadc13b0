"""Supervisors of one host find one another by what the launcher has started, before their trainers have met."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megallama.comm.flight_record import LAUNCHER, PHASE, PHASES, SUPERVISOR
from megallama.recovery.flight_reader import FlightReader
from megallama.recovery.siblings import Siblings

LAUNCH = {"master_port": 29500, "one_node": True}


class Fake:
    """A process with the command of a supervisor, of the run with these `arguments`."""

    def __init__(self, number: int, arguments: str) -> None:
        files = FlightReader.create(), os.memfd_create("stacks", 0)
        self.record = FlightReader(*files)
        own = [",".join(map(str, files)), str(number), "1", "megallama.pretrain", arguments]
        command = [sys.executable, "-S", "-s", "-c", "input()", "/root", *own]
        self.process = subprocess.Popen(command, pass_fds=files, stdin=subprocess.PIPE)
        self.record.words[LAUNCHER], self.record.words[SUPERVISOR] = 4711, self.process.pid
        self.words = [word.encode() for word in command] + [b""]

    def tells(self, rank: int, ranks: int, **launch: Any) -> dict[str, Any]:
        about = {"rank": rank, "ranks": ranks, "host": "a", "launcher": "torchrun", "launch": LAUNCH | launch}
        self.record.tell("about", about)
        return about

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[list[Fake]]:
    made = [Fake(number, f"run.folder={tmp_path}") for number in range(4)]
    deadline = time.monotonic() + 10
    for fake in made:
        while b"-S" not in Path(f"/proc/{fake.process.pid}/cmdline").read_bytes():
            assert time.monotonic() < deadline
    yield made
    for fake in made:
        fake.end()
        os.close(fake.record.file)
        os.close(fake.record.stacks)


def siblings_of(fake: Fake) -> Siblings:
    found = Siblings(fake.record)
    found._words = fake.words
    return found


def test_the_world_is_known_when_all_that_live_have_said_who_they_are(fakes: list[Fake]) -> None:
    about = fakes[0].tells(2, 3)
    found = siblings_of(fakes[0])
    fakes[3].end()  # before it was seen: of another start
    assert found.meet({}) is None and not found.expected
    assert found.meet(about) is None and found.expected
    fakes[1].tells(0, 3)
    assert found.meet(about) is None
    fakes[2].tells(1, 3)
    node = found.meet(about)
    assert node is not None and node.early and (node.rank, node.hosts) == (2, ["a"] * 3)
    pids = [[fakes[number].process.pid] for number in (1, 2, 0)]
    assert node.about["records"] == pids and node.about["seats"] == [0, 1, 2]
    fakes[1].record.ends(-9, "killed")
    assert node.records[0].told("cause")["text"] == "killed"
    fakes[2].end()
    assert "was killed" in (node.lost(1) or {})["text"] and node.lost(0) is None


def test_who_dies_without_a_word_is_the_one_that_is_missing(fakes: list[Fake]) -> None:
    about, found = fakes[0].tells(0, 4), siblings_of(fakes[0])
    for number, rank in ((1, 3), (2, 1)):
        fakes[number].tells(rank, 4)
    assert found.meet(about) is None
    fakes[3].end()
    node = found.meet(about)
    assert node is not None and f"process {fakes[3].process.pid}" in (node.lost(2) or {})["text"]


def test_a_rank_that_dies_before_it_has_a_supervisor_is_missed(fakes: list[Fake], tmp_path: Path) -> None:
    """Its launcher has started it; one that this has never started, or that it may start yet, is waited for."""
    (tmp_path / "megallama").mkdir()
    (tmp_path / "megallama" / "pretrain.py").write_text("input()")
    command = [sys.executable, "-m", "megallama.pretrain", f"run.folder={tmp_path}"]
    for fake in fakes[:2]:
        fake.record.words[LAUNCHER] = os.getpid()
    about, found = fakes[0].tells(0, 3), siblings_of(fakes[0])
    fakes[1].tells(1, 3)
    assert found.meet({}) is None and found.meet(about) is None
    first = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=tmp_path)
    while b"\0-m\0" not in Path(f"/proc/{first.pid}/cmdline").read_bytes():
        time.sleep(0.01)
    assert found.meet(about) is None
    first.kill()
    first.wait()
    node = found.meet(about)
    assert node is not None and f"process {first.pid}" in (node.lost(2) or {})["text"]
    assert node.ended(2) is False and node.lost(1) is None
    node.close()


def test_all_processes_are_looked_through_once_a_second(fakes: list[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    about, found, looks = fakes[0].tells(0, 2), siblings_of(fakes[0]), list[str]()
    real, now = os.listdir, [100.0]
    monkeypatch.setattr("megallama.recovery.siblings.os.listdir", lambda path: (looks.append(path), real(path))[1])
    monkeypatch.setattr("megallama.recovery.siblings.time.monotonic", lambda: now[0])
    for _ in range(11):
        assert found.meet(about) is None
        now[0] += 0.2
    assert len(looks) == 3


def test_those_of_another_start_or_launch_do_not_count(fakes: list[Fake]) -> None:
    about = fakes[0].tells(0, 2)
    fakes[1].tells(1, 2)
    fakes[1].record.words[PHASE] = PHASES.index("data")  # of a start before: it is about to leave
    fakes[2].tells(1, 2, master_port=29501)
    fakes[3].record.words[LAUNCHER] = 4712  # it may be another's, and has said nothing
    found = siblings_of(fakes[0])
    assert found.meet(about) is None
    fakes[3].tells(1, 2)
    node = found.meet(about)
    assert node is not None and node.about["records"] == [[fakes[number].process.pid] for number in (0, 3)]


def test_ranks_of_several_hosts_are_not_looked_for(fakes: list[Fake]) -> None:
    about, found = fakes[0].tells(0, 2, one_node=False), siblings_of(fakes[0])
    fakes[1].tells(1, 2, one_node=False)
    assert found.meet(about) is None and not found.expected
