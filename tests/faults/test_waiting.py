"""Two time-outs: one for steps, one for everything that waits for files."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megallama.comm.c10d import C10d
from megallama.data.writer import IndexedWriter
from tests.pool import Pool

STEP, SLOW, HANGS = 1.5, 2.4, 9.0  # run.timeout_seconds; how long the last rank keeps the others waiting [s]


def settings(folder: Path) -> dict[str, dict[str, Any]]:
    with IndexedWriter(folder / "held", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(40 * 16 + 1) % 61)
    return {
        "run": {"timeout_seconds": STEP, "io_timeout_seconds": 60.0},
        "train": {"steps": 5},
        "eval": {"interval": 2, "batches": 1},
        "checkpoint": {"interval": 2, "async_save": False},
        "data": {"valid": [{"path": str(folder / "held")}], "timeout_seconds": STEP},
    }


@pytest.mark.parametrize("gloo", [False, True], ids=["shared memory", "gloo"])
@pytest.mark.parametrize("where", ["open_sources", "evaluate", "_save"])
def test_a_rank_that_is_slow_at_files_is_waited_for(pool: Pool, tmp_path: Path, where: str, gloo: bool) -> None:
    messages = pool.run(
        2, "tests.faults.waiting:run", str(tmp_path / "run"), settings(tmp_path), where, SLOW, gloo=gloo
    )
    assert messages == [{"status": 0, "error": "", "seconds": 0.0}] * 2


@pytest.mark.parametrize("gloo", [False, True], ids=["shared memory", "gloo"])
def test_a_rank_that_hangs_in_a_step_is_not(pool: Pool, tmp_path: Path, gloo: bool) -> None:
    messages = pool.run(
        2, "tests.faults.waiting:run", str(tmp_path / "run"), settings(tmp_path), "train_step", HANGS, gloo=gloo
    )
    assert messages[0]["error"].startswith("ContactLost: ") and messages[0]["seconds"] < HANGS, messages


class Backend:
    """A process group as torch offers it."""

    def __init__(self) -> None:
        self.bound: list[timedelta] = []

    def set_timeout(self, timeout: timedelta) -> None:
        self.bound.append(timeout)


class OldBackend:
    """The same before it had a method for it."""


def test_both_groups_of_a_pipeline_over_nccl_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    up, down = Backend(), Backend()
    C10d(up, "pp", (0, 1), 0, torch.device("cuda"), down).bound(timedelta(seconds=7))  # type: ignore[arg-type]
    assert up.bound == down.bound == [timedelta(seconds=7)]
    old: list[Any] = []
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", lambda timeout, group: old.append((group, timeout)))
    first, second = OldBackend(), OldBackend()
    C10d(first, "pp", (0, 1), 0, torch.device("cuda"), second).bound(timedelta(seconds=7))  # type: ignore[arg-type]
    assert old == [(first, timedelta(seconds=7)), (second, timedelta(seconds=7))]


def test_the_checkpoint_group_keeps_its_own(pool: Pool) -> None:
    for groups, checkpoint in pool.run(2, "tests.comm.operations:bound", collective_timeout=30):
        assert groups == [7.0] * len(groups) and len(groups) > 1 and checkpoint == 30.0
