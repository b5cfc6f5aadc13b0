"""A micro-batch: what one forward pass of one model replica consumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Tokens and what they should predict.

    tokens, labels: int64 [b, s]; labels[i, t] is the token after tokens[i, t].
    mask: bool [b, s], True where the loss counts; None where all of it does.  It comes from positions, never from
    token values.
    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor | None = None

    @classmethod
    def from_samples(cls, samples: Sequence[np.ndarray], real: Sequence[bool] | None = None) -> MicroBatch:
        """Stack samples, each int64 [s + 1]; rows whose `real` is False are padding and count nothing."""
        both = torch.from_numpy(np.stack(samples))
        mask = None
        if real is not None and not all(real):
            mask = torch.tensor(real)[:, None].expand(len(samples), both.shape[1] - 1).contiguous()
        return cls(both[:, :-1].contiguous(), both[:, 1:].contiguous(), mask)

    @property
    def num_counted(self) -> int:
        """How many tokens the loss counts."""
        return self.labels.numel() if self.mask is None else int(self.mask.sum())

    def pin(self) -> MicroBatch:
        """A copy in page-locked memory, from which a GPU can copy in the background."""
        mask = None if self.mask is None else self.mask.pin_memory()
        return MicroBatch(self.tokens.pin_memory(), self.labels.pin_memory(), mask)

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device; does not wait for the copy if the source is pinned."""
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        return MicroBatch(self.tokens.to(device, non_blocking=True), self.labels.to(device, non_blocking=True), mask)
