"""kill -9 at every enumerated point of a save: the newest complete checkpoint is resumed, bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is some: a save waits for a disk some twenty times, and dies hundreds of times here."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as name:
        yield Path(name)


def killed(folder: Path, *numbers: int) -> dict[str, Any]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.checkpoint.crashes", str(folder / "c"), *map(str, numbers)]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["MIXED"] == 0 and found["survived"] == "new"
    assert found["killed"] == found["old"] + found["new"] - 1
    return found


@pytest.mark.parametrize(
    ("ranks", "resave", "stride"),
    [(1, 0, 1), (1, 1, 7), (2, 0, 5), (4, 1, 11)],
    ids=["1 rank, every call", "1 rank, the step again", "2 ranks", "4 ranks, the step again"],
)
def test_killed_at_every_call_of_a_save(ranks: int, resave: int, stride: int, folder: Path) -> None:
    found = killed(folder, ranks, resave, stride)
    assert found["killed"] * stride > 100
    assert found["old"] > found["new"] > 1  # killed before, and after, the commit
    # a kill within the lock's first lines leaves its unnamed draft; nothing else is ever left
    assert [n for n in found["left"] if not n.startswith("lock.")] == []


@pytest.mark.parametrize(("ranks", "victim", "stride"), [(2, 0, 23), (2, 1, 9), (3, 2, 11)])
def test_one_rank_of_several_is_killed(ranks: int, victim: int, stride: int, folder: Path) -> None:
    """The others notice, and what they leave behind is the old checkpoint, or the new one if it was complete."""
    found = killed(folder, ranks, 0, stride, victim)
    assert found["killed"] * stride > 30 and found["old"] >= 1
    assert [n for n in found["left"] if not n.startswith("lock.")] == []
