"""Boxes: rectangles of global tensors, the one idea behind sharding, saving and resharding.

Whatever a rank holds of a tensor is a *box* in global coordinates.  A flat range of a box (a
distributed-optimizer shard) is at most ``2 * ndim - 1`` boxes, and a box of a row-major file is a
list of byte runs, so loading under any other layout is reading other runs of the same file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, order=True)
class Box:
    """The half-open rectangle [start, stop) of the global tensor named `key`."""

    key: str
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, key: str, shape: tuple[int, ...]) -> Box:
        """The box that is all of a tensor."""
        return cls(key, (0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Its edge lengths."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        """How many elements it holds."""
        return prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """The common rectangle, or None where there is none."""
        if self.key != other.key:
            return None
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(self.key, start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Slices that select this box from an array holding `outer`."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, outer.start, strict=True))

    def rows(self, first: int, last: int) -> Box:
        """Rows first..last-1 of this box (relative to it), as a box."""
        return Box(
            self.key,
            (self.start[0] + first, *self.start[1:]),
            (self.start[0] + last, *self.stop[1:]),
        )


def boxes_of_range(local: Box, start: int, stop: int) -> Iterator[Box]:
    """The elements start..stop-1 of `local` flattened row by row, as boxes, in order."""
    if start >= stop:
        return
    if len(local.shape) == 1:
        yield local.rows(start, stop)
        return
    row = prod(local.shape[1:])

    def partial(index: int, a: int, b: int) -> Iterator[Box]:
        inner = Box(local.key, local.start[1:], local.stop[1:])
        for box in boxes_of_range(inner, a, b):
            at = local.start[0] + index
            yield Box(local.key, (at, *box.start), (at + 1, *box.stop))

    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if first == last:
        yield from partial(first, head, tail)
        return
    if head:
        yield from partial(first, head, row)
        first += 1
    if first < last:
        yield local.rows(first, last)
    if tail:
        yield from partial(last, 0, tail)


def runs(box: Box, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The runs (first element, count) of `box` in a row-major tensor of `shape`, merged where they touch."""
    inner = 1
    axis = len(shape)
    while axis > 0 and (axis == len(shape) or box.shape[axis] == shape[axis]):
        axis -= 1
        inner *= box.shape[axis]
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    base = sum(a * s for a, s in zip(box.start, strides, strict=True))

    def walk(level: int, offset: int) -> Iterator[tuple[int, int]]:
        if level == axis:
            yield offset, inner
            return
        for i in range(box.shape[level]):
            yield from walk(level + 1, offset + i * strides[level])

    if box.numel:
        yield from walk(0, base)
