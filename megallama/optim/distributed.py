"""The distributed optimizer: AdamW states sharded over data-parallel ranks (ZeRO-1, Rajbhandari et al. 2020).

Each rank holds fp32 master weights and both moments of its shard of every bucket, updates them from
the reduce-scattered gradients, casts the result into its range of the weights and all-gathers the
bucket.  The gathers are awaited bucket by bucket when the next forward first reads a weight.

Where weights are fp32 (or fp64) already, the masters are the weights themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megallama.comm.groups import Groups
from megallama.config.schema import OptimizerConfig, OverlapConfig
from megallama.kernels.adam import AdamWStep
from megallama.kernels.grad_norm import SumOfSquares
from megallama.layers.param import FlatBuffers
from megallama.layers.shard import StateShard
from megallama.optim.grad_sync import GradSync
from megallama.plan.layout import Bucket


@dataclass
class ShardState:
    """What this rank optimizes of one bucket: 1-D tensors of the same length."""

    bucket: Bucket
    start: int  # range of the flat buffer
    stop: int
    weights: Tensor
    grads: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


class DistributedOptimizer:
    """AdamW over the shards of all stages of this rank."""

    def __init__(
        self,
        stages: Sequence[FlatBuffers],
        groups: Groups,
        config: OptimizerConfig,
        overlap: OverlapConfig,
        adamw: AdamWStep,
        sum_of_squares: SumOfSquares,
    ) -> None:
        self.syncs = [GradSync(buffers, groups, overlap.grad_reduce) for buffers in stages]
        self._groups = groups
        self._config = config
        self._adamw = adamw
        self._sum_of_squares = sum_of_squares
        self._overlap_gather = overlap.param_gather
        self._states = [(sync, self._states_of(sync.buffers)) for sync in self.syncs]

    def _states_of(self, buffers: FlatBuffers) -> list[ShardState]:
        out = []
        for bucket in buffers.layout.buckets:
            a, b = bucket.shard(self._groups.dp.size, self._groups.dp.rank)
            weights, grads = buffers.weights[a:b], buffers.grads[a:b]
            master = weights if weights.dtype == grads.dtype else torch.zeros_like(grads)
            moments = torch.zeros_like(grads), torch.zeros_like(grads)
            step = torch.zeros((), dtype=torch.float32, device=grads.device)
            out.append(ShardState(bucket, a, b, weights, grads, master, *moments, step))
        return out

    def start_step(self) -> None:
        """Begin to collect the gradients of a step."""
        for sync in self.syncs:
            sync.start_step()

    def finish_grads(self) -> Tensor:
        """Complete the gradients; the sum of squares of what this rank counts of them, float64.

        Summed over all ranks of the job it is the squared norm of the global gradient: elements that
        several ranks hold are counted by one.
        """
        for sync in self.syncs:
            sync.finish()
        self._sum_tied()
        counted = [
            run for sync, states in self._states for state in states for run in self._counted(sync.buffers, state)
        ]
        total = self._sum_of_squares(counted)
        return total.to(self.syncs[0].buffers.grads.device)

    def _sum_tied(self) -> None:
        """Give both copies of a tied embedding, on two ranks or on one, the sum of their gradients."""
        copies = [sync.shard(b) for sync in self.syncs for b in sync.buffers.layout.buckets if b.tied]
        for copy in copies[1:]:
            copies[0].add_(copy)
        for copy in copies[:1]:
            self._groups.embedding.all_reduce(copy).wait()
        for copy in copies[1:]:
            copy.copy_(copies[0])

    def _counted(self, buffers: FlatBuffers, state: ShardState) -> list[Tensor]:
        ranges: list[list[int]] = []
        for segment in buffers.layout.segments(state.start, state.stop):
            if not segment.part.owner:
                continue
            if ranges and ranges[-1][1] == segment.offset:
                ranges[-1][1] += segment.count
            else:
                ranges.append([segment.offset, segment.offset + segment.count])
        return [buffers.grads[a:b] for a, b in ranges]

    def step(self, lr: float, multiplier: float) -> None:
        """One AdamW step with gradients times `multiplier` (clipping and loss scale), then gather the weights."""
        self.wait()  # the forward has waited for what it read; nothing may be written that is being gathered
        for decay in (True, False):
            states = [s for _, all_states in self._states for s in all_states if s.bucket.decay is decay]
            if not states:
                continue
            first = states[0].grads
            divisor = (
                None if multiplier == 1.0 else torch.full((), 1 / multiplier, dtype=first.dtype, device=first.device)
            )
            self._adamw(
                [s.master for s in states], [s.grads for s in states],
                [s.exp_avg for s in states], [s.exp_avg_sq for s in states], [s.step for s in states],
                self._config, lr, self._config.weight_decay if decay else 0.0, divisor,
            )  # fmt: skip
        self._publish(self._overlap_gather)

    def _publish(self, overlap: bool) -> None:
        """Masters -> weights on every data-parallel rank, in the order in which the forward reads them."""
        for sync, states in self._states:
            for state in reversed(states):
                if state.master.data_ptr() != state.weights.data_ptr():
                    state.weights.copy_(state.master)
                bucket = state.bucket
                full = sync.buffers.weights[bucket.start : bucket.stop]
                gather = sync.buffers.gathers[bucket.index]
                gather.start(self._groups.dp.all_gather(full, state.weights))
                if not overlap:
                    gather.wait()

    def wait(self) -> None:
        """Return when all weights are whole."""
        for sync in self.syncs:
            for gather in sync.buffers.gathers:
                gather.wait()

    def shards(self, owned_only: bool) -> list[StateShard]:
        """What this rank holds of the state, as rectangles of the model's tensors.

        `owned_only` leaves out copies that another rank counts: together the ranks then hold every
        element once.  The tensors are views: writing into them and calling `loaded` is how a
        checkpoint, or the initial weights, are put in.
        """
        out = []
        for sync, states in self._states:
            for state in states:
                for segment in sync.buffers.layout.segments(state.start, state.stop):
                    if owned_only and not segment.part.owner:
                        continue
                    at = segment.offset - state.start
                    for box in segment.boxes():
                        rows = slice(at, at + box.numel)
                        out.append(StateShard(box, state.master[rows], state.exp_avg[rows], state.exp_avg_sq[rows]))
                        at += box.numel
        return out

    def loaded(self, steps: int) -> None:
        """The shards have been written; `steps` optimizer steps lie behind them."""
        for _, states in self._states:
            for state in states:
                state.step.fill_(steps)
        self._publish(overlap=False)
