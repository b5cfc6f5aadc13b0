"""On a CPU: fp32 arithmetic on what is stored in 16 bits, where a processor has no instructions for these.

A processor's table names these candidates (`kernels.processors`); nothing else takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megallama.kernels.attention import Documents, sdpa
from megallama.kernels.candidate import Target, Unsupported
from megallama.kernels.gemm import MAX_PRODUCT, MatmulNT, matmul_nt, onednn_matmul_nt


def product_in_fp32(product: MatmulNT, a: Tensor, b: Tensor) -> Tensor:
    """a [m, k], b [n, k] -> a @ b.T rounded once; of b at most `MAX_PRODUCT` numbers exist in fp32."""
    left = a.float()
    if b.numel() <= MAX_PRODUCT:
        return product(left, b.float()).to(a.dtype)
    out = a.new_empty(a.shape[0], b.shape[0])
    step = max(1, MAX_PRODUCT // b.shape[1])
    for into, part in zip(out.split(step, 1), b.split(step), strict=True):
        into.copy_(product(left, part.float()))
    return out


def wgrad_in_fp32(main_grad: Tensor, dy: Tensor, x: Tensor, overwrite: bool) -> None:
    """Straight into main_grad [out, in]: nothing is rounded, and there is no pass that adds."""
    left, right = dy.float(), x.float()
    torch.mm(left.t(), right, out=main_grad) if overwrite else main_grad.addmm_(left.t(), right)


def sdpa_in_fp32(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """`sdpa`, on copies of its operands."""
    return sdpa(q.float(), k.float(), v.float(), documents).to(q.dtype)


def _on_cpu(kernel: Callable[..., Any], *also: torch.dtype, onednn: bool = False) -> Callable[[Target], Any]:
    """A candidate for 16-bit formats and those in `also`."""
    formats = (torch.bfloat16, torch.float16, *also)

    def make(target: Target) -> Any:
        if target.device.type != "cpu" or target.dtype not in formats:
            raise Unsupported(f"{' and '.join(str(f).removeprefix('torch.') for f in formats)} on a CPU only")
        if onednn and not torch.backends.mkldnn.is_available():
            raise Unsupported("this torch was built without oneDNN")
        return kernel

    return make


_MM = _on_cpu(partial(product_in_fp32, matmul_nt))
_ONEDNN = _on_cpu(partial(product_in_fp32, onednn_matmul_nt), onednn=True)
NAMED: dict[str, list[tuple[str, Callable[[Target], Any]]]] = {  # by operation
    "attention": [("attention in fp32", _on_cpu(lambda *sizes: sdpa_in_fp32))],
    "matrix product": [("oneDNN in fp32", _ONEDNN), ("torch mm in fp32", _MM)],
    "weight gradient": [("torch addmm in fp32", _on_cpu(wgrad_in_fp32, torch.float32))],
}
