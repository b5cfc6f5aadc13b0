"""Is the run well, and has anybody asked it to stop?

Two small things: a counter of steps that were not finite (`BadSteps`), and the few numbers on which all ranks must
agree before the optimizer runs (`Vote`): they are summed over all ranks in one reduction, so every rank reaches the
same verdict in the same step.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megallama.config.errors import MegallamaError
from megallama.config.words import counted
from megallama.train.signals import SIGNALS

if TYPE_CHECKING:
    from torch import Tensor


class TrainingStopped(MegallamaError):
    """The run cannot go on by itself: too many steps in a row were not finite."""

    shared = True
    status = 3


class BadSteps:
    """Counts skipped steps; raises when too many follow one another."""

    def __init__(self, max_bad_steps: int) -> None:
        self.max_bad_steps = max_bad_steps
        self.skipped = 0
        self.in_a_row = 0
        self.last_good: int | None = None

    @property
    def bears_another(self) -> bool:
        """Whether the run goes on after one more bad step."""
        return self.in_a_row + 1 < self.max_bad_steps

    def record(self, step: int, finite: bool, *, excused: bool = False, checkpoint: int | None = None) -> None:
        """Note how update number `step` went; `checkpoint` is the newest step up to the last good one that is on disk.

        `excused` marks an overflow that a smaller fp16 loss scale may cure: counted as skipped, but
        not as one of the row.  Raises TrainingStopped after `max_bad_steps` bad steps in a row.
        """
        if finite:
            self.in_a_row, self.last_good = 0, step
            return
        self.skipped += 1
        if excused:
            return
        self.in_a_row += 1
        if self.in_a_row < self.max_bad_steps:
            return
        first = step - self.in_a_row + 1
        steps = f"step {step}" if first == step else f"steps {first}-{step}"
        good = "no step was good" if self.last_good is None else f"last good step {self.last_good}"
        resume = f"resume from step {checkpoint}" if checkpoint is not None else "no checkpoint is so old: start again"
        raise TrainingStopped(
            f"loss or gradients were non-finite for {counted(self.in_a_row, 'step')} in a row ({steps}); {good}; "
            f"{resume} with a lower optimizer.lr or a longer lr_schedule.warmup_steps, "
            f"or raise train.max_bad_steps={self.max_bad_steps}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The counters as JSON values."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "last_good": self.last_good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.skipped, self.in_a_row, self.last_good = state["skipped"], state["in_a_row"], state["last_good"]


class HighLoss:
    """Notices a loss that stays above its first value: 2 % above it, for `PATIENCE` steps in a row."""

    PATIENCE = 20

    def __init__(self, first: float | None = None) -> None:
        self.first, self.in_a_row = first, 0

    def seen(self, loss: float) -> str | None:
        """Note the loss of a good step; what to say of it, once."""
        if self.first is None:
            self.first = loss
        self.in_a_row = self.in_a_row + 1 if loss > 1.02 * self.first else 0
        if self.in_a_row != self.PATIENCE:
            return None
        return (
            f"the loss has been above its first value, {self.first:.4f}, for {self.PATIENCE} steps, now {loss:.4f}: "
            "the run diverges; look at optimizer.lr, lr_schedule.warmup_steps and the data"
        )


@dataclass(frozen=True)
class Said:
    """What a rank wants all ranks to know."""

    received: signal.Signals | None = None
    late: bool = False  # `train.stop_after_minutes` is over
    failed: bool = False  # it cannot go on, and takes part with stand-ins until all ranks know


@dataclass(frozen=True)
class Vote:
    """What one rank knows at the end of a step, or, after the sum over ranks, what all of them know.

    `loss` and `norm_squared` are this rank's addends (0 where another rank counts them), the others
    are numbers of ranks: of those that saw something non-finite, whose `train.stop_after_minutes` is
    over, that cannot go on, and of those that received each of `SIGNALS`.
    """

    loss: float
    norm_squared: float
    bad_ranks: int = 0
    late_ranks: int = 0
    failed_ranks: int = 0
    signals: tuple[int, ...] = (0,) * len(SIGNALS)

    @classmethod
    def of(
        cls,
        loss: float,
        norm_squared: float,
        *,
        finite: bool,
        late: bool,
        received: signal.Signals | None,
        failed: bool = False,
    ) -> Vote:
        """The vote of one rank."""
        signals = tuple(int(s == received) for s in SIGNALS)
        return cls(loss, norm_squared, int(not finite), int(late), int(failed), signals)

    def pack(self) -> list[float]:
        """As numbers to be summed over all ranks, in fp64."""
        ranks = (self.bad_ranks, self.late_ranks, self.failed_ranks, *self.signals)
        return [self.loss, self.norm_squared, *map(float, ranks)]

    @classmethod
    def packed(cls, known: Tensor, said: Said) -> Tensor:
        """`pack` of one rank's vote, made where its [loss, norm_squared] are: nothing waits for that device."""
        finite = known.isfinite().all()
        rest = cls.of(0.0, 0.0, finite=True, late=said.late, received=said.received, failed=said.failed).pack()
        packed = known.new_zeros(len(rest))
        packed[:2] = known.where(finite, 0.0)
        packed[2] = ~finite
        for place, value in enumerate(rest):
            if value:
                packed[place].fill_(value)
        return packed

    @classmethod
    def unpack(cls, values: Sequence[float]) -> Vote:
        """From the summed numbers."""
        loss, norm_squared, *ranks = values
        bad, late, failed, *signals = map(round, ranks)
        return cls(loss, norm_squared, bad, late, failed, tuple(signals))

    @property
    def finite(self) -> bool:
        """No rank saw anything non-finite: the optimizer may run."""
        return self.bad_ranks == 0

    @property
    def stop_reason(self) -> str | None:
        """Why all ranks save and leave after this step, in words; None to go on."""
        for number, count in zip(SIGNALS, self.signals, strict=True):
            if count:
                return f"{number.name} on {count} rank{'s' if count > 1 else ''}"
        return "train.stop_after_minutes is over" if self.late_ranks else None
