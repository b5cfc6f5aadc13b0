"""Who dies before the ranks have met, or while the run is set up, is missed at once, and replaced as at any time."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.faults.ranks import Ranks
from tests.faults.test_replacement import REPLACE, maker, run, trainer
from tests.faults.test_supervisor import HOST, nobody_is_left

WAIT = 60.0  # run.init_timeout_seconds


def told(ranks: Ranks, rank: int, generation: int) -> int:
    """The trainer of a rank once the supervisors know of it."""
    ranks.until(f"(replacement {generation} of") if generation else None
    pid, before = trainer(ranks, rank), 0
    while pid != before:  # the one before it may be there still
        time.sleep(0.5)
        pid, before = trainer(ranks, rank), pid
    return pid


def steps(folder: Path) -> list[int]:
    """Of the records."""
    return [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("victim", [0, 1])
def test_kills_while_it_is_set_up_are_got_over(tmp_path: Path, victim: int) -> None:
    settings = ["parallel.tp=2", "train.steps=3", *REPLACE, f"run.init_timeout_seconds={WAIT:g}"]
    ranks = run(tmp_path, *settings, fault="waits_while_it_is_set_up", victim=victim)
    began = time.monotonic()
    for generation in range(2):
        os.kill(told(ranks, victim, generation), signal.SIGKILL)
    assert ranks.wait(40) == [0, 0]
    assert time.monotonic() - began < 0.5 * WAIT
    assert steps(tmp_path) == [1, 2, 3]
    cause = rf"rank {victim} \(\S+\) failed first: killed by SIGKILL \(9\)"
    for number in (1, 2):
        again = rf"error: {cause}\nall ranks start again \(replacement {number} of 9\)"
        assert re.search(again, ranks.said(0) + ranks.said(1)), ranks.said(0)


def test_a_maker_that_is_killed_before_its_first_trainer_is_made_again(tmp_path: Path) -> None:
    ranks = run(tmp_path, "parallel.tp=2", "train.steps=3", *REPLACE, fault="waits_before_there_is_a_trainer", victim=1)
    trainer(ranks, 0)
    os.kill(maker(ranks, 1), signal.SIGKILL)
    assert ranks.wait(40) == [0, 0]
    assert steps(tmp_path) == [1, 2, 3]
    text = "warning: the process that makes its trainers: killed by SIGKILL (9); another is started (1 of 9)"
    assert text in ranks.said(1) and "start again" not in ranks.said(0) + ranks.said(1)


@pytest.mark.parametrize("fault", ["waits_before_there_is_a_trainer", "waits_while_it_is_set_up"])
def test_the_others_do_not_wait_for_a_rank_whose_supervisor_was_killed(tmp_path: Path, fault: str) -> None:
    settings = ["run.max_replacements=1", f"run.init_timeout_seconds={WAIT:g}"]
    ranks = run(tmp_path, *settings, fault=fault, victim=1)
    trainer(ranks, 0)
    time.sleep(1.0)
    supervisor, began = ranks.processes[1].pid or 0, time.monotonic()
    os.kill(supervisor, signal.SIGKILL)
    assert ranks.wait(40) == [1, -9]
    assert time.monotonic() - began < 5
    assert f"error: rank 1 ({HOST}) failed first: its supervisor (process {supervisor}) was killed" in ranks.said(0)
    assert nobody_is_left(tmp_path)


def test_no_checkpoint_is_ahead_of_the_records(tmp_path: Path) -> None:
    """A kill between the two would lose the record of a step."""
    planted = {"PLANTED": tmp_path / "run" / "checkpoints" / "step-00000004"}
    ranks = Ranks(2, ["train.steps=6", "checkpoint.interval=1", "checkpoint.keep_last=9", "log.interval=1"], tmp_path,
                  fault="dies_once_step_4_is_saved", env=planted)  # fmt: skip
    assert ranks.wait() == [0, 0]
    assert steps(tmp_path) == [*range(1, 7)] and planted["PLANTED"].exists()


def test_without_replacements_the_others_leave_at_once(tmp_path: Path) -> None:
    ranks = run(tmp_path, f"run.init_timeout_seconds={WAIT:g}", fault="waits_while_it_is_set_up", victim=1)
    time.sleep(1.5)
    began = time.monotonic()
    os.kill(ranks.trainer(1), signal.SIGKILL)
    assert ranks.wait(40) == [1, -9]
    assert time.monotonic() - began < 5
    assert f"error: rank 1 ({HOST}) failed first: killed by SIGKILL (9)" in ranks.said(0)
