"""Weight gradients accumulated straight into fp32: main_grad += dy.T @ x."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megallama.kernels.gemm import MatmulNT, matmul_nt

AddWgrad = Callable[[Tensor, Tensor, Tensor, bool], None]  # main_grad [out, in], dy [T, out], x [T, in], overwrite


PRODUCT = 1 << 22  # elements of a product that exist before they are added: those of a large head come in blocks


def add_wgrad_with(product: MatmulNT) -> AddWgrad:
    """Accumulation by a product in the operands' format and an addition in main_grad's."""

    def add(main_grad: Tensor, dy: Tensor, x: Tensor, fresh: bool) -> None:
        if dy.dtype == main_grad.dtype and product is matmul_nt:
            torch.mm(dy.t(), x, out=main_grad) if fresh else main_grad.addmm_(dy.t(), x)
            return
        step = max(1, PRODUCT // main_grad.shape[1])
        for grad, part in zip(main_grad.split(step), dy.split(step, 1), strict=True):
            grad.copy_(product(part.t(), x.t())) if fresh else grad.add_(product(part.t(), x.t()))

    return add


def add_wgrad_cuda(main_grad: Tensor, dy: Tensor, x: Tensor, fresh: bool) -> None:
    """The same in one GEMM whose output is fp32 (CUDA; torch's addmm with an output format)."""
    if fresh:
        torch.mm(dy.t(), x, out_dtype=torch.float32, out=main_grad)
    else:
        torch.ops.aten.addmm.dtype_out(main_grad, dy.t(), x, torch.float32, out=main_grad)
