"""Attention by its formula, with which all implementations are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from megallama.kernels.attention import Documents


def plain_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """softmax(q k.T / sqrt(d)) v with every score in memory, in float64."""
    group = q.shape[2] // k.shape[2]
    exact = [t.double().transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2))]
    scores = exact[0] @ exact[1].transpose(2, 3) / q.shape[3] ** 0.5
    at = torch.arange(q.shape[1], device=q.device)
    hidden = at > at[:, None]
    if documents is not None:
        hidden = hidden | (at < documents.starts[:, None, :, None])
    out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ exact[2]
    return out.transpose(1, 2).to(q.dtype)
