"""One training step and one evaluation: what happens between two batches, in order.

forward and backward of all micro-batches   (the pipeline interpreter; gradients reduce under it)
complete the gradient reduction
one small reduction over all ranks: loss, squared gradient norm, finite everywhere?, signals, failures
decide: skip, or clip and AdamW on the shards, then gather the weights under the next forward
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from megallama.data.batch import MicroBatch
from megallama.model.llama import StageInput
from megallama.plan.schedule import Schedule
from megallama.train.assemble import Rank
from megallama.train.health import Said, Vote
from megallama.train.timers import Timers


@dataclass(frozen=True)
class StepResult:
    """What all ranks know of a step."""

    loss: float  # mean over the counted tokens of the global batch [nats]
    grad_norm: float  # of the global gradient, before clipping
    applied: bool  # False: something was not finite, and nothing was changed
    tokens: int  # counted tokens of the global batch
    stop_reason: str | None
    failed: bool = False  # a rank cannot go on: nothing was changed, and the step does not count


def count_tokens(rank: Rank, batches: Sequence[MicroBatch], *, masked: bool) -> int:
    """Tokens of the global batch whose loss counts: the divisor of loss and gradient, known before the forward.

    masked: whether any rank may leave tokens out, which all ranks must answer alike.
    """
    assert masked or all(b.mask is None for b in batches), "masked tokens that the other ranks do not know of"
    counted = sum(b.num_counted for b in batches)
    if not masked:
        return counted * rank.groups.dp.size
    total = torch.tensor([counted], dtype=torch.int64, device=rank.device)
    rank.groups.dp.all_reduce(total).wait()
    return max(int(total), 1)  # documents of one token predict nothing


def stage_inputs(batches: Sequence[MicroBatch], grad_scale: float) -> list[StageInput]:
    """Micro-batches as the stages take them: flat."""
    return [
        StageInput(
            b.tokens.reshape(-1),
            b.labels.reshape(-1),
            None if b.mask is None else b.mask.reshape(-1),
            grad_scale,
            b.documents,
        )
        for b in batches
    ]


def train_step(
    rank: Rank,
    schedule: Schedule,
    batches: Sequence[MicroBatch],
    lr: float,
    loss_scale: float = 1.0,
    timers: Timers | None = None,
    received: signal.Signals | None = None,
    late: bool = False,
    masked: bool = False,
    said: Callable[[], Said] | None = None,
) -> StepResult:
    """Train on this rank's micro-batches of one global batch; `masked`, if some of them on any rank may have masks.

    `said`, asked as late as possible, takes the place of `received` and `late`.
    All ranks return the same result.  Where the loss or the gradient is not finite on any rank, or one has failed and
    brings zeros for its batches, no rank changes anything.
    """
    timers = timers or Timers()
    tokens = count_tokens(rank, batches, masked=masked)
    rank.optimizer.start_step()
    with timers.phase("forward_backward"):
        loss_sum = rank.runtime.run(schedule, stage_inputs(batches, loss_scale / tokens))
    with timers.phase("grad_sync"):
        squares = rank.optimizer.finish_grads()
    with timers.phase("agree"):
        vote = _agree(rank, loss_sum, squares, said() if said else Said(received, late))
    norm = math.sqrt(vote.norm_squared) / loss_scale if vote.finite else math.nan
    applied = vote.finite and not vote.failed_ranks
    if applied:
        clip = rank.plan.config.optimizer.clip_grad
        factor = min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0
        with timers.phase("optimizer"):
            rank.optimizer.step(lr, factor / loss_scale)
    return StepResult(vote.loss / tokens, norm, applied, tokens, vote.stop_reason, failed=vote.failed_ranks > 0)


def _agree(rank: Rank, loss_sum: torch.Tensor, squares: torch.Tensor, said: Said) -> Vote:
    """The sum over all ranks of what each one knows; its end is the step's only wait for the device."""
    known = torch.stack((loss_sum if rank.counts_loss else torch.zeros_like(loss_sum), squares))
    packed = Vote.packed(known, said)
    rank.groups.world.all_reduce(packed).wait()
    vote = Vote.unpack(rank.read(packed))
    return vote if vote.finite else replace(vote, loss=math.nan, norm_squared=math.nan)


def ask_all(rank: Rank, said: Said) -> Vote:
    """What all ranks want one another to know, without a step."""
    nothing = torch.zeros((), dtype=torch.float64, device=rank.device)
    return _agree(rank, nothing, nothing, said)


def evaluate_step(
    rank: Rank, schedule: Schedule, batches: Sequence[MicroBatch], said: Callable[[], Said] = Said
) -> tuple[Vote, int]:
    """(vote with the sum of token losses, counted tokens) of one global batch, the same on every rank.

    Nothing is changed.
    """
    tokens = count_tokens(rank, batches, masked=True)
    with torch.no_grad():
        loss_sum = rank.runtime.run(schedule, stage_inputs(batches, 1.0))
    return _agree(rank, loss_sum, torch.zeros_like(loss_sum), said()), tokens
