"""A run that is started again and again: processes that are killed, asked to stop, or broken while they set up."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from megallama.checkpoint.folder import LOCK, FolderLock
from megallama.config.errors import DataError
from megallama.pretrain import main
from tests.faults.ranks import QUIET, Ranks


@pytest.mark.parametrize("size", [1, 2])
def test_a_loop_of_restarts_ends(tmp_path: Path, size: int) -> None:
    counted = tmp_path / "run/checkpoints/starts.json"

    def start(name: str, fault: str = "", *more: str) -> tuple[list[int | None], Ranks]:
        (tmp_path / name).mkdir()
        arguments = [f"run.folder={tmp_path / 'run'}", "run.max_failed_starts=2", *more]
        ranks = Ranks(size, arguments, tmp_path / name, fault, size - 1)
        return ranks.wait(), ranks

    def ends() -> list[str]:
        return [one["end"] for one in json.loads(counted.read_text())["starts"]] if counted.exists() else []

    assert start("asked", "asked_while_the_model_is_built")[0] == [75] * size and ends() == []
    statuses, _ = start("killed", "killed_while_the_model_is_built")
    left = f"rank 1 ({socket.gethostname()}) has left without a word: killed, or ended outside Python"
    assert statuses == [1, -9][-size:] and len(ends()) == 1
    assert start("asked again", "asked_while_data_are_opened")[0] == [75] * size and len(ends()) == 1
    assert start("broken", "has_a_bug")[0] == [1] * size and len(ends()) == 2
    killed, broken = ends()
    assert killed == (left if size == 2 else "killed, or its machine died: it left no word")
    assert broken.startswith("InternalError: model: ") and broken.endswith("KeyError: 'no such key'")
    statuses, refused = start("refused")
    said = [refused.said(rank) for rank in range(size)]
    assert statuses == [2] * size and sum("2 starts in a row ended before a step was finished" in t for t in said) == 1
    assert [text for text in (killed, broken, str(counted)) if text not in said[0]] == [] and len(ends()) == 2
    assert "Traceback" not in said[0]
    assert start("changed", "", "optimizer.lr=1e-4")[0] == [0] * size and not counted.exists()


def fails(folder: Path, *arguments: str) -> int:
    return main([*QUIET, f"run.folder={folder}", "run.max_failed_starts=2", *arguments])


def counted(folder: Path) -> list[str]:
    path = folder / "checkpoints" / "starts.json"
    return [one["end"] for one in json.loads(path.read_text())["starts"]] if path.exists() else []


def broken(error: Exception) -> Any:
    def open_sources(*arguments: Any, **named: Any) -> None:
        raise error

    return open_sources


BAD_DISK = OSError(5, "Input/output error", "/data/web.bin")


def test_a_start_that_fails_before_it_has_the_folder_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megallama.train.setup.open_sources", broken(BAD_DISK))
    for _ in range(2):
        assert fails(tmp_path) == 1
    assert [end for end in counted(tmp_path) if "/data/web.bin" not in end] == [] and len(counted(tmp_path)) == 2
    before = (tmp_path / "checkpoints" / "starts.json").read_bytes()
    capsys.readouterr()
    assert fails(tmp_path) == 2
    said = capsys.readouterr()
    assert "2 starts in a row ended before a step was finished" in said.out + said.err
    assert "Input/output error" in said.err and (tmp_path / "checkpoints" / "starts.json").read_bytes() == before


def test_ranks_that_fail_together_before_it_are_counted_once(tmp_path: Path) -> None:
    folder, ends = tmp_path / "run", []
    for name, fault in (("first", "dies_before_the_groups"), ("second", "has_a_bad_disk"), ("third", "has_a_bad_disk")):
        (tmp_path / name).mkdir()
        ranks = Ranks(2, [f"run.folder={folder}", "run.max_failed_starts=2"], tmp_path / name, fault, 1)
        ends.append(ranks.wait())
    assert ends == [[1, 9], [1, 1], [2, 1]]  # it is rank 0 that refuses
    died, broken = counted(folder)
    assert "rank 1" in died and "has left without a word" in died and "/data/web.bin" in broken


def test_a_bad_request_before_it_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megallama.train.setup.open_sources", broken(DataError("no such corpus")))
    assert fails(tmp_path / "run") == 2 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_the_folder_of_another_job_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    """Nor is it waited for, where only time can tell whether that job lives."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    other = FolderLock(folder, lambda text: None)
    other.acquire()
    if where == "elsewhere":
        job = json.loads((folder / LOCK).read_text()) | {"machine": "another", "host": "n7"}
        (folder / LOCK).write_text(json.dumps(job))
    before = (folder / LOCK).read_bytes()
    monkeypatch.setattr("megallama.train.setup.open_sources", broken(BAD_DISK))
    began = time.monotonic()
    assert fails(tmp_path) == 1
    assert time.monotonic() - began < 20 and os.listdir(folder) == [LOCK] and (folder / LOCK).read_bytes() == before
    said = capsys.readouterr()
    assert "warning: this start is not counted in" in said.out and "is in use by" in said.out
    other.release()
