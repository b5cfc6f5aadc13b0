"""Learning-rate schedules: closed forms, ends, continuity."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megallama.config.schema import LrScheduleConfig, OptimizerConfig
from megallama.optim.lr import learning_rate

PEAK = 3e-4
OPTIMIZER = OptimizerConfig(lr=PEAK)


def schedule(kind: Any, **keys: Any) -> LrScheduleConfig:
    defaults: dict[str, Any] = {"warmup_steps": 10, "decay_steps": 110, "min_ratio": 0.1, "wsd_decay_steps": 20}
    if kind == "linear":
        kind, keys = "wsd", {"wsd_decay_steps": 0, **keys}
    return LrScheduleConfig(kind=kind, **{**defaults, **keys})


@pytest.mark.parametrize(("warmup", "end", "ratio"), [(0, 7, 0.1), (1, 7, 0.0), (10, 110, 0.1), (109, 110, 1.0)])
def test_wsd_without_a_stable_part_is_what_linear_was_to_the_bit(warmup: int, end: int, ratio: float) -> None:
    arguments = schedule("linear", warmup_steps=warmup, decay_steps=end, min_ratio=ratio)
    for n in range(1, end + 5):
        start = max(warmup, 1)
        x = 1.0 if n >= end else max(0.0, (n - start) / (end - start))
        linear = PEAK * n / start if n <= start else PEAK * (ratio + (1 - ratio) * (1 - x))
        assert learning_rate(n - 1, OPTIMIZER, arguments) == linear


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(kind: str) -> None:
    values = [learning_rate(i, OPTIMIZER, schedule(kind)) for i in range(10)]
    assert values == pytest.approx([PEAK * (i + 1) / 10 for i in range(10)])
    assert values[-1] == PEAK


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("cosine", 59, 0.55 * PEAK),  # half-way: the mean of peak and minimum
        ("cosine", 34, (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2) * PEAK),
        ("cosine", 109, 0.1 * PEAK),
        ("cosine", 5000, 0.1 * PEAK),
        ("linear", 59, 0.55 * PEAK),
        ("linear", 34, 0.775 * PEAK),
        ("linear", 109, 0.1 * PEAK),
        ("linear", 5000, 0.1 * PEAK),
        ("constant", 10, PEAK),
        ("constant", 5000, PEAK),
        ("wsd", 10, PEAK),
        ("wsd", 89, PEAK),
        ("wsd", 99, 0.55 * PEAK),
        ("wsd", 109, 0.1 * PEAK),
        ("wsd", 5000, 0.1 * PEAK),
    ],
)
def test_closed_forms(kind: str, step: int, expected: float) -> None:
    assert learning_rate(step, OPTIMIZER, schedule(kind)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "largest"), [("cosine", math.pi / 2 * 0.9 / 100), ("linear", 0.9 / 100), ("wsd", 0.9 / 20)]
)
def test_no_jumps_and_never_up_after_the_warm_up(kind: str, largest: float) -> None:
    values = [learning_rate(i, OPTIMIZER, schedule(kind)) / PEAK for i in range(9, 130)]
    drops = [a - b for a, b in zip(values, values[1:], strict=False)]
    assert min(drops) >= 0
    assert max(drops) <= largest * (1 + 1e-9)


def test_without_warm_up_the_first_step_runs_at_the_peak() -> None:
    for warmup in (0, 1):
        assert learning_rate(0, OPTIMIZER, schedule("cosine", warmup_steps=warmup)) == PEAK
        assert learning_rate(1, OPTIMIZER, schedule("cosine", warmup_steps=warmup)) < PEAK


def test_a_decay_as_long_as_the_run_follows_the_warm_up_at_once() -> None:
    long = schedule("wsd", wsd_decay_steps=500)
    assert [learning_rate(i, OPTIMIZER, long) for i in (9, 59, 109)] == pytest.approx([PEAK, 0.55 * PEAK, 0.1 * PEAK])


def test_min_ratio_of_zero_and_of_one() -> None:
    assert learning_rate(109, OPTIMIZER, schedule("cosine", min_ratio=0.0)) == 0.0
    assert learning_rate(59, OPTIMIZER, schedule("linear", min_ratio=1.0)) == pytest.approx(PEAK)


def test_warm_up_longer_than_the_decay_ends_at_the_minimum() -> None:
    short = schedule("cosine", warmup_steps=20, decay_steps=15)
    assert learning_rate(19, OPTIMIZER, short) == PEAK
    assert learning_rate(20, OPTIMIZER, short) == pytest.approx(0.1 * PEAK)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("first", [0, 4, 10, 60, 150])
@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_annealing_begins_where_any_schedule_is_and_ends_at_the_minimum(kind: str, first: int, ratio: float) -> None:
    plain = schedule(kind, min_ratio=ratio)
    annealed = plain.model_copy(update={"decay_from_step": first, "decay_until_step": 200})
    before, after = ([learning_rate(n, OPTIMIZER, s) for n in range(220)] for s in (plain, annealed))
    assert after[:first] == before[:first]
    begin, end = before[first - 1] if first else PEAK, ratio * PEAK
    line = [end + (begin - end) * (200 - n - 1) / (200 - first) for n in range(first, 200)]
    assert after[first:200] == pytest.approx(line, abs=1e-18) and after[199:] == [end] * 21


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_a_schedule_that_begins_later_warms_up_again_and_ends_at_the_same_step(kind: str) -> None:
    whole, short = schedule(kind), schedule(kind, decay_steps=80)
    later = [learning_rate(n, OPTIMIZER, whole, 30) for n in range(30, 120)]
    assert later == [learning_rate(n, OPTIMIZER, short) for n in range(90)]
