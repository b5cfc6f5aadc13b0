"""SwiGLU (Shazeer 2020) on the packed output of gate and up: [T, 2f] -> [T, f], and its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward(dout: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient [T, 2f] of gate_up; `dout` [T, f] is overwritten.

    d(up) = dout * silu(gate);  d(gate) = dout * up * silu'(gate).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    grad = torch.empty_like(gate_up)
    dgate, dup = grad.chunk(2, dim=-1)
    torch.mul(F.silu(gate), dout, out=dup)
    dgate.copy_(torch.ops.aten.silu_backward(dout.mul_(up), gate))
    return grad
