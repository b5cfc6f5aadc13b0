"""Boxes: rectangles of global tensors, the one idea behind sharding, saving and resharding.

A flat range of a box is at most ``2 * ndim - 1`` boxes, a box of a row-major file byte runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod


@dataclass(frozen=True, order=True)
class Box:
    """The half-open rectangle [start, stop) of the global tensor named `key`."""

    key: str
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, key: str, shape: tuple[int, ...]) -> Box:
        return cls(key, (0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def rows(self, first: int, last: int) -> Box:
        """Rows first..last-1 of this box (relative to it), as a box."""
        at = self.start[0]
        return Box(self.key, (at + first, *self.start[1:]), (at + last, *self.stop[1:]))


def boxes_of_range(local: Box, start: int, stop: int) -> Iterator[Box]:
    """The elements start..stop-1 of `local` flattened row by row, as boxes, in order."""
    row = prod(local.shape[1:])
    while start < stop:
        index, head = divmod(start, row)
        if whole := 0 if head else (stop - start) // row:
            yield local.rows(index, index + whole)
            start += whole * row
            continue
        tail = min(stop - index * row, row)  # of this one row
        inner, at = Box(local.key, local.start[1:], local.stop[1:]), local.start[0] + index
        for box in boxes_of_range(inner, head, tail):
            yield Box(local.key, (at, *box.start), (at + 1, *box.stop))
        start = index * row + tail


def runs(box: Box, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Runs (first element, count) of `box` in a row-major tensor of `shape`, merged."""
    inner, axis = 1, len(shape)
    while axis > 0 and (axis == len(shape) or box.shape[axis] == shape[axis]):
        axis -= 1
        inner *= box.shape[axis]
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    for outer in product(*map(range, box.start[:axis], box.stop[:axis])) if box.numel else ():
        yield sum(a * s for a, s in zip((*outer, *box.start[axis:]), strides, strict=True)), inner
