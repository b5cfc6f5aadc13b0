"""Sample order: a bijection for every size, a pure function of (seed, i, size), another order each epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.data.errors import DataError
from megallama.data.indexed import IndexedDataset, IndexedWriter, dtype_for
from megallama.data.samples import Permutation, Source, Synthetic


@pytest.fixture
def dataset(tmp_path: Path) -> IndexedDataset:
    """1003 tokens, token i is i: 100 windows of 10 + 1 and two tokens that fill no window."""
    with IndexedWriter(tmp_path / "a", dtype_for(2000)) as writer:
        writer.add(np.arange(1003), np.array([500, 503]))
    return IndexedDataset(tmp_path / "a")


def test_every_small_size_is_permuted() -> None:
    for size in range(1, 400):
        order = Permutation(size, 7, 0)
        assert sorted(order(i) for i in range(size)) == list(range(size))


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 20_000), seed=st.integers(0, 2**80), epoch=st.integers(0, 2**40))
def test_any_size_is_permuted(size: int, seed: int, epoch: int) -> None:
    order = Permutation(size, seed, epoch)
    assert len({order(i) for i in range(size)}) == size and max(order(i) for i in range(size)) == size - 1


@settings(deadline=None)
@given(size=st.integers(10**9, 2**60), seed=st.integers(0, 2**63), i=st.integers(0, 10**9 - 100))
def test_huge_sizes_are_permuted_without_arrays(size: int, seed: int, i: int) -> None:
    order = Permutation(size, seed, 0)
    found = [order(j) for j in range(i, i + 100)]
    assert len(set(found)) == 100 and 0 <= min(found) and max(found) < size


def test_the_order_is_well_mixed() -> None:
    n = 100_003
    order = np.array([Permutation(n, 3, e)(i) for e in (0, 1) for i in range(n)]).reshape(2, n)
    for a, b in ((order[0][:-1], order[0][1:]), (order[0], np.arange(n)), (order[0], order[1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.015  # 5 standard deviations of independent orders
    counts = np.zeros((7, 7))
    for epoch in range(4000):
        permutation = Permutation(7, 11, epoch)
        for i in range(7):
            counts[i, permutation(i)] += 1
    assert ((counts - 4000 / 7) ** 2 / (4000 / 7)).sum() < 80  # chi-squared with 36 degrees of freedom


def test_an_epoch_shows_every_window_once(dataset: IndexedDataset) -> None:
    source = Source(dataset, 10, seed=5)
    assert source.num_windows == 100
    for epoch in (0, 1, 2):
        samples = [source.sample(i) for i in range(100 * epoch, 100 * (epoch + 1))]
        assert all(s.dtype == np.int64 and np.array_equal(s, np.arange(s[0], s[0] + 11)) for s in samples)
        assert sorted(int(s[0]) for s in samples) == list(range(0, 1000, 10))
        assert {source.epoch_of(i) for i in range(100 * epoch, 100 * (epoch + 1))} == {epoch}
    orders = [tuple(source.window_of(100 * e + i) for i in range(100)) for e in range(4)]
    assert len(set(orders)) == 4


def test_a_sample_depends_on_seed_number_and_size_alone(dataset: IndexedDataset) -> None:
    forwards = [Source(dataset, 10, seed=5).window_of(i) for i in range(250)]
    source = Source(dataset, 10, seed=5)
    assert [source.window_of(i) for i in reversed(range(250))] == forwards[::-1]
    assert forwards != [Source(dataset, 10, seed=6).window_of(i) for i in range(250)]
    assert forwards[:5] + forwards[100:105] == [62, 67, 28, 93, 20, 60, 85, 91, 44, 48]  # never changes


def test_validation_goes_in_file_order(dataset: IndexedDataset) -> None:
    source = Source(dataset, 10, seed=5, shuffle=False)
    assert [int(source.sample(i)[0]) for i in range(100)] == list(range(0, 1000, 10))


def test_a_corpus_of_one_window(dataset: IndexedDataset) -> None:
    assert Source(dataset, 1002, 0).sample(3).tolist() == list(range(1003))
    with pytest.raises(DataError, match=r"a holds 1003 tokens, fewer than one .* = 1004; use .* of 1002 or less"):
        Source(dataset, 1003, 0)


def test_synthetic_tokens_are_a_function_of_seed_and_number() -> None:
    one, two = Synthetic(50, 1000, seed=1), Synthetic(50, 1000, seed=2)
    assert np.array_equal(one.sample(7), Synthetic(50, 1000, seed=1).sample(7)) and one.sample(7).shape == (1001,)
    assert not np.array_equal(one.sample(7), one.sample(8)) and not np.array_equal(one.sample(7), two.sample(7))
    assert (one.sample(3).min(), one.sample(3).max(), one.sample(3).dtype) == (0, 49, np.int64)
