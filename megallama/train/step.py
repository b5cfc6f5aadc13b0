"""One training step and one evaluation: what happens between two batches, in order.

forward and backward of all micro-batches   (the pipeline interpreter; gradients reduce under it)
complete the gradient reduction
one small reduction over all ranks: loss, squared gradient norm, finite everywhere?, signals, failures
decide: skip, or clip and AdamW on the shards, then gather the weights under the next forward
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megallama.layers.batch import MicroBatch
from megallama.plan.schedule import Schedule
from megallama.train.assemble import Worker
from megallama.train.signals import SIGNALS
from megallama.train.timers import Timers


@dataclass(frozen=True)
class RankStatus:
    """What one rank wants all ranks to know."""

    received: signal.Signals | None = None
    late: bool = False  # `train.stop_after_minutes` is over
    failed: bool = False  # it cannot go on, and brings zeros until all ranks know

    def counts(self) -> dict[str, float]:
        """Numbers of ranks, for this one 0 or 1; `consensus` sets that of `bad_ranks`."""
        signals = {number.name: float(number == self.received) for number in SIGNALS}
        return {"bad_ranks": 0.0, "late_ranks": float(self.late), "failed_ranks": float(self.failed), **signals}


@dataclass(frozen=True)
class StepConsensus:
    """What all ranks know of a step, or of a batch of an evaluation, and the same on all of them.

    sums: over the ranks, by name: `loss` (of tokens) and `norm_squared`, both nan where any rank saw something
    non-finite; `RankStatus.counts`; whatever else `rank_numbers` has.
    """

    sums: Mapping[str, float]
    tokens: int = 1  # counted tokens of the global batch
    loss_scale: float = 1.0

    @property
    def failed(self) -> bool:
        """A rank cannot go on: nothing was changed, and the step does not count."""
        return self.sums["failed_ranks"] > 0

    @property
    def applied(self) -> bool:
        """The optimizer runs. False: not finite on some rank, or one cannot go on."""
        return not (self.sums["bad_ranks"] or self.failed)

    @property
    def loss(self) -> float:
        """Mean over the counted tokens of the global batch [nats]."""
        return self.sums["loss"] / self.tokens

    @property
    def grad_norm(self) -> float:
        """Of the global gradient, before clipping."""
        return math.sqrt(self.sums["norm_squared"]) / self.loss_scale

    @property
    def metrics(self) -> dict[str, float]:
        """Its scalars, by their names in metrics.jsonl."""
        own = {"loss", "norm_squared", *RankStatus().counts()}
        more = {name: value for name, value in self.sums.items() if name not in own}
        return {"loss": self.loss, "grad_norm": self.grad_norm, **more}

    @property
    def stop_reason(self) -> str | None:
        """Why all ranks save and leave after this step, in words; None to go on."""
        for number in SIGNALS:
            if count := round(self.sums[number.name]):
                return f"{number.name} on {count} rank{'s' if count > 1 else ''}"
        return "train.stop_after_minutes is over" if self.sums["late_ranks"] else None


def count_tokens(worker: Worker, batches: Sequence[MicroBatch], *, masked: bool) -> int:
    """Tokens of the global batch whose loss counts: the divisor of loss and gradient.

    masked: whether any rank may leave tokens out, which all ranks must answer in the same way.
    """
    assert masked or all(b.mask is None for b in batches), "masked tokens that the other ranks do not know of"
    counted = sum(b.num_counted for b in batches)
    if not masked:
        return counted * worker.groups.dp.size
    total = torch.tensor([counted], dtype=torch.int64, device=worker.device)
    worker.groups.dp.all_reduce(total).wait()
    return max(int(total), 1)  # documents of one token predict nothing


def train_step(
    worker: Worker,
    schedule: Schedule,
    batches: Sequence[MicroBatch],
    lr: float,
    loss_scale: float = 1.0,
    timers: Timers | None = None,
    masked: bool = False,
    status: Callable[[], RankStatus] = RankStatus,
) -> StepConsensus:
    """Train on this rank's micro-batches; `masked`: some of them, on any rank, may have masks.

    `status` is asked as late as possible.  Where the loss or the gradient is not finite on any rank, or one has failed
    and brings zeros for its batches, no rank changes anything.
    """
    timers = timers or Timers()
    tokens = count_tokens(worker, batches, masked=masked)
    worker.optimizer.start_step()
    with timers.phase("forward_backward"):
        loss_sum = worker.runtime.run(schedule, [replace(b, grad_scale=loss_scale / tokens) for b in batches])
    with timers.phase("grad_sync"):
        squares = worker.optimizer.reduce()
    with timers.phase("agree"):
        result = consensus(worker, rank_numbers(worker, loss_sum, squares), status(), tokens, loss_scale)
    if result.applied:
        clip = worker.plan.config.optimizer.clip_grad
        factor = min(1.0, clip / (result.grad_norm + 1e-6)) if clip > 0 else 1.0
        with timers.phase("optimizer"):
            worker.optimizer.compute(lr, factor / loss_scale)
            worker.optimizer.gather()
    return result


def rank_numbers(worker: Worker, loss_sum: Tensor, squares: Tensor) -> dict[str, Tensor]:
    """This rank's addends, numbers on its device; more of them would stand in metrics.jsonl.

    `TAGS` (metrics.py) names those that TensorBoard and wandb get.
    """
    return {"loss": loss_sum if worker.counts_loss else torch.zeros_like(loss_sum), "norm_squared": squares}


def consensus(
    worker: Worker, numbers: Mapping[str, Tensor], status: RankStatus, tokens: int = 1, loss_scale: float = 1.0
) -> StepConsensus:
    """The sum over all ranks of what each knows; the step's only wait for the device."""
    loss, squares = numbers["loss"], numbers["norm_squared"]
    finite = loss.isfinite() & squares.isfinite()
    in_order = dict.fromkeys(("loss", "norm_squared"), 0.0) | status.counts()  # then others
    values: dict[str, Tensor | float] = {**in_order, **numbers}
    values |= {"loss": loss.where(finite, 0.0), "norm_squared": squares.where(finite, 0.0), "bad_ranks": ~finite}
    packed = squares.new_zeros(len(values))
    for place, value in enumerate(values.values()):
        if isinstance(value, Tensor):
            packed[place].copy_(value)
        elif value:
            packed[place].fill_(value)
    worker.groups.world.all_reduce(packed).wait()
    sums = dict(zip(values, worker.read(packed), strict=True))
    if sums["bad_ranks"]:
        sums["loss"] = sums["norm_squared"] = math.nan
    return StepConsensus(sums, tokens, loss_scale)


def ask_all(worker: Worker, status: RankStatus) -> StepConsensus:
    """What all ranks want one another to know, without a step."""
    nothing = torch.zeros((), dtype=torch.float64, device=worker.device)
    return consensus(worker, {"loss": nothing, "norm_squared": nothing}, status)


def evaluate_step(
    worker: Worker, schedule: Schedule, batches: Sequence[MicroBatch], status: Callable[[], RankStatus] = RankStatus
) -> StepConsensus:
    """The loss of one global batch; nothing is changed."""
    tokens = count_tokens(worker, batches, masked=True)
    with torch.no_grad():
        loss_sum = worker.runtime.run(schedule, batches)
    return consensus(worker, rank_numbers(worker, loss_sum, torch.zeros_like(loss_sum)), status(), tokens)
