"""kill -9 at every enumerated point of a save: the newest complete checkpoint is resumed, bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("ranks", "resave", "stride"),
    [(1, 0, 1), (1, 1, 7), (2, 0, 5), (4, 1, 11)],
    ids=["1 rank, every call", "1 rank, the step again", "2 ranks", "4 ranks, the step again"],
)
def test_killed_at_every_call_of_a_save(ranks: int, resave: int, stride: int, tmp_path) -> None:
    root = Path(__file__).parents[2]
    arguments = map(str, (tmp_path / "c", ranks, resave, stride))
    command = [sys.executable, "-m", "tests.checkpoint.crashes", *arguments]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["MIXED"] == 0 and found["survived"] == "new"
    assert found["killed"] == found["old"] + found["new"] - 1 and found["killed"] * stride > 100
    assert found["old"] > found["new"] > 1  # killed before, and after, the commit
    # a kill within the lock's first lines leaves its unnamed draft; nothing else is ever left
    assert [n for n in found["left"] if not n.startswith("lock.")] == []
