"""What `megallama status` says of runs that live, ended, or were killed; and the time that it counts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megallama.cli import command
from megallama.recovery.goodput import Goodput
from megallama.recovery.status import lines, read

NOW = 1_800_000_000.0


def rank(**more: Any) -> dict[str, Any]:
    return {
        "step": 7, "phase": "agree", "action": "", "stage": 0, "microbatch": 0, "layer": -1, "seconds": 0.1,
        "process": "S", "cause": None, "supervisor_silent": False, "own_seconds_per_step": 0.25,
    } | more  # fmt: skip


def folder(path: Path, age: float = 1.0, end: dict[str, Any] | None = None, **ranks: dict[str, Any]) -> Path:
    (path / "status").mkdir(parents=True)
    host = {"host": "n1", "time": NOW - age, "ranks": ranks}
    (path / "status" / "n1.json").write_text(json.dumps(host))
    if end:
        (path / "exit.json").write_text(json.dumps(end))
    return path


def said(path: Path) -> list[str]:
    return [*lines(read(path), NOW)]


def test_a_run_that_lives(tmp_path: Path) -> None:
    wait = {"group": "tp", "number": 3, "ranks": [0, 1], "operation": "recv", "rows": 2, "bytes": 8, "peer": 1}
    ranks = {
        "0": rank(wait=wait | {"seconds": 2.0}), "1": rank(process="T", seconds=9.0),
        "2": rank(supervisor_silent=True, own_seconds_per_step=None), "3": rank(process="X"),
    }  # fmt: skip
    assert said(folder(tmp_path / "run", **ranks)) == [
        "running",
        "n1: 4 ranks",
        "  rank 0: step 7, agree; waits for 2.0 s in recv from rank 1 of group tp (ranks 0-1, 2 rows, 8 bytes); "
        "own work 0.25 s a step",
        "  rank 1: step 7, agree; nothing new for 9.0 s; its process is stopped; own work 0.25 s a step",
        "  rank 2: step 7, agree; its supervisor is silent",
        "  rank 3: has left in step 7, agree: it has left without a word",
    ]


def test_a_run_that_ended_or_was_killed(tmp_path: Path) -> None:
    end = {"status": 4, "rank": 2, "cause": "rank 2 (n1) failed first: x", "host": "n1", "step": 7, "time": NOW - 60}
    text = said(folder(tmp_path / "run", 60, end, **{"0": rank(process="X", cause={"text": "echo\nmore"})}))
    assert text[0].endswith("with status 4 in step 7") and text[1] == f"cause: {end['cause']}\n(rank 2, n1)"
    assert text[-1] == "  rank 0: has left in step 7, agree: echo"
    killed = said(folder(tmp_path / "killed", 90, **{"0": rank()}))
    assert killed[0].startswith("no news for 0:01:30") and killed[1] == "n1: 1 rank; nothing since 0:01:30"
    fine = said(folder(tmp_path / "fine", 60, end | {"status": 0, "cause": "finished"}))
    assert fine[1] == "cause: finished"


def test_a_folder_without_a_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("status")([str(tmp_path)]) == 2
    assert f"{tmp_path} holds no status of a run" in capsys.readouterr().err
    (tmp_path / "status").mkdir()
    (tmp_path / "status" / "n1.json").write_text("{half")
    assert command("status")([str(tmp_path)]) == 2
    assert command("status")([str(folder(tmp_path / "run")), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"end", "goodput", "hosts", "members"}


def test_time_is_counted_over_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "time", lambda: clock[0])
    path = tmp_path / "goodput.json"

    def start(*states: tuple[float, int, str]) -> Goodput:
        counted = Goodput(path)
        for seconds, step, phase in states:
            clock[0] += seconds
            counted.count(step, phase)
        counted.write()
        return counted

    start((5, 0, "setting up"), (10, 1, "forward_backward"), (2, 1, "save"), (10, 2, "agree"), (1, 2, "data"))
    clock[0] += 30
    last = start((5, 0, "setting up"), (10, 2, "agree"), (10, 3, "agree"), (3, 3, "evaluate"))
    assert last.seconds == {"productive": 30.0, "waiting": 6.0, "starting": 10.0, "repeated": 10.0, "down": 30.0}
    assert last.restarts == 1 and last.best == 3
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "goodput.json").write_text(path.read_text())
    assert said(tmp_path / "run")[1] == (
        "34.9 % productive: productive 0:00:30, waiting 0:00:06, starting 0:00:10, repeated 0:00:10, down 0:00:30; "
        "1 restart"
    )
    last = start((0, 0, "setting up"), (0, 3, "between steps"), (4, 3, "evaluate"), (1, 3, "agree"), (1, 3, "evaluate"))
    assert (last.seconds["waiting"], last.seconds["repeated"]) == (10.0, 12.0)  # what was missing is not made again
    path.write_text("[]")
    assert Goodput(path).seconds["down"] == 0.0
