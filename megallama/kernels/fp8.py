"""Matrix products of the layers in fp8 with current scaling (Micikevicius et al. 2022): Transformer Engine or torch.

Weights and activations are rounded to E4M3 (largest value 448), gradients to E5M2 (57344), each with one scale for the
whole tensor from its own largest element: a power of two, so that scaling rounds nothing and every element is rounded
once.  Sums are fp32 in the GEMM; outputs are bf16, weight gradients fp32.  A tensor with an infinity or a NaN gets
the scale NaN, since fp8 would hide it.

Hopper multiplies fp8 only as a @ b.T with both operands contiguous along the sum (and sizes that are multiples of 16):
the backward's operands are transposed after rounding.  Nothing is kept: each GEMM rounds its own operands.

Considered and left out: `te.Linear` under `te.autocast`.  Our linear layers are hand-written functions, so they call
what it calls, quantizer and GEMM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megallama.kernels.candidate import TE, Operation, Target, require_close
from megallama.kernels.gemm import Gemms
from megallama.kernels.wgrad import check_wgrad

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x times a power of two in `dtype`, the inverse of that power as one fp32 number on the device)."""
    largest = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
    _, exponent = torch.frexp(torch.finfo(dtype).max / largest.clamp(1e-30))
    scale = torch.ldexp(torch.ones_like(largest), (exponent - 1).clamp_(-100, 100))
    inverse = torch.where(largest.isfinite(), 1 / scale, torch.nan)
    return (x * scale.to(x.dtype)).to(dtype), inverse


def fprop(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] @ weight [out, in].T in bf16."""
    return _product(quantize(x, FORWARD), quantize(weight, FORWARD), fast=True)


def dgrad(dy: Tensor, weight: Tensor) -> Tensor:
    """dy [T, out] @ weight [out, in] in bf16."""
    return _product(quantize(dy, GRADIENT), _turned(*quantize(weight, FORWARD)))


def wgrad(main_grad: Tensor, dy: Tensor, x: Tensor, overwrite: bool) -> None:
    """main_grad [out, in], fp32, += dy [T, out].T @ x [T, in]."""
    operands = _turned(*quantize(dy, GRADIENT)), _turned(*quantize(x, FORWARD))
    product = _product(*operands, out=main_grad if overwrite else torch.empty_like(main_grad))
    if not overwrite:
        main_grad.add_(product)


TORCH_FP8 = Gemms(fprop, dgrad, wgrad)


def _turned(values: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return values.t().contiguous(), inverse


def _product(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], out: Tensor | None = None, fast: bool = False
) -> Tensor:
    """a [m, k] @ b [n, k].T; `fast` lets a GPU add in fewer bits than fp32's."""
    kind, where = (torch.bfloat16, {}) if out is None else (out.dtype, {"out": out})
    scales = {"scale_a": a[1], "scale_b": b[1]}
    return torch._scaled_mm(a[0], b[0].t(), **scales, out_dtype=kind, use_fast_accum=fast, **where)


def _te_fp8(target: Target) -> Gemms:
    """Transformer Engine's fp8 with current scaling: its quantizers and GEMM, accumulating into fp32."""
    target.need_fp8()
    tex = target.te_module()
    quantizer = target.te_module("transformer_engine.pytorch.tensor.float8_tensor").Float8CurrentScalingQuantizer
    gemm = target.te_module("transformer_engine.pytorch.cpp_extensions").general_gemm

    def make(kind: Any, columns: bool) -> Any:  # on Hopper only a transposed copy can be read by columns
        return quantizer(kind, target.device, rowwise=True, columnwise=columns, force_pow_2_scales=True)

    (rows4, columns4), (rows5, columns5) = (
        (make(kind, False), make(kind, True)) for kind in (tex.DType.kFloat8E4M3, tex.DType.kFloat8E5M2)
    )
    bf16 = torch.bfloat16

    def fprop(x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = gemm(rows4(weight), rows4(x), out_dtype=bf16, layout="TN")[0]
        return out

    def dgrad(dy: Tensor, weight: Tensor) -> Tensor:
        operands = columns4(weight), rows5(dy)
        out: Tensor = gemm(*operands, out_dtype=bf16, layout="NN", grad=True, use_split_accumulator=True)[0]
        return out

    def add(main_grad: Tensor, dy: Tensor, x: Tensor, overwrite: bool) -> None:
        gemm(
            columns4(x), columns5(dy), out_dtype=torch.float32, layout="NT", grad=True, out=main_grad,
            accumulate=not overwrite, use_split_accumulator=True,
        )  # fmt: skip

    return Gemms(fprop, dgrad, add)


def _torch_fp8(target: Target) -> Gemms:
    target.need_fp8()
    return TORCH_FP8


def check_fp8(gemms: Gemms, target: Target) -> None:
    """All three products within what rounding normal operands to fp8 costs: 2.6 % (E4M3), 5.2 % (E5M2) each."""
    x, dy, weight = (target.random(*shape, seed=shape[1]) for shape in ((64, 48), (64, 32), (32, 48)))
    require_close("product", gemms.fprop(x, weight), x.double() @ weight.double().t(), 6e-2)
    require_close("gradient of the input", gemms.dgrad(dy, weight), dy.double() @ weight.double(), 8e-2)
    check_wgrad(gemms.wgrad, target, 8e-2)


FP8_PRODUCTS = Operation(
    [(TE, _te_fp8), ("torch _scaled_mm", _torch_fp8)],
    ("nothing here can", lambda target: TORCH_FP8),
    check_fp8,
)
