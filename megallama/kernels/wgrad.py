"""Weight gradients accumulated straight into fp32: main_grad += dy.T @ x."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AddWgrad = Callable[[Tensor, Tensor, Tensor, bool], None]  # main_grad, dy, x, overwrite


def add_wgrad(main_grad: Tensor, dy: Tensor, x: Tensor, fresh: bool) -> None:
    """main_grad [out, in] += dy [T, out].T @ x [T, in]; `fresh` overwrites what is there.

    Formats that are not main_grad's own are multiplied in theirs and added in main_grad's.
    """
    if dy.dtype == main_grad.dtype:
        if fresh:
            torch.mm(dy.t(), x, out=main_grad)
        else:
            main_grad.addmm_(dy.t(), x)
        return
    product = torch.mm(dy.t(), x)
    if fresh:
        main_grad.copy_(product)
    else:
        main_grad.add_(product)


def add_wgrad_cuda(main_grad: Tensor, dy: Tensor, x: Tensor, fresh: bool) -> None:
    """The same in one GEMM whose output is fp32 (CUDA; torch's addmm with an output format)."""
    if fresh:
        torch.mm(dy.t(), x, out_dtype=torch.float32, out=main_grad)
    else:
        torch.ops.aten.addmm.dtype_out(main_grad, dy.t(), x, torch.float32, out=main_grad)
