"""Sample order: a bijection for every size, a pure function of (seed, i, size), another order each epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.errors import DataError
from megallama.data.indexed import IndexedDataset
from megallama.data.samples import Permutation, Source, Synthetic
from megallama.data.writer import IndexedWriter, dtype_for


@pytest.fixture
def dataset(tmp_path: Path) -> IndexedDataset:
    """1003 tokens, token i is i: 100 sequences of 10 + 1 and two tokens that fill no sequence."""
    with IndexedWriter(tmp_path / "a", dtype_for(2000)) as writer:
        writer.add(np.arange(1003), np.array([500, 503]))
    return IndexedDataset(tmp_path / "a")


def mixed(x: int) -> int:
    """MurmurHash3's 64-bit finalizer."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ x >> 33) * factor % 2**64
    return x ^ x >> 33


def one_by_one(order: Permutation, i: int) -> int:
    """Where position i goes, in Python's integers: the definition that never changes."""
    keys = order._keys
    while True:
        left, right = divmod(i, order._right)
        for k in range(0, len(keys), 2):
            left = (left + mixed((right + keys[k]) % 2**64)) % order._left
            right = (right + mixed((left + keys[k + 1]) % 2**64)) % order._right
        i = left * order._right + right
        if i < order.size:
            return i


def test_every_small_size_is_permuted() -> None:
    for size in range(1, 400):
        assert sorted(Permutation(size, 7, 0)(np.arange(size)).tolist()) == list(range(size))


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 20_000), seed=st.integers(0, 2**80), epoch=st.integers(0, 2**40))
def test_any_size_is_permuted(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(Permutation(size, seed, epoch)(np.arange(size))), np.arange(size))


@settings(deadline=None)
@given(size=st.integers(10**9, 2**60), seed=st.integers(0, 2**63), i=st.integers(0, 10**9 - 100))
def test_huge_sizes_are_permuted_without_arrays(size: int, seed: int, i: int) -> None:
    order = Permutation(size, seed, 0)
    found = order(np.arange(i, i + 100)).tolist()
    assert len(set(found)) == 100 and 0 <= min(found) and max(found) < size


SIZES = [2**k + d for k in (1, 5, 10, 16, 20, 31, 32, 40, 52, 62) for d in (-1, 0, 1)]
PRIMES = [2, 3, 4093, 65537, 1_000_003, 4_294_967_291, 1_099_511_627_791, 2**61 - 1]


def inverse(order: Permutation, j: int) -> int:
    """The position that goes to j: the network backwards, out of range as often as the way there was."""
    while True:
        left, right = divmod(j, order._right)
        for k in reversed(range(0, len(order._keys), 2)):
            right = (right - mixed((left + order._keys[k + 1]) % 2**64)) % order._right
            left = (left - mixed((right + order._keys[k]) % 2**64)) % order._left
        j = left * order._right + right
        if j < order.size:
            return j


@settings(deadline=None, max_examples=200)
@given(size=st.sampled_from(SIZES + PRIMES) | st.integers(1, 2**62), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_every_size_has_an_inverse_and_is_the_definition(size: int, seed: int, data: st.DataObject) -> None:
    """A function with an inverse on its range is a bijection; sizes far beyond any array, primes, powers of two."""
    order = Permutation(size, seed, 3)
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=60))
    found = order(np.array(positions)).tolist()
    assert all(0 <= j < size for j in found) and [inverse(order, j) for j in found] == positions
    assert found == [one_by_one(order, i) for i in positions]


