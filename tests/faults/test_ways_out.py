"""However a run ends: what is on disk, what it said, and its exit status."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megallama.checkpoint.manager as manager_module
import megallama.train.loop as loop_module
from megallama.checkpoint.disk import CheckpointError
from megallama.data.samples import Samples, Synthetic
from megallama.pretrain import main
from megallama.train.step import RankStatus, StepConsensus
from tests.faults.test_bad_input import GOOD
from tests.pool import Pool
from tests.train.test_loop import sections

QUIET = [*GOOD, "precision.dtype=fp32", "log.tensorboard=false"]


def saved(folder: Path) -> list[int]:
    """The steps that are on disk."""
    return sorted(int(p.name[5:]) for p in (folder / "checkpoints").glob("step-????????"))


@pytest.fixture
def each_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, Any], StepConsensus | None]], None]:
    """Plants a function (step from 1, the rank) -> None, or the result to give instead of the step's."""

    def plant(fault: Callable[[int, Any], StepConsensus | None]) -> None:
        real, calls = loop_module.train_step, [0]

        def step(rank: Any, *args: Any, **more: Any) -> StepConsensus:
            calls[0] += 1
            return fault(calls[0], rank) or real(rank, *args, **more)

        monkeypatch.setattr(loop_module, "train_step", step)

    return plant


BAD = StepConsensus({**RankStatus().counts(), "loss": math.nan, "norm_squared": math.nan, "bad_ranks": 1.0}, 16)


def test_a_failed_save_and_then_a_bad_step_are_both_tolerated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write, calls = manager_module.write_checkpoint, []

    def fails_once(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise CheckpointError("no space left")
        write(*args)

    monkeypatch.setattr(manager_module, "write_checkpoint", fails_once)
    each_step(lambda step, rank: BAD if step == 3 else None)
    arguments = [*QUIET, f"run.folder={tmp_path}", "train.steps=6", "checkpoint.interval=2", "checkpoint.keep_last=9"]
    assert main(arguments) == 0
    assert saved(tmp_path) == [4, 6]
    assert "warning: checkpoint of step 2: no space left; the run goes on" in capsys.readouterr().out


def test_no_save_and_no_retention_while_steps_are_bad(
    tmp_path: Path, each_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A weight goes bad after step 5: the checkpoints before it stay, and the message leads to the right one."""

    def spoil(step: int, rank: Any) -> None:
        if step == 6:
            rank.optimizer.shards(owned_only=True)[0].state["master"][0] = math.inf

    each_step(spoil)
    arguments = [*QUIET, f"run.folder={tmp_path}", "checkpoint.interval=2", "train.max_bad_steps=5", "train.steps=40"]
    assert main(arguments) == 3
    assert saved(tmp_path) == [2, 4]
    messages = capsys.readouterr()
    assert "(steps 6-10); last good step 5; resume from step 4 with a lower" in messages.err
    assert "step 8 is not saved before a step is good again" in messages.out


def test_a_save_that_was_due_in_a_bad_streak_follows_it(tmp_path: Path, each_step: Any) -> None:
    each_step(lambda step, rank: BAD if step in (4, 5) else None)
    arguments = [*QUIET, f"run.folder={tmp_path}", "checkpoint.interval=2", "checkpoint.keep_last=9", "train.steps=8"]
    assert main(arguments) == 0
    assert saved(tmp_path) == [2, 6, 8]


def test_a_stop_in_a_bad_streak_saves_and_deletes_nothing(tmp_path: Path, each_step: Any) -> None:
    each_step(lambda step, rank: BAD if step > 4 else None)
    arguments = [*QUIET, f"run.folder={tmp_path}", "checkpoint.interval=2", "checkpoint.keep_last=1"]
    arguments += ["checkpoint.async_save=false", "train.steps=99"]  # behind, the one of step 4 would see the streak
    assert main([*arguments, "train.stop_after_steps=7"]) == 75
    assert saved(tmp_path) == [4, 7]


def test_a_state_that_is_not_finite_ends_the_run(
    tmp_path: Path, each_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A moment that is inf makes no loss bad: only the save sees it."""

    def spoil(step: int, rank: Any) -> None:
        if step == 3:
            rank.optimizer.shards(owned_only=True)[0].state["exp_avg_sq"][0] = math.inf

    each_step(spoil)
    assert main([*QUIET, f"run.folder={tmp_path}", "checkpoint.interval=2", "train.steps=40"]) == 3
    assert saved(tmp_path) == [2]
    messages = capsys.readouterr().err
    assert "checkpoints/step-00000004 failed" in messages and "inf in" in messages and "exp_avg_sq-" in messages
    assert "on rank 0; resume from step 2 with" in messages


def test_data_that_fail_and_a_disk_that_is_full_are_both_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise CheckpointError("no space left")

    read = Synthetic.read

    def broken(self: Synthetic, ids: Any) -> Samples:
        if min(ids) >= 3 * 4:
            raise OSError(errno.EIO, "Input/output error", "/data/text.bin")
        return read(self, ids)

    monkeypatch.setattr(manager_module, "write_checkpoint", full)
    monkeypatch.setattr(Synthetic, "read", broken)
    assert main([*QUIET, f"run.folder={tmp_path}", "train.steps=9"]) == 4
    messages = capsys.readouterr().err
    assert messages.count("\n") == 1 and "Input/output error: '/data/text.bin'; look at the storage" in messages
    assert "; and step 3 could not be saved: no space left" in messages


@pytest.mark.parametrize("who", ["one rank", "all ranks"])
@pytest.mark.parametrize("kind", ["ValueError", "KeyboardInterrupt", "DataError"])
def test_a_save_under_way_is_finished_before_a_failing_run_leaves(
    pool: Pool, tmp_path: Path, kind: str, who: str
) -> None:
    settings = sections({}, "fp32", steps=40)
    settings["checkpoint"] = {"interval": 3}
    victims = [1] if who == "one rank" else [0, 1]
    messages = pool.run(2, "tests.faults.failing:run", str(tmp_path), settings, kind, victims, 1.5)
    assert messages[1]["type"] == kind and messages[1]["status"] == (4 if kind == "DataError" else None)
    assert messages[0]["saved"] == ["latest", "step-00000003"] and "step-00000003" in messages[1]["saved"], messages
    if who == "one rank":
        assert messages[1]["first"] is None and f"rank 1 (localhost) failed first: {kind}" in messages[0]["first"][0]


def test_the_wait_for_a_save_ends(pool: Pool, tmp_path: Path) -> None:
    settings = sections({}, "fp32", steps=40)
    settings["checkpoint"] = {"interval": 3, "finish_seconds": 0.5}
    messages = pool.run(2, "tests.faults.failing:run", str(tmp_path), settings, "DataError", [0, 1], 4.0)
    assert all(t["seconds"] < 3.5 for t in messages), messages
    assert messages[0]["saved"] == ["lock"], "a save that goes on keeps the folder"
