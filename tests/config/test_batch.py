"""Batch arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.schema import BatchConfig

RAMP = BatchConfig(global_batch_size=32, micro_batch_size=2, ramp_start=8, ramp_increment=8, ramp_samples=96)


def test_constant() -> None:
    batch = BatchConfig(global_batch_size=24, micro_batch_size=2)
    assert batch.sizes == (24,) and batch.size_after(0) == batch.size_after(10**12) == 24
    assert batch.deal(24, dp=3) == (4, 4, 4)
    assert batch.samples_after(1000) == 24000
    ids = batch.sample_ids(100, 24, dp=3, dp_rank=2)
    assert ids == [range(100 + (m * 3 + 2) * 2, 100 + (m * 3 + 2) * 2 + 2) for m in range(4)]


@pytest.mark.parametrize("dp,micro", [(1, 1), (1, 8), (2, 2), (4, 1), (8, 1), (2, 4)])
def test_a_step_reads_its_samples_once(dp: int, micro: int) -> None:
    batch = BatchConfig(global_batch_size=16, micro_batch_size=micro)
    ranks = [batch.sample_ids(48, 16, dp, rank) for rank in range(dp)]
    ids = [i for found in zip(*ranks, strict=True) for samples in found for i in samples]
    assert ids == list(range(48, 64))


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_an_uneven_step_reads_its_samples_once_and_in_turn(total: int, dp: int, micro: int, first: int) -> None:
    """Micro-batch m of replica r is number m * dp + r of the step; the first replicas may have one more."""
    total = max(total, dp)
    batch = BatchConfig(global_batch_size=total * micro, micro_batch_size=micro, uneven=True)
    deal = batch.deal(total * micro, dp)
    assert sum(deal) == total and sorted(deal, reverse=True) == [*deal] and deal[0] - deal[-1] in (0, 1)
    read = [batch.sample_ids(first, total * micro, dp, rank) for rank in range(dp)]
    assert [len(ids) for ids in read] == [*deal]
    order = [read[n % dp][n // dp] for n in range(total)]
    assert [i for ids in order for i in ids] == list(range(first, first + total * micro))


@pytest.mark.parametrize("size,dp,uneven", [(10, 2, False), (9, 2, True), (4, 3, True), (4, 3, False)])
def test_a_batch_that_no_rule_would_let_through(size: int, dp: int, uneven: bool) -> None:
    with pytest.raises(AssertionError):
        BatchConfig(global_batch_size=size, micro_batch_size=2, uneven=uneven).deal(size, dp)


def test_ramp() -> None:
    assert RAMP.sizes == (8, 16, 24, 32)
    assert [RAMP.size_after(n) for n in (0, 31, 32, 63, 64, 95, 96, 10**9)] == [8, 8, 16, 16, 24, 24, 32, 32]
    sizes, consumed = [], 0
    while consumed < 200:
        sizes.append(RAMP.size_after(consumed))
        consumed += sizes[-1]
    assert sizes == [8] * 4 + [16] * 2 + [24] * 2 + [32] * 3
    assert [RAMP.samples_after(n) for n in (0, 1, 4, 5, 8, 9, 11)] == [0, 8, 32, 48, 112, 144, 208]


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_ramp_never_shrinks_and_ends(start: int, increments: int, samples: int) -> None:
    batch = BatchConfig(
        global_batch_size=start + increments * 3, micro_batch_size=1, ramp_start=start, ramp_increment=3,
        ramp_samples=samples,
    )  # fmt: skip
    sizes = [batch.size_after(n) for n in range(samples + 1)]
    assert sizes == sorted(sizes) and sizes[0] == start and sizes[-1] == batch.global_batch_size
    assert set(sizes) <= set(batch.sizes)


def test_what_is_left_of_a_ramp() -> None:
    """Sizes that are past bind nobody: neither the first of them, nor the increment once the ramp has ended."""
    assert RAMP.remaining(0) is RAMP
    assert [RAMP.remaining(n).ramp_start for n in (31, 32, 95)] == [8, 16, 24]
    ended = RAMP.remaining(96)
    assert (ended.ramp_start, ended.ramp_increment, ended.ramp_samples) == (None, None, None)


@given(st.integers(0, 3000), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_the_step_that_reads_a_sample(samples: int, done: int) -> None:
    steps = RAMP.steps_until(samples)
    assert RAMP.samples_after(steps) >= samples and (not steps or RAMP.samples_after(steps - 1) < samples)
    consumed = RAMP.samples_after(done)
    assert RAMP.steps_until(samples, done, consumed) == max(steps, done)
