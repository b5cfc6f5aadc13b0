"""Matrix products of the layers in fp8 with current scaling (Micikevicius et al. 2022), through torch.

Weights and activations are rounded to E4M3 (largest value 448), gradients to E5M2 (57344), each with one scale for the
whole tensor from its own largest element: a power of two, so that scaling rounds nothing and every element is rounded
once.  Sums are fp32 in the GEMM; outputs are bf16, weight gradients fp32.  A tensor with an infinity or a NaN gets
the scale NaN, since fp8 would hide it.

Hopper multiplies fp8 only as a @ b.T with both operands contiguous along the sum (and sizes that are multiples of 16):
the backward's operands are transposed after rounding.  Nothing is kept: each GEMM rounds its own operands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megallama.kernels.gemm import Gemms

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x times a power of two in `dtype`, the inverse of that power as one fp32 number on the device)."""
    largest = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
    _, exponent = torch.frexp(torch.finfo(dtype).max / largest.clamp(1e-30))
    scale = torch.ldexp(torch.ones_like(largest), (exponent - 1).clamp_(-100, 100))
    inverse = torch.where(largest.isfinite(), 1 / scale, torch.nan)
    return (x * scale.to(x.dtype)).to(dtype), inverse


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] @ weight [out, in].T in bf16."""
    return _product(quantize(x, FORWARD), quantize(weight, FORWARD), fast=True)


def project_back(dy: Tensor, weight: Tensor) -> Tensor:
    """dy [T, out] @ weight [out, in] in bf16."""
    return _product(quantize(dy, GRADIENT), _turned(*quantize(weight, FORWARD)))


def add_wgrad(main_grad: Tensor, dy: Tensor, x: Tensor, fresh: bool) -> None:
    """main_grad [out, in], fp32, += dy [T, out].T @ x [T, in]."""
    operands = _turned(*quantize(dy, GRADIENT)), _turned(*quantize(x, FORWARD))
    product = _product(*operands, out=main_grad if fresh else torch.empty_like(main_grad))
    if not fresh:
        main_grad.add_(product)


TORCH_FP8 = Gemms(project, project_back, add_wgrad)


def _turned(values: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return values.t().contiguous(), inverse


def _product(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], out: Tensor | None = None, fast: bool = False
) -> Tensor:
    """a [m, k] @ b [n, k].T; `fast` lets a GPU add in fewer bits than fp32's."""
    kind, where = (torch.bfloat16, {}) if out is None else (out.dtype, {"out": out})
    scales = {"scale_a": a[1], "scale_b": b[1]}
    return torch._scaled_mm(a[0], b[0].t(), **scales, out_dtype=kind, use_fast_accum=fast, **where)
