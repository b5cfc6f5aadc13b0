"""The matrix product of the linear layers, in the one form that all three of a layer's GEMMs take: a @ b.T.

    forward  y  = x @ W.T          matmul_nt(x, W)
    dgrad    dx = dy @ W           matmul_nt(dy, W.T)
    wgrad    dW = dy.T @ x         matmul_nt(dy.T, x.T)

torch's CPU build multiplies fp32 with MKL, which takes slow paths on processors that are not Intel's
(measured on an AMD Zen 5 core: 85 GFLOP/s, oneDNN 180).  There oneDNN, which the same build contains
for fused layers, is called instead.  The choice follows from the processor alone, never from a
measurement, so that two runs on one machine give the same bits.

Considered and left out: apex's fused dense layers (they keep outputs that our backward makes again).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megallama.kernels.candidate import TOLERANCE, Operation, Target, Unsupported, require_close

MatmulNT = Callable[[Tensor, Tensor], Tensor]  # a [m, k], b [n, k] -> a @ b.T [m, n], a new tensor


@dataclass(frozen=True)
class Gemms:
    """The three products of a weight [out, in] with activations x [T, in] and gradients dy [T, out]."""

    fprop: Callable[[Tensor, Tensor], Tensor]  # x, weight -> x @ weight.T
    dgrad: Callable[[Tensor, Tensor], Tensor]  # dy, weight -> dy @ weight
    wgrad: Callable[[Tensor, Tensor, Tensor, bool], None]  # main_grad, dy, x, overwrite: += dy.T @ x


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """torch's own product."""
    return torch.mm(a, b.t())


def onednn_matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """The same through oneDNN, for fp32 in host memory."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def processor() -> str:
    """The vendor of this machine's processor as Linux names it; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _onednn(target: Target) -> MatmulNT:
    if target.device.type != "cpu" or target.dtype != torch.float32:
        raise Unsupported("fp32 on a CPU only")
    if processor() == "GenuineIntel":
        raise Unsupported("MKL is as fast on this processor")
    if not torch.backends.mkldnn.is_available():
        raise Unsupported("this torch was built without oneDNN")
    return onednn_matmul_nt


def check_product(product: MatmulNT, target: Target) -> None:
    """a @ b.T, also of operands that are views."""
    a, b = (target.random(n, 48, seed=n) for n in (33, 40))
    for x, y in ((a, b), (a[:, :40], b.t()[:, :40].t()[:, :40]), (a.t(), b[:33].t())):
        require_close("product", product(x, y), x.double() @ y.double().t(), TOLERANCE[target.dtype])


PRODUCT = Operation([("oneDNN", _onednn)], ("torch mm", lambda target: matmul_nt), check_product)
