"""Flat buffers: where every parameter lies, in which bucket, and who optimizes which range.

The parameters of one stage lie in one flat buffer, cut into *buckets*, and so do their gradients.  A bucket is what
one reduce-scatter or all-gather moves; of the dp_cp ranks with the same weights, rank r owns its r-th equal range, its
*shard*: there it holds master weights and AdamW moments (ZeRO-1, Rajbhandari et al. 2020).

Parameters lie in the order in which the backward pass finishes them, so buckets fill one after the other.  A bucket
holds only decayed matrices, only norm weights, or only the tied embedding (the same on the first and the last stage).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megallama.plan.box import Box, boxes_of_range
from megallama.plan.params import ParamSpec, Part

ALIGN = 128  # elements; every parameter starts at a multiple, so its rows are aligned for vector loads


@dataclass(frozen=True)
class Placement:
    """A parameter and its first element in the flat buffer."""

    spec: ParamSpec
    offset: int


@dataclass(frozen=True)
class Bucket:
    """Elements start..stop-1 of the flat buffer; stop - start is a multiple of dp_cp."""

    index: int
    start: int
    stop: int
    params: tuple[Placement, ...]
    decay: bool
    tied: bool

    def shard(self, dp_cp: int, rank: int) -> tuple[int, int]:
        """The range of the flat buffer that rank `rank` of dp_cp optimizes."""
        per = (self.stop - self.start) // dp_cp
        return self.start + rank * per, self.start + (rank + 1) * per


@dataclass(frozen=True)
class Segment:
    """`count` elements at `offset` of the flat buffer are the flat range from `first` of `part.box`."""

    offset: int
    count: int
    part: Part
    first: int

    def boxes(self) -> Iterator[Box]:
        """The same elements as rectangles of the global tensor, in order."""
        return boxes_of_range(self.part.box, self.first, self.first + self.count)


@dataclass(frozen=True)
class BufferLayout:
    """The flat buffer of one stage."""

    buckets: tuple[Bucket, ...]
    numel: int

    def segments(self, start: int, stop: int) -> Iterator[Segment]:
        """What lies in elements start..stop-1 of the buffer; padding lies in no segment."""
        for bucket in self.buckets:
            for placement in bucket.params if start < bucket.stop and bucket.start < stop else ():
                row = placement.spec.numel // placement.spec.shape[0]
                for part in placement.spec.parts:
                    first = placement.offset + part.row * row
                    a, b = max(first, start), min(first + part.box.numel, stop)
                    if a < b:
                        yield Segment(a, b - a, part, a - first)


def build_layout(specs: Sequence[ParamSpec], dp_cp: int, bucket_elements: int) -> BufferLayout:
    """Place the parameters of one stage, given in forward order; a bucket ends once it holds `bucket_elements`."""
    backward = list(reversed(specs))
    groups: list[list[ParamSpec]] = [[]]
    for spec in (s for s in backward if s.decay and not s.tied):
        groups[-1].append(spec)
        if sum(s.numel for s in groups[-1]) >= bucket_elements:
            groups.append([])
    groups += [[s for s in backward if s.tied], [s for s in backward if not s.decay]]
    buckets: list[Bucket] = []
    at = 0
    for group in filter(None, groups):
        start, placed = at, []
        for spec in group:
            placed.append(Placement(spec, at))
            at += _round_up(spec.numel, ALIGN)
        at = start + _round_up(at - start, dp_cp * ALIGN)
        buckets.append(Bucket(len(buckets), start, at, tuple(placed), group[0].decay, group[0].tied))
    return BufferLayout(tuple(buckets), at)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
