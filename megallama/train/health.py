"""Is the run well? Steps that were not finite are counted, and a loss that stays high is noticed.

Both see only what all ranks know (`StepConsensus`): every rank reaches the same verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megallama.config.errors import MegallamaError, counted


class TrainingStopped(MegallamaError):
    """The run cannot go on by itself: too many steps in a row were not finite."""

    shared = True
    status = 3


@dataclass
class NonFiniteGuard:
    """Counts skipped steps; raises when too many follow one another."""

    max_bad_steps: int
    skipped: int = 0
    in_a_row: int = 0
    last_good: int | None = None

    @property
    def bears_another(self) -> bool:
        """Whether the run goes on after one more bad step."""
        return self.in_a_row + 1 < self.max_bad_steps

    def record(self, step: int, finite: bool, *, overflow: bool = False, checkpoint: int | None = None) -> None:
        """Note how step `step` went; `checkpoint`: the newest on disk up to the last good one.

        `overflow`: a smaller loss scale may cure it; counted as skipped, but not in the row.
        Raises TrainingStopped after `max_bad_steps` bad steps in a row.
        """
        if finite:
            self.in_a_row, self.last_good = 0, step
            return
        self.skipped += 1
        if overflow:
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
        """The counters as JSON values, and what makes the same guard again."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "last_good": self.last_good}


class HighLoss:
    """Notices a loss that stays 2 % above its first value for `PATIENCE` steps in a row."""

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
