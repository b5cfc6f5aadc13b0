"""SwiGLU (Shazeer 2020) on the packed output of gate and up: [T, 2f] -> [T, f], and its gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megallama.kernels.candidate import COMPILED, TE, Operation, Target, require_all_close
from megallama.kernels.compiled import compiled
from megallama.kernels.dtypes import accumulate_dtype

SwigluPair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]


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


def compiled_swiglu(target: Target) -> SwigluPair:
    """The formulas below, fused by torch.compile."""
    return compiled(_swiglu, target), compiled(_swiglu_backward, target)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.to(accumulate_dtype(gate_up.dtype)).chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _swiglu_backward(dout: Tensor, gate_up: Tensor) -> Tensor:
    acc_dtype = accumulate_dtype(gate_up.dtype)
    (gate, up), grad = gate_up.to(acc_dtype).chunk(2, -1), dout.to(acc_dtype)
    prob = torch.sigmoid(gate)
    dgate = grad * up * prob * (1 + gate * (1 - prob))
    return torch.cat((dgate.to(dout.dtype), (grad * gate * prob).to(dout.dtype)), -1)


def _te_swiglu(target: Target) -> SwigluPair:
    """Transformer Engine's, one kernel each way."""
    target.need_half_on_cuda()
    tex = target.te_module()
    return lambda gate_up: tex.swiglu(gate_up, None), lambda dout, gate_up: tex.dswiglu(dout, gate_up, None)


def check_swiglu(pair: SwigluPair, target: Target) -> None:
    """SwiGLU on packed gate and up, and its gradient."""
    forward, backward = pair
    packed, dout = target.random(48, 64), target.random(48, 32, seed=1)
    want = [_swiglu(packed.double()), _swiglu_backward(dout.double(), packed.double())]
    results = {"output": forward(packed), "gradient": backward(dout.clone(), packed)}
    require_all_close(results, want, target)


SWIGLU = Operation(
    [(COMPILED, compiled_swiglu), (TE, _te_swiglu)],
    ("torch", lambda target: (swiglu, swiglu_backward)),
    check_swiglu,
)
