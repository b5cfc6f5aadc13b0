"""Causal attention on [b, s, heads, d]: torch's fused kernels, and the plain formula to check others against."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [b, s, n, d], k and v [b, s, k, d] -> [b, s, n, d]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's fused attention, with grouped key/value heads."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out.transpose(1, 2)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k.T / sqrt(d)) v with every score in memory, in float64: for checks only."""
    group = q.shape[2] // k.shape[2]
    wide = [t.double().transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2))]
    scores = wide[0] @ wide[1].transpose(2, 3) / q.shape[3] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ wide[2]
    return out.transpose(1, 2).to(q.dtype)
