"""Rotary position embedding (Su et al. 2021) in Hugging Face's convention: element i rotates with i + d/2.

Frequencies are theta^(-2i/d), scaled for LLaMA 3.1 as in its reference implementation: wavelengths
longer than original/low_freq_factor are stretched by `factor`, those shorter than
original/high_freq_factor are kept, and those between are interpolated linearly.

Considered and left out: Transformer Engine's fused RoPE (takes angles where ours are tables, writes a new tensor where
ours rotates in place, and knows documents in another layout only).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megallama.config.schema import RopeScaling
from megallama.kernels.candidate import COMPILED, Operation, Target, require_all_close
from megallama.kernels.compiled import compiled
from megallama.kernels.dtypes import accumulate_dtype

ApplyRope = Callable[[Tensor, Tensor, Tensor, Tensor], None]  # x, cos, sin, out


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype) -> Tensor:
    """[d/2] angles per position, in `dtype` (fp32, or fp64 for verification)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).to(dtype) / head_dim
    inverse = 1.0 / (theta**exponent)
    if scaling is None:
        return inverse
    wavelength = 2 * math.pi / inverse
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_max_position / wavelength - low) / (high - low)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * inverse / scaling.factor + smooth * inverse


def rope_tables(
    seq_length: int, head_dim: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [s, 1, d/2] in `dtype`: angles of positions 0..s-1."""
    angles = torch.outer(torch.arange(seq_length).to(dtype), inverse_frequencies(head_dim, theta, scaling, dtype))
    return angles.cos().unsqueeze(1).to(device), angles.sin().unsqueeze(1).to(device)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate x [b, s, heads, d] by its positions into `out`, which may be x; -sin gives the inverse: the gradient."""
    half = x.shape[-1] // 2
    exact = x.to(cos.dtype, copy=out.data_ptr() == x.data_ptr())  # fp32 for 16-bit activations
    a, b = exact[..., :half], exact[..., half:]
    out[..., :half] = (a * cos).addcmul_(b, sin, value=-1)
    out[..., half:] = (b * cos).addcmul_(a, sin)


def compiled_rope(target: Target) -> ApplyRope:
    """The formula below, fused by torch.compile."""
    rotated = compiled(_rotated, target)

    def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
        out.copy_(rotated(x, cos, sin))

    return apply_rope


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def check_rope(apply_rope: ApplyRope, target: Target) -> None:
    """A rotation in place and its inverse, the gradient."""
    x, angles = target.random(2, 16, 3, 8), target.random(16, 1, 4, seed=1).to(accumulate_dtype(target.dtype))
    want = _rotated(x.double(), angles.double().cos(), angles.double().sin())
    out = x.clone()
    apply_rope(out, angles.cos(), angles.sin(), out)
    back = torch.empty_like(x)
    apply_rope(out, angles.cos(), -angles.sin(), back)
    require_all_close({"rotated heads": out, "heads rotated back": back}, [want, x], target)


ROPE = Operation([(COMPILED, compiled_rope)], ("torch", lambda target: apply_rope), check_rope)
