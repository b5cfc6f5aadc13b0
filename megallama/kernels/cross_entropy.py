"""The softmax of the loss, in place of its logits.

Considered and left out: the cross entropies of Transformer Engine (all logits of a micro-batch at once, reduced over a
process group of its own) and of apex (a second copy of them).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megallama.kernels.candidate import COMPILED, Operation, Target, require_all_close
from megallama.kernels.compiled import compiled
from megallama.kernels.dtypes import accumulate_dtype

Softmax = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None]  # what `softmax_` does


def softmax_(logits: Tensor, index: Tensor, log_sum: Tensor, picked: Tensor, scale: Tensor | None) -> None:
    """Replace `logits` [r, v] by their softmax, times `scale` [r] if it is given.

    Writes log(sum(exp(logits))) [r] and the logit [r] at `index` [r, 1], both in the format of `log_sum` in which
    all is computed.  The logarithm needs no second pass of exponentials: the largest probability is
    exp(largest logit) / sum.
    """
    exact = logits.to(log_sum.dtype)
    probs = torch.softmax(exact, 1)
    log_sum.copy_(exact.amax(1) - probs.amax(1).log())
    picked.copy_(exact.gather(1, index).squeeze(1))
    if scale is not None:
        probs.mul_(scale.unsqueeze(1))
    logits.copy_(probs)


def compiled_softmax(target: Target) -> Softmax:
    """The formula below, fused by torch.compile."""
    formula = compiled(_softmax, target)

    def into(logits: Tensor, index: Tensor, log_sum: Tensor, picked: Tensor, scale: Tensor | None) -> None:
        for to, new in zip((logits, log_sum, picked), formula(logits, index, scale, log_sum.dtype), strict=True):
            to.copy_(new)

    return into


def _softmax(
    logits: Tensor, index: Tensor, scale: Tensor | None, acc_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    exact = logits.to(acc_dtype)
    top = exact.amax(1)
    powers = torch.exp(exact - top.unsqueeze(1))
    total = powers.sum(1)
    probs = powers * ((1 if scale is None else scale) / total).unsqueeze(1)
    return probs.to(logits.dtype), top + total.log(), exact.gather(1, index).squeeze(1)


def check_softmax(softmax_: Softmax, target: Target) -> None:
    """Probabilities in place, their logarithm's sum and the picked logits."""
    logits, acc_dtype = target.random(24, 61), accumulate_dtype(target.dtype)
    index = torch.arange(24, device=target.device).unsqueeze(1)
    scale = index.squeeze(1).to(acc_dtype) / 12
    for case in (None, scale):
        rows, log_sum, picked = logits.clone(), scale.clone(), scale.clone()
        softmax_(rows, index, log_sum, picked, case)
        want = _softmax(logits.double(), index, None if case is None else case.double(), torch.float64)
        results = {"probabilities": rows, "logarithm of the sum": log_sum, "picked logits": picked}
        require_all_close(results, want, target)


CROSS_ENTROPY = Operation([(COMPILED, compiled_softmax)], ("torch", lambda target: softmax_), check_softmax)
