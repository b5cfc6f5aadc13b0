"""RMSNorm (Zhang & Sennrich 2019) and its gradient, for activations [T, h] and a weight [h].

The backward needs nothing but the input: the root mean squares are formed again in its own pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The format in which sums over `dtype` are formed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` in x's format; the same bits on every call."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(dx [T, h] in x's format, dweight [h] in fp32).

    With r = 1/rms, n = x r and p = dy n: dweight is the sum of p over rows, and
    dx = r (dy weight - n mean(p weight)).
    """
    wide = accumulate_dtype(x.dtype)
    columns = x.shape[-1]
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_()
    rstd = square.div_(columns).add_(eps).rsqrt_()
    normed, grad, scale = x.to(wide) * rstd, dy.to(wide), weight.to(wide)
    product = grad * normed
    mean = torch.mv(product, scale).div_(columns).unsqueeze(1)
    dx = (grad * scale).addcmul_(normed, mean, value=-1).mul_(rstd)
    return dx.to(x.dtype), product.sum(0)