def test_the_order_is_well_mixed() -> None:
    n = 100_003
    order = np.array([Permutation(n, 3, e)(np.arange(n)) for e in (0, 1)])
    for a, b in ((order[0][:-1], order[0][1:]), (order[0], np.arange(n)), (order[0], order[1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.015  # 5 standard deviations of independent orders
    counts = np.zeros((7, 7))
    for epoch in range(4000):
        counts[np.arange(7), Permutation(7, 11, epoch)(np.arange(7))] += 1
    assert ((counts - 4000 / 7) ** 2 / (4000 / 7)).sum() < 80  # chi-squared with 36 degrees of freedom


def test_an_epoch_shows_every_window_once(dataset: IndexedDataset) -> None:
    source = Source(dataset, 10, seed=5)
    assert source.num_sequences == 100
    for epoch in (0, 1, 2):
        samples = source.read(range(100 * epoch, 100 * (epoch + 1))).tokens
        assert all(np.array_equal(s, np.arange(s[0], s[0] + 11)) for s in samples)
        assert sorted(int(s[0]) for s in samples) == list(range(0, 1000, 10))
    orders = [tuple(source.sequences(np.arange(100 * e, 100 * e + 100))) for e in range(4)]
    assert len(set(orders)) == 4


def test_a_sample_depends_on_seed_number_and_size_alone(dataset: IndexedDataset) -> None:
    forwards = Source(dataset, 10, seed=5).sequences(np.arange(250)).tolist()
    source = Source(dataset, 10, seed=5)
    assert [int(source.sequences(np.array([i]))[0]) for i in reversed(range(250))] == forwards[::-1]
    assert forwards != Source(dataset, 10, seed=6).sequences(np.arange(250)).tolist()
    assert forwards[:5] + forwards[100:105] == [62, 67, 28, 93, 20, 60, 85, 91, 44, 48]  # never changes


def test_validation_goes_in_file_order(dataset: IndexedDataset) -> None:
    source = Source(dataset, 10, seed=5, shuffle=False)
    assert source.read(range(100)).tokens[:, 0].tolist() == list(range(0, 1000, 10))


def test_document_ranges_share_no_token(tmp_path: Path) -> None:
    """Train on (0, 0.9), validate on (0.9, 1): together every document, no token in both."""
    lengths = np.random.default_rng(3).integers(0, 40, 211)
    with IndexedWriter(tmp_path / "a", dtype_for(10**6)) as writer:
        writer.add(np.arange(lengths.sum()), lengths)
    dataset = IndexedDataset(tmp_path / "a")
    ranges = [(0.0, 0.9), (0.9, 1.0), (0.0, 0.07), (0.07, 0.5), (0.5, 1.0)]
    sources = [Source(dataset, 8, 5, documents=part) for part in ranges]
    seen = [set(np.unique(s.read(np.arange(s.num_sequences)).tokens).tolist()) for s in sources]
    assert [(s.first, s.num_documents) for s in sources] == [(0, 189), (189, 22), (0, 14), (14, 91), (105, 106)]
    assert max(seen[0]) < lengths[:189].sum() <= min(seen[1])
    for groups in (seen[:2], seen[2:]):
        assert sum(map(len, groups)) == len(set().union(*groups)) > lengths.sum() - 8 * len(groups)
    assert [s.num_tokens for s in sources[:2]] == [lengths[:189].sum(), lengths[189:].sum()]
    with pytest.raises(DataError, match=r"a holds \d+ tokens between the shares 0 and 0.01, fewer than one sample of"):
        Source(dataset, 400, 5, documents=(0.0, 0.01))


def test_a_corpus_of_one_window(dataset: IndexedDataset) -> None:
    assert Source(dataset, 1002, 0).read([3]).tokens.tolist() == [list(range(1003))]
    with pytest.raises(DataError, match=r"a holds 1003 tokens, fewer than one .* = 1004; use .* of 1002 or less"):
        Source(dataset, 1003, 0)


def test_synthetic_tokens_are_a_function_of_seed_and_number() -> None:
    one, two = Synthetic(50, 1000, seed=1), Synthetic(50, 1000, seed=2)
    tokens = one.read([3, 7, 8]).tokens
    assert np.array_equal(tokens[1:2], Synthetic(50, 1000, seed=1).read([7]).tokens) and tokens.shape == (3, 1001)
    assert not np.array_equal(tokens[1], tokens[2]) and not np.array_equal(tokens[1], two.read([7]).tokens[0])
    assert (tokens.min(), tokens.max(), tokens.dtype) == (0, 49, np.int64)
