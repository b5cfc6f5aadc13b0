"""How far a run is and how well it goes: what a checkpoint holds of it besides tensors."""

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any

from megallama.config.errors import MegallamaError, counted
from megallama.config.schema import Config, PrecisionConfig

MIN_SCALE, MAX_SCALE = 1.0, 2.0**24  # a scaled loss must stay far from the end of fp32


class TrainingStopped(MegallamaError):
    """The run cannot go on by itself: too many steps in a row were not finite."""

    shared, status = True, 3


class LossScaler:
    """`scale` multiplies the loss of the next step, and divides its gradients.

    It is for fp16 (Micikevicius et al. 2018), whose gradients below 6e-8 vanish; for others, with the range of fp32, 1.
    """

    def __init__(self, config: PrecisionConfig) -> None:
        self.dynamic = config.dtype == "fp16"
        self.scale = config.initial_loss_scale if self.dynamic else 1.0
        self.good_steps = 0
        self._window = config.loss_scale_window

    def update(self, finite: bool) -> bool:
        """Note a step; whether it overflowed, so that the next one runs with a smaller scale.

        False after a step that was not finite: no scale is to blame, the numbers are bad.
        """
        before = self.scale
        if self.dynamic:
            self.good_steps = self.good_steps + 1 if finite else 0
            if not finite:
                self.scale = min(before, max(before / 2, MIN_SCALE))
            elif self.good_steps == self._window:
                self.good_steps, self.scale = 0, max(before, min(before * 2, MAX_SCALE))
        return self.scale < before

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self.good_steps} if self.dynamic else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; that of another number format leaves the initial scale."""
        if self.dynamic and state:
            self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])


@dataclass
class NonFiniteGuard:
    """Counts skipped steps; raises when too many follow one another."""

    max_bad_steps: int
    skipped: int = 0
    in_a_row: int = 0
    last_good: int | None = None

    def record(self, step: int, finite: bool, *, overflow: bool = False, checkpoint: int | None = None) -> None:
        """Note how step `step` went; raises TrainingStopped after too many bad ones in a row.

        overflow: a smaller loss scale may cure it.  checkpoint: the newest on disk up to the last good step.
        """
        if finite:
            self.in_a_row, self.last_good = 0, step
            return
        self.skipped += 1
        self.in_a_row += not overflow
        if overflow or self.in_a_row < self.max_bad_steps:
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


@dataclass
class HighLoss:
    """Notices a loss that stays 2 % above its first value for `PATIENCE` steps in a row."""

    PATIENCE = 20
    first: float | None = None
    in_a_row: int = 0

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


class Spikes:
    """Loss and gradient norm of good steps; what stands out (median, MAD: Hampel 1974)."""

    WINDOW, LEAST, MOST = 200, 20, 10  # steps: looked at, needed, in a row that are the new level
    WIDTH = {"loss": 0.02, "grad_norm": 0.1}  # the least standard deviation, in medians

    def __init__(self, windows: Mapping[str, Sequence[float]]) -> None:
        self.windows = {name: deque(windows.get(name, ()), self.WINDOW) for name in self.WIDTH}
        self.in_a_row = 0

    def found(self, values: Mapping[str, float]) -> dict[str, float]:
        """Name and typical value of what lies ten standard deviations above the median."""
        out = {}
        for name, window in self.windows.items():
            middle = median(window) if len(window) >= self.LEAST else inf
            if values[name] > (1 + 10 * self.WIDTH[name]) * middle:
                if values[name] > middle + 14.826 * median(abs(value - middle) for value in window):
                    out[name] = middle
        return out

    def seen(self, values: Mapping[str, float], found: Collection[str]) -> bool:
        """Note a finite step; whether so many in a row stood out that all begins again."""
        self.in_a_row = (self.in_a_row + 1) % self.MOST if found else 0
        for name, window in self.windows.items():
            if not found:
                window.append(values[name])
            elif not self.in_a_row:
                window.clear()
        return bool(found) and not self.in_a_row


class Progress:
    """Counters, and the state of what watches the run."""

    def __init__(self, config: Config, phase: int = 0) -> None:
        self.step = 0  # batches used, skipped ones included
        self.updates = 0  # optimizer steps
        self.samples = 0  # sequences used
        self.tokens = 0  # tokens whose loss counted
        self.first_step = 0  # of this start: steps from here on were made by it
        self.may_lack_evaluations = False  # of the step it starts from; False: not known
        self.started = time.monotonic()
        self.lr = 0.0  # of the last step
        self.begun = self.tokens_read = 0  # steps before the lr schedule; of all samples, counted or not
        self.enter(config, phase)
        self.scaler = LossScaler(config.precision)
        self.guard = NonFiniteGuard(config.train.max_bad_steps)
        self.high_loss = HighLoss()
        self.rollbacks, self.left_out = 0, dict[str, int]()  # step -> samples after it that are not used
        self.spikes, self._keeps_spikes = Spikes({}), config.train.on_spike != "warn"  # but decide

    def enter(self, config: Config, number: int = 0) -> None:
        """What is read from here on has this length, in phase `number` from 0, if any."""
        phase = {"phase": number + 1} if config.train.phases else {}
        self._now = {"seq_length": config.batch.seq_length, **phase}
        self.ledger = [{"first_token": 0, **self._now}]

    def go_on(self, ledger: list[dict[str, int]]) -> None:
        """What was read before stands in this ledger."""
        now = {"first_token": self.tokens_read, **self._now}
        last = {**ledger[-1], "first_token": self.tokens_read}
        self.ledger = ledger if last == now else [*ledger, now]

    def state_dict(self, evaluated: int) -> dict[str, Any]:
        """As JSON values; `evaluated`: the step up to which all evaluations have been made."""
        guard = self.guard
        return {
            **{name: getattr(self, name) for name in ("step", "updates", "samples", "tokens")},
            "scaler": self.scaler.state_dict(),
            "bad_steps": {"skipped": guard.skipped, "in_a_row": guard.in_a_row, "last_good": guard.last_good},
            "first_loss": self.high_loss.first,
            "evaluated": evaluated,
            "ledger": self.ledger,
            "tokens_read": self.tokens_read,
            **({"schedule_begun": self.begun} if self.begun else {}),
            **({"rollbacks": self.rollbacks, "left_out": self.left_out} if self.rollbacks else {}),
            **({"spikes": {n: [*w] for n, w in self.spikes.windows.items()}} if self._keeps_spikes else {}),
        }

    def load_state_dict(self, saved: dict[str, Any], seq_length: int | None = None) -> None:
        """Of a run of this length, if it kept no ledger; another is a new line of that."""
        self.step, self.updates = saved["step"], saved["updates"]
        self.samples, self.tokens = saved["samples"], saved["tokens"]
        self.first_step, self.may_lack_evaluations = self.step, "evaluated" in saved
        self.rollbacks, self.left_out = max(self.rollbacks, saved.get("rollbacks", 0)), saved.get("left_out", {})
        self.high_loss, self.spikes = HighLoss(saved.get("first_loss")), Spikes(saved.get("spikes", {}))
        self.begun, length = saved.get("schedule_begun", 0), seq_length or self._now["seq_length"]
        self.tokens_read = saved.get("tokens_read", self.samples * length)
        self.go_on(saved.get("ledger") or [{"first_token": 0, "seq_length": length}])
        self.scaler.load_state_dict(saved["scaler"])
        self.guard = NonFiniteGuard(self.guard.max_bad_steps, **saved["bad_steps"])
