"""Gradient synchronisation of one stage: a reduce-scatter per bucket over dp_cp, under the backward.

During the last micro-batch of a step every parameter reports when its gradient is done, and a
bucket whose parameters have all reported is reduce-scattered at once.  Which
contributions are the last, the schedule says, so the order of the collectives is the same on every
rank.  What is summed over more than dp_cp is small and follows at the end: norm weights over tp
(under sequence parallelism), shared key/value heads over the ranks that hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megallama.comm.group import Handle
from megallama.comm.groups import Groups
from megallama.layers.param import FlatBuffers, Param
from megallama.plan.layout import Bucket, Segment


class GradSync:
    """Sums the main gradients of one stage; this rank's shards hold the result."""

    def __init__(self, buffers: FlatBuffers, groups: Groups, overlap: bool) -> None:
        self.buffers = buffers
        self._groups = groups
        self._overlap = overlap
        self._bucket_of = {p.spec.name: b for b in buffers.layout.buckets for p in b.params}
        self._pending: dict[int, int] = {}
        self._handles: dict[int, Handle] = {}
        self._padding = self._gaps()

    def start_step(self) -> None:
        """Nothing of this step has been reduced yet."""
        for param in self.buffers.params.values():
            param.overwrite = True
        self._pending = {b.index: sum(p.spec.uses for p in b.params) for b in self.buffers.layout.buckets}

    @contextmanager
    def last_microbatch(self) -> Iterator[None]:
        """Contributions in the ``with`` block are the last of their parameters."""
        for param in self.buffers.params.values():
            param.on_grad_done = self._grad_done
        yield
        for param in self.buffers.params.values():
            param.on_grad_done = None

    def finish(self) -> None:
        """Return when this rank's shards hold the sums over all ranks."""
        for bucket in self.buffers.layout.buckets:
            if bucket.index not in self._handles:
                self._reduce(bucket)
        for handle in self._handles.values():
            handle.wait()
        self._handles.clear()
        for gap in self._padding:  # a reduction may have left anything there
            gap.zero_()
        self._sum_copies()

    def range_of(self, bucket: Bucket) -> tuple[int, int]:
        """This rank's shard of a bucket, as a range of the flat buffers."""
        return bucket.shard(self._groups.dp_cp.size, self._groups.dp_cp.rank)

    def segments(self, bucket: Bucket) -> Iterator[Segment]:
        """What of the model lies in this rank's shard of a bucket."""
        return self.buffers.layout.segments(*self.range_of(bucket))

    def _grad_done(self, param: Param) -> None:
        bucket = self._bucket_of[param.spec.name]
        self._pending[bucket.index] -= 1
        assert self._pending[bucket.index] >= 0, f"{param.spec.name} contributed after its bucket was complete"
        if self._pending[bucket.index] == 0 and self._overlap:
            self._reduce(bucket)

    def _reduce(self, bucket: Bucket) -> None:
        full = self.buffers.grads[bucket.start : bucket.stop]
        shard = self.buffers.grads[slice(*self.range_of(bucket))]
        self._handles[bucket.index] = self._groups.dp_cp.reduce_scatter(shard, full)

    def _sum_copies(self) -> None:
        """All-reduce what several ranks hold, packed: it has one layout on every rank of the group."""
        held = [s for bucket in self.buffers.layout.buckets for s in self.segments(bucket)]
        for over, group in (("tp", self._groups.tp), ("kv", self._groups.kv)):
            chosen = [s for s in held if s.part.sum_over == over]
            if chosen and group.size > 1:
                views = [self.buffers.grads[s.offset : s.offset + s.count] for s in chosen]
                packed = torch.cat(views)
                group.all_reduce(packed).wait()
                for view, summed in zip(views, packed.split([s.count for s in chosen]), strict=True):
                    view.copy_(summed)

    def _gaps(self) -> list[Tensor]:
        """The ranges of this rank's shards that hold no element of the model."""
        gaps = []
        for bucket in self.buffers.layout.buckets:
            at, stop = self.range_of(bucket)
            for segment in self.segments(bucket):
                gaps.append(self.buffers.grads[at : segment.offset])
                at = segment.offset + segment.count
            gaps.append(self.buffers.grads[at:stop])
        return [gap for gap in gaps if gap.numel()]
