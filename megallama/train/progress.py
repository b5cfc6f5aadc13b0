"""How far a run is: what a checkpoint holds of it besides tensors."""

from __future__ import annotations

import time
from typing import Any

from megallama.config.schema import Config
from megallama.optim.scaler import LossScaler
from megallama.train.health import HighLoss, NonFiniteGuard


class Progress:
    """Counters and the state of what watches the run; the same on every rank, but for `started`."""

    def __init__(self, config: Config) -> None:
        self.step = 0  # batches used, skipped ones included
        self.updates = 0  # optimizer steps
        self.samples = 0  # sequences used
        self.tokens = 0  # tokens whose loss counted
        self.first_step = 0  # of this start: steps from here on were made by it
        self.may_lack_evaluations = False  # of the step it starts from; False: not known
        self.started = time.monotonic()
        self.scaler = LossScaler(config.precision)
        self.guard = NonFiniteGuard(config.train.max_bad_steps)
        self.high_loss = HighLoss()

    def state_dict(self, evaluated: int) -> dict[str, Any]:
        """As JSON values; `evaluated`: the step up to which all evaluations have been made."""
        return {
            **{name: getattr(self, name) for name in ("step", "updates", "samples", "tokens")},
            "scaler": self.scaler.state_dict(),
            "bad_steps": self.guard.state_dict(),
            "first_loss": self.high_loss.first,
            "evaluated": evaluated,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `saved`."""
        self.step, self.updates = saved["step"], saved["updates"]
        self.samples, self.tokens = saved["samples"], saved["tokens"]
        self.first_step, self.may_lack_evaluations = self.step, "evaluated" in saved
        self.high_loss = HighLoss(saved.get("first_loss"))
        self.scaler.load_state_dict(saved["scaler"])
        self.guard = NonFiniteGuard(self.guard.max_bad_steps, **saved["bad_steps"])
