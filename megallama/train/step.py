"""One training step, and an evaluation: what happens between two batches, in order.

forward and backward of all micro-batches   (the pipeline interpreter; gradients reduce under it)
complete the gradient reduction
one small reduction over all ranks: loss, squared gradient norm, finite everywhere?, signals, failures
decide: skip, or clip and AdamW on the shards, then gather the weights under the next forward
"""

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megallama.config.errors import MegallamaError
from megallama.data.loader import Loader
from megallama.data.samples import Source
from megallama.layers.batch import MicroBatch
from megallama.pipeline.runtime import end_alike
from megallama.plan.schedule import Schedule
from megallama.train.assemble import Worker
from megallama.train.metrics import Record
from megallama.train.signals import SIGNALS
from megallama.train.speed import Timers


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


class StepConsensus:
    """What all ranks know of a step, or of a batch of an evaluation of `tokens` counted tokens.

    sums: over ranks, by name: `loss`, `norm_squared` (nan if any is not finite), `RankStatus.counts`, `rank_numbers`.
    """

    def __init__(self, sums: Mapping[str, float], tokens: int = 1, loss_scale: float = 1.0) -> None:
        self.sums, self.tokens = sums, tokens
        self.loss = sums["loss"] / tokens  # mean over the counted tokens of the global batch [nats]
        self.grad_norm = math.sqrt(sums["norm_squared"]) / loss_scale  # of all, before clipping
        self.finite = not sums["bad_ranks"]
        self.failed = sums["failed_ranks"] > 0  # a rank cannot go on: the step does not count
        self.applied = self.finite and not self.failed  # the optimizer runs

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


def count_tokens(worker: Worker, batches: Sequence[MicroBatch], *, masked: bool, of: int = 0) -> int:
    """Tokens of a global batch of `of` micro-batches whose loss counts.

    masked: any rank may leave some out, or have samples of other lengths.
    """
    known = all(b.mask is None and b.num_counted == batches[0].num_counted for b in batches)
    assert masked or known, "masks or lengths that the other ranks do not know of"
    counted = sum(b.num_counted for b in batches)
    if not masked:
        return counted // len(batches) * of * worker.groups.cp.size
    total = torch.tensor([counted], dtype=torch.int64, device=worker.device)
    worker.groups.dp_cp.all_reduce(total).wait()
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
    refuses: Callable[[StepConsensus], bool] = lambda result: False,
    deal: Sequence[int] = (),
) -> StepConsensus:
    """Train on these micro-batches; if a rank has failed, not all is finite, or all refuse, nothing changes.

    status: asked for when the gradients are complete and the weights they are of still there.
    deal: micro-batches of each replica; left out, all have as many.
    """
    timers, groups = timers or Timers(), worker.groups
    deal = deal or [len(batches)] * groups.dp.size
    assert deal[groups.dp.rank] == len(batches), (deal, groups.dp.rank, len(batches))
    tokens = count_tokens(worker, batches, masked=masked, of=sum(deal))
    others = [worker.plan.schedule_for(count) for count in {*deal} - {len(batches)}]
    worker.optimizer.start_step(early=end_alike([schedule, *others], groups.pp.rank))
    with timers.phase("forward_backward"):
        loss_sum = worker.runtime.run(schedule, [replace(b, grad_scale=loss_scale / tokens) for b in batches])
    with timers.phase("grad_sync"):
        squares = worker.optimizer.reduce()
    with timers.phase("agree"):
        result = consensus(worker, rank_numbers(worker, loss_sum, squares), status(), tokens, loss_scale)
    result.applied = result.applied and not refuses(result)
    if result.applied:
        clip = worker.plan.config.optimizer.clip_grad
        factor = min(1.0, clip / (result.grad_norm + 1e-6)) if clip > 0 else 1.0
        with timers.phase("optimizer"):
            worker.optimizer.compute(lr, factor / loss_scale)
            worker.optimizer.gather()
    return result


def rank_numbers(worker: Worker, loss_sum: Tensor, squares: Tensor) -> dict[str, Tensor]:
    """This rank's addends; more would stand in metrics.jsonl, and be drawn if in its `TAGS`."""
    return {"loss": loss_sum if worker.counts_loss else torch.zeros_like(loss_sum), "norm_squared": squares}


def consensus(
    worker: Worker, numbers: Mapping[str, Tensor], status: RankStatus, tokens: int = 1, loss_scale: float = 1.0
) -> StepConsensus:
    """The sum of what all ranks know; in a step only this and `count_tokens` wait."""
    nothing = torch.zeros((), dtype=torch.float64, device=worker.device)
    loss, squares = (numbers.get(name, nothing) for name in ("loss", "norm_squared"))
    finite = loss.isfinite() & squares.isfinite()
    first = {"loss": loss, "norm_squared": squares}  # the bits of a sum may depend on its place
    values: dict[str, Tensor | float] = {**first, **status.counts(), **numbers, "bad_ranks": ~finite}
    packed = squares.new_zeros(len(values))
    for place, value in enumerate(values.values()):
        if isinstance(value, Tensor) or value:
            packed[place] = value
    worker.groups.world.all_reduce(packed).wait()
    sums = dict(zip(values, worker.read(packed), strict=True))
    if sums["bad_ranks"]:
        sums["loss"] = sums["norm_squared"] = math.nan
    return StepConsensus(sums, tokens, loss_scale)


