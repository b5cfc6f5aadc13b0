"""RMSNorm (Zhang & Sennrich 2019) and its gradient, for activations [T, h] and a weight [h].

The backward needs nothing but the input: the root mean squares are formed again in its own pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

NormPair = tuple[Callable[[Tensor, Tensor, float], Tensor], Callable[..., tuple[Tensor, Tensor]]]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The format in which sums over `dtype` are formed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` in x's format; the same bits on every call."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms of each row, [T, 1] in fp32 (fp64 for fp64)."""
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulate_dtype(x.dtype))
    return norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(dx [T, h] in x's format, dweight [h] in fp32).

    With r = 1/rms, n = x r and p = dy n: dweight is the sum of p over rows, and
    dx = r (dy weight - n mean(p weight)).
    """
    wide, columns, rstd = accumulate_dtype(x.dtype), x.shape[-1], inverse_rms(x, eps)
    normed, grad, scale = x.to(wide) * rstd, dy.to(wide), weight.to(wide)
    product = grad * normed
    mean = torch.mv(product, scale).div_(columns).unsqueeze(1)
    dx = (grad * scale).addcmul_(normed, mean, value=-1).mul_(rstd)
    return dx.to(x.dtype), product.sum(0)


def fused_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The kernel behind the gradient of `F.rms_norm` on CUDA, given statistics made again from the input."""
    backward = torch.ops.aten._fused_rms_norm_backward
    dx, dweight = backward(dy, x, [x.shape[-1]], inverse_rms(x, eps), weight, [True, True])
    return dx, dweight.to(accumulate_dtype(x.dtype))
