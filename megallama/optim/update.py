"""The sharded optimizer's step in three phases: reduce gradients, compute shards, gather weights.

Each rank of dp_cp holds fp32 master weights and a rule's state of its shard of every bucket (ZeRO-1,
Rajbhandari et al. 2020), updates them from the reduce-scattered gradients, casts the result into its
range of the weights and all-gathers the bucket.  The gathers are awaited bucket by bucket when the
next forward first reads a weight.

Where weights are fp32 (or fp64) already, the masters are the weights themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megallama.comm.groups import Groups
from megallama.config.schema import OverlapConfig
from megallama.kernels.optimizer import SumOfSquares
from megallama.layers.param import FlatBuffers, Shard
from megallama.optim.grad_sync import GradSync
from megallama.plan.layout import Bucket

# of this rank's range of one bucket: weights, grads, master, the rule's moments; and step
Tensors = dict[str, Tensor]


class Rule(Protocol):
    """How one step changes elements, each by itself."""

    moments: tuple[str, ...]  # state beside the masters, of their shape; zero before the first step

    def __call__(self, shards: Sequence[Tensors], lr: float, scale: float, decay: bool) -> None:
        """In place: update "master" and the moments from "grads" times `scale`; count "step" up."""


class Update:
    """What one rank does to the weights of all its stages in a step."""

    def __init__(
        self,
        stages: Sequence[FlatBuffers],
        groups: Groups,
        overlap: OverlapConfig,
        rule: Rule,
        sum_of_squares: SumOfSquares,
    ) -> None:
        self.syncs = [GradSync(buffers, groups, overlap.grad_reduce) for buffers in stages]
        self._groups, self._rule, self._sum_of_squares = groups, rule, sum_of_squares
        self._overlap_gather = overlap.param_gather
        buckets = ((sync, bucket) for sync in self.syncs for bucket in sync.buffers.layout.buckets)
        self._held = [(sync, bucket, self._tensors(sync, bucket)) for sync, bucket in buckets]

    def _tensors(self, sync: GradSync, bucket: Bucket) -> Tensors:
        at = slice(*sync.range_of(bucket))
        weights, grads = sync.buffers.weights[at], sync.buffers.grads[at]
        master = weights if weights.dtype == grads.dtype else torch.zeros_like(grads)
        moments = {name: torch.zeros_like(grads) for name in self._rule.moments}
        step = torch.zeros((), dtype=torch.float32, device=grads.device)
        return {"weights": weights, "grads": grads, "master": master, **moments, "step": step}

    def start_step(self) -> None:
        """Begin to collect the gradients of a step."""
        for sync in self.syncs:
            sync.start_step()

    def reduce(self) -> Tensor:
        """Complete the gradients; the sum of squares of what this rank counts of them, float64.

        Summed over all ranks of the job it is the squared norm of the global gradient: elements
        that several ranks hold are counted by one.
        """
        for sync in self.syncs:
            sync.finish()
        self._sum_tied()
        counted = [run for sync, bucket, _ in self._held for run in self._counted(sync, bucket)]
        total = self._sum_of_squares(counted)
        return total.to(self.syncs[0].buffers.grads.device)

    def _sum_tied(self) -> None:
        """Both copies of a tied embedding, on two ranks or on one, get the sum of their gradients."""
        copies = [tensors["grads"] for _, bucket, tensors in self._held if bucket.tied]
        for copy in copies[1:]:
            copies[0].add_(copy)
        for copy in copies[:1]:
            self._groups.embedding.all_reduce(copy).wait()
        for copy in copies[1:]:
            copy.copy_(copies[0])

    def _counted(self, sync: GradSync, bucket: Bucket) -> list[Tensor]:
        ranges: list[list[int]] = []
        for segment in sync.segments(bucket):
            if not segment.part.owner:
                continue
            if ranges and ranges[-1][1] == segment.offset:
                ranges[-1][1] += segment.count
            else:
                ranges.append([segment.offset, segment.offset + segment.count])
        return [sync.buffers.grads[a:b] for a, b in ranges]

    def compute(self, lr: float, multiplier: float) -> None:
        """Apply the rule to this rank's shards; `multiplier` of gradients: clipping and loss scale."""
        self.wait()  # for what no forward has read: nothing is written that is being gathered
        for decay in (True, False):
            shards = [tensors for _, bucket, tensors in self._held if bucket.decay is decay]
            if shards:
                self._rule(shards, lr, multiplier, decay)

    def gather(self, *, overlap: bool = True) -> None:
        """Masters -> weights on every rank of dp_cp, in the order in which the forward reads them.

        With overlap.param_gather and `overlap` it returns at once: who reads a weight waits for it.
        """
        for sync in self.syncs:
            for bucket, tensors in reversed([(b, t) for s, b, t in self._held if s is sync]):
                if tensors["master"].data_ptr() != tensors["weights"].data_ptr():
                    tensors["weights"].copy_(tensors["master"])
                full = sync.buffers.weights[bucket.start : bucket.stop]
                gather = sync.buffers.gathers[bucket.index]
                gather.handle = self._groups.dp_cp.all_gather(full, tensors["weights"])
                if not (overlap and self._overlap_gather):
                    gather.wait()

    def wait(self) -> None:
        """Return when all weights are whole."""
        for sync in self.syncs:
            for gather in sync.buffers.gathers:
                gather.wait()

    def shards(self, owned_only: bool) -> list[Shard]:
        """What this rank holds of the state, as rectangles of the model's tensors.

        `owned_only` leaves out copies that another rank counts: together the ranks then hold every
        element once.  The tensors are views: writing into them and calling `loaded` is how a
        checkpoint, or the initial weights, are put in.
        """
        names, out = ("master", *self._rule.moments), []
        for sync, bucket, tensors in self._held:
            start, _ = sync.range_of(bucket)
            for segment in sync.segments(bucket):
                if owned_only and not segment.part.owner:
                    continue
                at = segment.offset - start
                for box in segment.boxes():
                    rows = slice(at, at + box.numel)
                    out.append(Shard(box, {name: tensors[name][rows] for name in names}))
                    at += box.numel
        return out

    def loaded(self, steps: int) -> None:
        """The shards have been written; `steps` optimizer steps lie behind them."""
        for *_, tensors in self._held:
            tensors["step"].fill_(steps)
        self.gather(overlap=False)
