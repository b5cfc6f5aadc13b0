"""Rows of logits turned into probabilities where they stand: what the vocabulary-parallel loss needs of softmax.

Transformer Engine's cross entropy is not a candidate: it wants all logits of a micro-batch at once and reduces over
a torch process group of its own, where ours works on chunks and through `Group`.  apex's keeps a second copy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_(logits: Tensor, index: Tensor, log_sum: Tensor, picked: Tensor, scale: Tensor | None) -> None:
    """Replace `logits` [r, v] by their softmax, times `scale` [r] if it is given.

    Writes log(sum(exp(logits))) [r] and the logit [r] at `index` [r, 1], both in the format of `log_sum` in which
    all is computed.  The logarithm needs no second pass of exponentials: the largest probability is
    exp(largest logit) / sum.
    """
    exact = logits.to(log_sum.dtype)
    chances = torch.softmax(exact, 1)
    log_sum.copy_(exact.amax(1) - chances.amax(1).log())
    picked.copy_(exact.gather(1, index).squeeze(1))
    if scale is not None:
        chances.mul_(scale.unsqueeze(1))
    logits.copy_(chances)
