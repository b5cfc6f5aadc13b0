"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018), whose gradients below 6e-8 vanish.

Every other format has the range of fp32, and the scaler is the identity.
"""

from __future__ import annotations

from typing import Any

from megallama.config.schema import PrecisionConfig

MIN_SCALE, MAX_SCALE = 1.0, 2.0**24  # a scaled loss must stay far from the end of fp32


class LossScaler:
    """`scale` multiplies the loss of the next step, and divides its gradients."""

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
        """Continue from `state`; a state saved in another number format leaves the initial scale."""
        if self.dynamic and state:
            self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
