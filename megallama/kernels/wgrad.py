"""Weight gradients accumulated straight into fp32: main_grad += dy.T @ x."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megallama.kernels.candidate import APEX, TE, Operation, Target, Unsupported, require_close
from megallama.kernels.dtypes import accumulate_dtype
from megallama.kernels.gemm import MatmulNT, matmul_nt

AddWgrad = Callable[[Tensor, Tensor, Tensor, bool], None]  # main_grad [out, in], dy [T, out], x [T, in], overwrite

PRODUCT = 1 << 22  # elements of a product that exist before they are added: those of a large head come in blocks


def add_wgrad_with(product: MatmulNT) -> AddWgrad:
    """Accumulation by a product in the operands' format and an addition in main_grad's."""

    def add(main_grad: Tensor, dy: Tensor, x: Tensor, overwrite: bool) -> None:
        if dy.dtype == main_grad.dtype and product is matmul_nt:
            torch.mm(dy.t(), x, out=main_grad) if overwrite else main_grad.addmm_(dy.t(), x)
            return
        step = max(1, PRODUCT // main_grad.shape[1])
        for grad, part in zip(main_grad.split(step), dy.split(step, 1), strict=True):
            grad.copy_(product(part.t(), x.t())) if overwrite else grad.add_(product(part.t(), x.t()))

    return add


def add_wgrad_cuda(main_grad: Tensor, dy: Tensor, x: Tensor, overwrite: bool) -> None:
    """The same in one GEMM whose output is fp32 (CUDA; torch's addmm with an output format)."""
    if overwrite:
        torch.mm(dy.t(), x, out_dtype=torch.float32, out=main_grad)
    else:
        torch.ops.aten.addmm.dtype_out(main_grad, dy.t(), x, torch.float32, out=main_grad)


def _addmm(target: Target) -> AddWgrad:
    if target.device.type != "cuda" or accumulate_dtype(target.dtype) == target.dtype:
        raise Unsupported("CUDA with 16-bit weights only")
    return add_wgrad_cuda


def _te_wgrad(target: Target) -> AddWgrad:
    """Transformer Engine's GEMM with fp32 output and accumulation."""
    target.need_half_on_cuda()
    gemm = target.te_module("transformer_engine.pytorch.cpp_extensions").general_gemm

    def add(main_grad: Tensor, dy: Tensor, x: Tensor, overwrite: bool) -> None:
        gemm(x, dy, out_dtype=torch.float32, accumulate=not overwrite, layout="NT", out=main_grad, grad=True)

    return add


def _apex_wgrad(target: Target) -> AddWgrad:
    """apex's GEMM that accumulates into fp32."""
    target.need_half_on_cuda()
    extension = target.apex_module("fused_weight_gradient_mlp_cuda")

    def add(main_grad: Tensor, dy: Tensor, x: Tensor, overwrite: bool) -> None:
        if overwrite:
            main_grad.zero_()
        extension.wgrad_gemm_accum_fp32(x, dy, main_grad)

    return add


def check_wgrad(add: AddWgrad, target: Target, tolerance: float = 1e-5) -> None:
    """dy.T @ x written over what was there, and added to it."""
    dy, x = (target.random(64, n, seed=n) for n in (32, 48))
    want = dy.double().t() @ x.double()
    out = torch.full((32, 48), 7.0, dtype=accumulate_dtype(target.dtype), device=target.device)
    add(out, dy, x, True)
    require_close("overwritten", out, want, tolerance)
    add(out, dy, x, False)
    require_close("accumulated", out, 2 * want, tolerance)


WGRAD = Operation(
    [(TE, _te_wgrad), (APEX, _apex_wgrad), ("torch addmm into fp32", _addmm)],
    ("that product, then add", lambda target: add_wgrad_with(target.product or matmul_nt)),
    check_wgrad,
)
