"""Rectangles of global tensors against numpy."""

from __future__ import annotations

from math import prod

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.plan.box import Box, boxes_of_range, runs


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    """A tensor's shape of 1 to 3 dimensions and a non-empty box of it."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    start = tuple(draw(st.integers(0, n - 1)) for n in shape)
    stop = tuple(draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
    return shape, Box("w", start, stop)


def cut(array: np.ndarray, box: Box) -> np.ndarray:
    return array[tuple(map(slice, box.start, box.stop))]


@given(boxes(), st.data())
@settings(max_examples=100, deadline=None)
def test_range_of_a_box(case: tuple[tuple[int, ...], Box], data: st.DataObject) -> None:
    shape, local = case
    a, b = sorted((data.draw(st.integers(0, local.numel)), data.draw(st.integers(0, local.numel))))
    whole = np.arange(prod(shape)).reshape(shape)
    got = list(boxes_of_range(local, a, b))
    parts = [cut(whole, box).reshape(-1) for box in got]
    assert np.array_equal(np.concatenate([np.empty(0, int), *parts]), cut(whole, local).reshape(-1)[a:b])
    assert len(got) <= 2 * len(shape) - 1


@given(boxes())
@settings(max_examples=100, deadline=None)
def test_runs_of_a_box(case: tuple[tuple[int, ...], Box]) -> None:
    shape, box = case
    flat = np.arange(prod(shape))
    got = list(runs(box, shape))
    assert np.array_equal(np.concatenate([flat[a : a + n] for a, n in got]), cut(flat.reshape(shape), box).reshape(-1))
    assert all(a + n < b for (a, n), (b, _) in zip(got, got[1:], strict=False))  # as few runs as possible


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Slices that select `box` from an array holding `outer`."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(box.start, box.stop, outer.start, strict=True))


def intersect(one: Box, two: Box) -> Box | None:
    """What two boxes of a tensor have in common."""
    start, stop = tuple(map(max, one.start, two.start)), tuple(map(min, one.stop, two.stop))
    return Box(one.key, start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None


@given(boxes(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_box_within_another(case: tuple[tuple[int, ...], Box], data: st.DataObject) -> None:
    shape, one = case
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    two = Box("w", start, tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True)))
    whole = np.arange(prod(shape)).reshape(shape)
    common = set(cut(whole, one).flat) & set(cut(whole, two).flat)
    box = intersect(one, two)
    assert (set(cut(whole, box).flat) if box else set()) == common
    if box:
        assert np.array_equal(cut(whole, one)[within(box, one)], cut(whole, box))


def test_rows_and_whole() -> None:
    box = Box("w", (4, 1), (8, 3))
    assert box.rows(1, 3) == Box("w", (5, 1), (7, 3)) and box.shape == (4, 2) and box.numel == 8
    assert Box.whole("w", (2, 3)) == Box("w", (0, 0), (2, 3))
    assert list(runs(Box.whole("w", (2, 3)), (2, 3))) == [(0, 6)]
    assert list(runs(Box("w", (1, 0), (3, 3)), (4, 3))) == [(3, 6)]
    assert list(runs(Box("w", (0, 1), (2, 2)), (2, 3))) == [(1, 1), (4, 1)]
    assert list(runs(Box("w", (1,), (1,)), (3,))) == []


def test_reshard_any_to_any() -> None:
    """What (3 row cuts x 4 flat ranges) wrote, (2 column cuts x 5 flat ranges) reads."""
    whole = np.random.default_rng(0).normal(size=(12, 10))

    def shards(cuts: int, dim: int, ranges: int) -> list[tuple[Box, int, int]]:
        out = []
        for t in range(cuts):
            start, stop = [0, 0], list(whole.shape)
            n = whole.shape[dim] // cuts
            start[dim], stop[dim] = t * n, (t + 1) * n
            local = Box("w", tuple(start), tuple(stop))
            per = -(-local.numel // ranges)
            out += [(local, d * per, min(local.numel, (d + 1) * per)) for d in range(ranges)]
        return out

    disk = {box: cut(whole, box) for local, a, b in shards(3, 0, 4) for box in boxes_of_range(local, a, b)}
    for local, a, b in shards(2, 1, 5):
        read = []
        for want in boxes_of_range(local, a, b):
            buffer = np.full(want.shape, np.nan)
            for have, values in disk.items():
                if common := intersect(want, have):
                    buffer[within(common, want)] = values[within(common, have)]
            read.append(buffer.reshape(-1))
        assert np.array_equal(np.concatenate(read), cut(whole, local).reshape(-1)[a:b])
