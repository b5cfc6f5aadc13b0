"""RMSNorm (Zhang & Sennrich 2019) and its gradient, for activations [T, h] and a weight [h].

Statistics are fp32 (fp64 for fp64): one reciprocal root mean square per row is all that the
backward needs besides the input.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The format in which sums over `dtype` are formed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x / rms(x) * weight`` in x's format, and 1/rms as [T, 1] in fp32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulate_dtype(x.dtype))
    rstd = (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()
    return normalize(x, rstd, weight), rstd


def normalize(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """The normalised rows again, from the statistics: bitwise what `rms_norm` returned."""
    wide = x * rstd
    return torch.mul(wide, weight, out=wide if wide.dtype == x.dtype else torch.empty_like(x))


def rms_norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(dx [T, h] in x's format, dweight [h] in fp32).

    With n = x * rstd and g = dy * weight: dx = rstd * (g - n * mean(g * n)), dweight = sum over rows of dy * n.
    """
    n = x * rstd  # rstd is fp32, so everything below is
    dweight = (dy * n).sum(0)
    g = dy * weight.to(n.dtype)
    mean = (g * n).mean(-1, keepdim=True)
    dx = g.sub_(n.mul_(mean)).mul_(rstd)
    return dx.to(x.dtype), dweight
