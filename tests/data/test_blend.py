"""Blends: never a whole sample off, at any moment; any number asked for directly; no gaps within a source."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from megallama.config.errors import DataError
from megallama.data.mixture import Blend

weight = st.one_of(st.integers(1, 9), st.floats(0.05, 1), st.sampled_from([0.01, 1.0, 1 / 3]))


def check(blend: Blend, start: int, length: int) -> None:
    """Walk `length` samples from `start`: shares exact after each, indices of every source consecutive."""
    counts = blend.counts(start)
    assert sum(counts) == start
    located = blend.locate(np.arange(start, start + length)).T.tolist()
    for n, (source, index) in enumerate(located, start):
        assert index == counts[source], (n, source)
        counts[source] += 1
        for part, count in zip(blend.parts, counts, strict=True):
            assert abs(count * blend.total - (n + 1) * part) < blend.total, (blend.parts, n)
    assert counts == blend.counts(start + length)


@settings(deadline=None, max_examples=25, phases=(Phase.explicit, Phase.generate))  # shrinking would take minutes
@given(weights=st.lists(weight, min_size=1, max_size=12), start=st.integers(0, 10**12))
def test_shares_are_exact_at_every_moment(weights: list[float], start: int) -> None:
    blend = Blend(weights)
    for first in (0, start // blend.block_length * blend.block_length, start):
        check(blend, first, min(2 * blend.block_length + 3, 2000))


@pytest.mark.parametrize("kind", ["equal", "near equal", "one large"])
def test_fifty_sources(kind: str) -> None:
    draw = random.Random(kind)
    weights = {
        "equal": [1.0] * 50,
        "near equal": [1 + draw.random() / 10 for _ in range(50)],
        "one large": [20.0] + [draw.random() + 0.05 for _ in range(49)],
    }[kind]
    blend = Blend(weights)
    check(blend, 0, 3 * blend.block_length)


@pytest.mark.parametrize("weights, block", [([1, 1, 14, 14, 14], 3), ([21, 2, 20, 1], 0), ([3, 3, 6, 1, 1], 2)])
def test_block_ends_leave_room_on_both_sides(weights: list[float], block: int) -> None:
    """Rounding up the largest remainders there breaks the first of these; the earliest deadlines, the other two."""
    blend = Blend(weights)
    check(blend, max(block - 1, 0) * blend.block_length, 3 * blend.block_length)


def test_sources_that_seldom_come_stay_exact_in_blocks_as_long_as_they_need() -> None:
    """Shorter blocks, in which a window begins before and ends after, would give the rare ones too much."""
    blend = Blend([0.5, 0.003, 0.1, 0.0007, 0.5, 0.0007, 0.5])
    assert blend.block_length == 4 * -(-16044 // 7)
    check(blend, 0, 6000)


def test_any_sample_can_be_asked_for_at_once() -> None:
    blend = Blend([67.0, 15.0, 4.5, 4.5, 4.5, 2.5, 2.0])
    expected = blend.locate(np.arange(3000))
    numbers = np.random.default_rng(0).permutation(3000)
    again = Blend([0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02])  # only ratios matter
    assert np.array_equal(again.locate(numbers), expected[:, numbers])
    assert all(np.array_equal(again.locate(numbers[i : i + 1]), expected[:, numbers[i : i + 1]]) for i in range(50))
    assert blend.counts(1000) == [670, 150, 45, 45, 45, 25, 20]
    assert blend.counts(200 * 10**9)[0] == 134 * 10**9
    check(blend, 683_593_750, 500)  # 1.4T tokens of 2048


def test_weights_are_taken_as_they_are_written() -> None:
    assert Blend([0.1, 0.2]).parts == (1, 2)
    assert Blend([3]).locate(np.array([12345])).tolist() == [[0], [12345]]
    parts = Blend([1 / 3, 1]).parts
    assert Fraction(parts[0], parts[1]) == Fraction("0.3333333333333333")


@pytest.mark.parametrize("weights, text", [
    ([1.0, 0.0], r"the weights of the data sources are \[1.0, 0.0\]; every weight must be positive"),
    ([], "every weight must be positive"),
    ([1e6, 1.0], "weight 1.0 of 1000001.0 in all, less than 1 sample in 100,000; leave it out or raise its weight"),
])  # fmt: skip
def test_weights_that_mean_nothing(weights: list[float], text: str) -> None:
    with pytest.raises(DataError, match=text):
        Blend(weights)
