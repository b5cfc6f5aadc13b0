"""Bad steps, and the vote of all ranks."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megallama.train.health import BadSteps, TrainingStopped, Vote
from megallama.train.signals import SIGNALS


def test_bad_steps_in_a_row_stop_the_run() -> None:
    bad = BadSteps(3)
    bad.record(40, True)
    bad.record(41, False)
    bad.record(42, False)
    bad.record(43, True)
    bad.record(44, False)
    bad.record(45, False)
    with pytest.raises(TrainingStopped) as stopped:
        bad.record(46, False, checkpoint=40)
    assert str(stopped.value) == (
        "loss or gradients were non-finite for 3 steps in a row (steps 44-46); last good step 43; resume from "
        "step 40 with a lower optimizer.lr or a longer lr_schedule.warmup_steps, "
        "or raise train.max_bad_steps=3"
    )
    assert bad.skipped == 5


def test_bad_from_the_start() -> None:
    with pytest.raises(TrainingStopped, match=r"\(step 1\); no step was good; no checkpoint is so old: start"):
        BadSteps(1).record(1, False)


def test_overflows_that_a_smaller_scale_may_cure_do_not_stop_the_run() -> None:
    bad = BadSteps(2)
    for step in range(1, 9):
        bad.record(step, False, excused=True)
    assert (bad.skipped, bad.in_a_row, bad.last_good) == (8, 0, None)


def test_the_count_continues_after_a_resume() -> None:
    first = BadSteps(3)
    for step, finite in ((1, True), (2, False), (3, False)):
        first.record(step, finite)
    second = BadSteps(3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with pytest.raises(TrainingStopped, match=r"\(steps 2-4\); last good step 1"):
        second.record(4, False)


def add(*votes: Vote) -> Vote:
    """What every rank holds after the sum."""
    return Vote.unpack([math.fsum(column) for column in zip(*(vote.pack() for vote in votes), strict=True)])


def test_votes_add_up() -> None:
    total = add(
        Vote.of(1.5, 4.0, finite=True, late=False, received=None),
        Vote.of(0.0, 5.0, finite=True, late=True, received=None),
    )
    assert (total.loss, total.norm_squared, total.finite, total.late_ranks) == (1.5, 9.0, True, 1)
    assert total.stop_reason == "train.stop_after_minutes is over"


def test_one_rank_decides_for_all() -> None:
    good = Vote.of(1.0, 1.0, finite=True, late=False, received=None)
    bad = Vote.of(math.nan, math.inf, finite=False, late=False, received=None)
    assert good.finite and good.stop_reason is None
    total = add(good, bad, bad, good)
    assert (total.finite, total.bad_ranks) == (False, 2)
    assert math.isnan(total.loss)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_on_any_rank_is_everybodys(number: signal.Signals) -> None:
    quiet = Vote.of(1.0, 1.0, finite=True, late=True, received=None)
    loud = Vote.of(1.0, 1.0, finite=True, late=False, received=number)
    assert add(quiet, loud).stop_reason == f"{number.name} on 1 rank"
    assert add(loud, quiet, loud).stop_reason == f"{number.name} on 2 ranks"


def test_the_module_needs_no_torch() -> None:
    code = "import sys, megallama.train.health; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
