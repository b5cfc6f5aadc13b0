"""What a supervisor reads of its host: the kernel's kills, the state of processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from megallama.comm.flight_record import TRAINER
from megallama.recovery.flight_reader import FlightReader
from megallama.recovery.node import Node, out_of_memory_kills, process_state, signal_name, write_json


def host(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "kills"),
    [
        ("0::/job/step\n", {"sys/fs/cgroup/job/step/memory.events": "low 0\noom 3\noom_kill 2\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/memory.events": "oom_kill 1\n", "proc/vmstat": "oom_kill 9\n"}, 1),
        ("9:cpu,memory:/job\n", {"sys/fs/cgroup/memory/job/memory.oom_control": "under_oom 0\noom_kill 4\n"}, 4),
        ("3:cpu:/job\n", {"proc/vmstat": "pgfault 7\noom_kill 5\n"}, 5),
        ("0::/job\n", {"proc/vmstat": "pgfault 7\n"}, 0),
    ],
)
def test_kills_for_want_of_memory(tmp_path: Path, cgroup: str, files: dict[str, str], kills: int) -> None:
    assert out_of_memory_kills(host(tmp_path, cgroup, files)) == kills


def test_processes_and_signals() -> None:
    assert process_state(os.getpid()) == "R" and process_state(1 << 22) == "X"
    child = os.fork()
    if not child:
        signal.pause()
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    assert process_state(child) == "T"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (signal_name(9), signal_name(99)) == ("SIGKILL (9)", "signal 99")


@pytest.mark.parametrize(("ranks", "stops", "late"), [(2, True, [1]), (2, False, []), (1, True, [])])
def test_a_trainer_that_is_stopped_is_waited_for_as_long_as_in_a_step(ranks: int, stops: bool, late: list[int]) -> None:
    """Whatever it was doing: saving, setting up, leaving. One that is alone is paused; one that runs is busy."""
    records = {rank: FlightReader() for rank in range(2)}
    node, child = Node.__new__(Node), os.fork()
    if not child:
        signal.pause()
    node.records, node.hosts, node.about = records, ["a"] * ranks, {"timeout_seconds": 0.2}
    node._moved, node._stopped, node.born = {}, {}, 0.0
    records[1].words[TRAINER] = child
    try:
        if stops:
            os.kill(child, signal.SIGSTOP)
            os.waitpid(child, os.WUNTRACED)
        assert node.overdue(0.0) == []
        time.sleep(0.25)
        assert node.overdue(0.0) == late and node.overdue(time.monotonic()) == []
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_disk_that_refuses_a_status_costs_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / "missing" / "x.json", {})
    write_json(tmp_path / "x.json", {"a": 1})
    assert os.listdir(tmp_path) == ["x.json"]
