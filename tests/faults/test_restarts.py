"""A run that is started again and again: processes that are killed, asked to stop, or broken while they set up."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.faults.ranks import Ranks


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