def evaluate_step(
    worker: Worker, schedule: Schedule, batches: Sequence[MicroBatch], status: Callable[[], RankStatus] = RankStatus
) -> StepConsensus:
    """The loss of one global batch; nothing is changed."""
    tokens = count_tokens(worker, batches, masked=True)
    with torch.no_grad():
        loss_sum = worker.runtime.run(schedule, batches)
    return consensus(worker, rank_numbers(worker, loss_sum, torch.zeros_like(loss_sum)), status(), tokens)


class ByPosition:
    """Adds up losses by log2 of the tokens before; `sums`: nats, tokens, float64 [2, 40]."""

    def __init__(self, worker: Worker) -> None:
        self.sums = torch.zeros(2, 40, dtype=torch.float64, device=worker.device)
        self._share = worker.share

    def __call__(self, batch: MicroBatch, rows: slice, losses: Tensor) -> None:
        """Take the losses of these rows of a micro-batch."""
        chunks = self._share.chunks(batch.tokens.shape[1] * self._share.size)
        at = torch.cat([torch.arange(a, b, device=losses.device) for a, b in chunks]).expand_as(batch.tokens)
        at = batch.documents.positions if batch.documents else at
        power = torch.frexp(at.reshape(-1)[rows].double() + 1)[1].long()  # 2 ** (power - 1) <= tokens before
        both = torch.stack([losses.double(), torch.ones_like(losses, dtype=torch.float64)])
        both = both if batch.mask is None else both.where(batch.mask.reshape(-1)[rows], 0.0)
        self.sums.index_add_(1, power - 1, both)


def by_position(losses: Sequence[float], tokens: Sequence[float]) -> dict[str, float]:
    """Mean losses by tokens before, "1", "2-3", "4-7" ..., of sums by their log2."""
    names = ["1", *(f"{2**b}-{2 ** (b + 1) - 1}" for b in range(1, 40))]
    return {name: a / n for name, a, n in zip(names, losses, tokens, strict=True) if n}


class Task(NamedTuple):
    """What a run is evaluated on besides held-out text; what stands beside the engine brings it.

    score: its "metrics" by name and number of "items", on all ranks; None where one of them said to stop.
    """

    name: str
    digest: str  # of its items
    score: Callable[[Worker, Callable[[], bool]], Record | None]


def evaluate_task(
    worker: Worker, task: Task, until: float, status: Callable[[bool], RankStatus]
) -> tuple[Record | str, StepConsensus, None]:
    """As `evaluate`; what is not done by `until` (`time.monotonic`) on any rank has no metrics."""
    started = time.monotonic()
    worker.optimizer.wait()  # for the weights, which come under the next forward
    numbers = task.score(worker, lambda: status(False) != RankStatus() or time.monotonic() >= until)
    known = consensus(worker, {}, status(False))
    if numbers is None and known.stop_reason:
        return "before its end", known, None
    return {"seconds": time.monotonic() - started, **(numbers or {"metrics": {}, "items": 0})}, known, None


def evaluate(
    worker: Worker, source: Source, most: int | None, status: Callable[[bool], RankStatus]
) -> tuple[Record | str, StepConsensus, MegallamaError | None]:
    """Loss, tokens, seconds over the first `most` batches of held-out text; last consensus; own failure.

    A last batch that is not full is padded with samples that do not count.  Where a rank wants to stop, all end, and
    say how far they got.  status: of this rank, given whether its data failed.
    """
    started, config, plan = time.monotonic(), worker.plan.config, worker.plan
    size = config.batch.global_batch_size
    batches = min(most or source.num_sequences, -(-source.num_sequences // size))
    dp = worker.groups.dp
    count = config.batch.deal(size, dp.size)[dp.rank]

    def ids_of_step(batch: int) -> Sequence[Sequence[int]]:
        return config.batch.sample_ids(batch * size, size, dp.size, dp.rank)

    known, by = consensus(worker, {}, status(False)), ByPosition(worker)
    total, tokens, done, failure, schedule = 0.0, 0, 0, None, plan.schedule_for(count, training=False)
    with Loader(
        source.read, ids_of_step, stop_step=batches, num_samples=source.num_sequences, prefetch=0, device=worker.device,
        name=source.name, share=worker.share,
    ) as loader:  # fmt: skip
        while done < batches and not (known.stop_reason or known.failed):
            micro_batches, failure = loader.next_or_zeros(count, config)
            micro_batches = [replace(batch, tell=by if worker.counts_loss else None) for batch in micro_batches]
            known = evaluate_step(worker, schedule, micro_batches, partial(status, failure is not None))
            total, tokens, done = total + known.sums["loss"], tokens + known.tokens, done + 1
    if known.failed or done < batches:
        return f"after {done} of {batches} batches", known, failure
    mean = total / tokens
    bits = mean / math.log(2) / source.bytes_per_token if source.bytes_per_token else None
    worker.groups.world.all_reduce(by.sums).wait()
    numbers = {"loss": mean, "tokens": tokens, "seconds": time.monotonic() - started, "bits_per_byte": bits}
    return {**numbers, "loss_by_position": by_position(*by.sums.tolist())}, known, None
