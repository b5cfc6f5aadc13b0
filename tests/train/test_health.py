"""Bad steps, and the consensus of all ranks."""

from __future__ import annotations

import json
import math
import signal
from typing import Any

import pytest
import torch

from megallama.train.progress import NonFiniteGuard, Progress, TrainingStopped
from megallama.train.signals import SIGNALS
from megallama.train.step import RankStatus, StepConsensus, consensus
from tests.small import on_threads, small_config


def test_bad_steps_in_a_row_stop_the_run() -> None:
    bad = NonFiniteGuard(3)
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
        NonFiniteGuard(1).record(1, False)


def test_overflows_that_a_smaller_scale_may_cure_do_not_stop_the_run() -> None:
    bad = NonFiniteGuard(2)
    for step in range(1, 9):
        bad.record(step, False, overflow=True)
    assert (bad.skipped, bad.in_a_row, bad.last_good) == (8, 0, None)


def test_the_count_continues_after_a_resume() -> None:
    config = small_config(train={"max_bad_steps": 3})
    first, second = Progress(config), Progress(config)
    for step, finite in ((1, True), (2, False), (3, False)):
        first.guard.record(step, finite)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(evaluated=0))))
    with pytest.raises(TrainingStopped, match=r"\(steps 2-4\); last good step 1"):
        second.guard.record(4, False)


def agreed(*ranks: tuple[float, float, RankStatus]) -> StepConsensus:
    """What every rank knows after a step in which they had these losses, squared norms and statuses."""

    def own(rank: Any) -> StepConsensus:
        loss, squares, status = ranks[rank.groups.rank]
        numbers = {"loss": torch.tensor(loss).double(), "norm_squared": torch.tensor(squares).double()}
        return consensus(rank, numbers, status, tokens=2, loss_scale=4.0)

    first, *others = on_threads(small_config(), len(ranks), own)
    assert all(repr(vars(other)) == repr(vars(first)) for other in others)  # nan is not equal to nan
    return first


def test_what_the_ranks_know_adds_up() -> None:
    total = agreed((1.5, 4.0, RankStatus()), (0.0, 5.0, RankStatus(late=True)))
    assert (total.loss, total.grad_norm, total.tokens) == (0.75, 0.75, 2)
    assert total.sums["bad_ranks"] == 0 and total.applied and not total.failed
    assert total.metrics == {"loss": 0.75, "grad_norm": 0.75}
    assert total.stop_reason == "train.stop_after_minutes is over"


def test_one_rank_decides_for_all() -> None:
    good, bad = (1.0, 1.0, RankStatus()), (math.nan, 1.0, RankStatus())
    alone = agreed(good)
    assert alone.applied and alone.stop_reason is None
    total = agreed(good, bad, (1.0, math.inf, RankStatus()), good)
    assert (total.applied, total.failed, total.sums["bad_ranks"]) == (False, False, 2)
    assert math.isnan(total.loss) and math.isnan(total.grad_norm)
    total = agreed(good, (0.0, 0.0, RankStatus(failed=True)))
    assert (total.applied, total.failed, total.sums["bad_ranks"]) == (False, True, 0)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_on_any_rank_is_everybodys(number: signal.Signals) -> None:
    quiet, loud = (1.0, 1.0, RankStatus(late=True)), (1.0, 1.0, RankStatus(number))
    assert agreed(quiet, loud).stop_reason == f"{number.name} on 1 rank"
    assert agreed(loud, quiet, quiet, loud).stop_reason == f"{number.name} on 2 ranks"
