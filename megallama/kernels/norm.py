"""RMSNorm (Zhang & Sennrich 2019) and its gradient, for activations [T, h] and a weight [h].

The backward needs nothing but the input: the root mean squares are formed again in its own pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megallama.kernels.candidate import APEX, COMPILED, TE, Operation, Target, require_all_close
from megallama.kernels.compiled import compiled
from megallama.kernels.dtypes import accumulate_dtype

NormPair = tuple[Callable[[Tensor, Tensor, float], Tensor], Callable[..., tuple[Tensor, Tensor]]]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` in x's format; the same bits on every call."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms of each row, [T, 1] in fp32 (fp64 for fp64)."""
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulate_dtype(x.dtype))
    return norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(dx [T, h] in x's format, dweight [h] in fp32).

    With r = 1/rms, n = x r and p = dy n: dweight is the sum of p over rows, and
    dx = r (dy weight - n mean(p weight)).
    """
    acc_dtype, columns, rstd = accumulate_dtype(x.dtype), x.shape[-1], inverse_rms(x, eps)
    normed, grad, scale = x.to(acc_dtype) * rstd, dy.to(acc_dtype), weight.to(acc_dtype)
    product = grad * normed
    mean = torch.mv(product, scale).div_(columns).unsqueeze(1)
    dx = (grad * scale).addcmul_(normed, mean, value=-1).mul_(rstd)
    return dx.to(x.dtype), product.sum(0)


def fused_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The kernel behind the gradient of `F.rms_norm` on CUDA, given statistics made again from the input."""
    backward = torch.ops.aten._fused_rms_norm_backward
    dx, dweight = backward(dy, x, [x.shape[-1]], inverse_rms(x, eps), weight, [True, True])
    return dx, dweight.to(accumulate_dtype(x.dtype))


def _torch_fused(target: Target) -> NormPair:
    target.need_cuda()
    return rms_norm, fused_norm_backward


def compiled_norm(target: Target) -> NormPair:
    """The formulas below, fused by torch.compile."""
    return compiled(_rms_norm, target), compiled(_rms_norm_backward, target)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    exact = x.to(accumulate_dtype(x.dtype))
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    acc_dtype = accumulate_dtype(x.dtype)
    exact, grad = x.to(acc_dtype), dy.to(acc_dtype)
    rstd = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    product = grad * exact * rstd
    mean = (product * weight).mean(-1, keepdim=True)
    return (rstd * (grad * weight - exact * rstd * mean)).to(x.dtype), product.sum(0)


def _te_norm(target: Target) -> NormPair:
    """Transformer Engine's RMSNorm. Its gradient of the weight is rounded to the weight's format."""
    target.need_half_on_cuda()
    tex = target.te_module()
    kind = target.te_module("transformer_engine.pytorch.constants").TE_DType[target.dtype]
    return _norm_pair(
        lambda x, weight, eps: tex.rmsnorm_fwd(x, weight, eps, None, None, kind, 0, False),
        lambda dy, x, rstd, weight, eps: tex.rmsnorm_bwd(dy, x, rstd, weight, 0, False),
    )


def _apex_norm(target: Target) -> NormPair:
    """apex's RMSNorm. Its gradient of the weight is rounded to the weight's format."""
    target.need_half_on_cuda()
    extension = target.apex_module("fused_layer_norm_cuda")
    return _norm_pair(
        lambda x, weight, eps: extension.rms_forward_affine(x, x.shape[1:], weight, eps),
        lambda dy, x, rstd, weight, eps: extension.rms_backward_affine(dy, rstd, x, x.shape[1:], weight, eps, False),
    )


def _norm_pair(forward: Callable[..., Any], backward: Callable[..., Any]) -> NormPair:
    def gradients(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        dx, dweight = backward(dy, x, inverse_rms(x, eps).view(-1), weight, eps)[:2]
        return dx, dweight.float()

    return lambda x, weight, eps: forward(x, weight, eps)[0], gradients


def check_norm(pair: NormPair, target: Target) -> None:
    """RMSNorm and the gradients of its input and weight."""
    (forward, backward), eps = pair, 1e-5
    x, dy, weight = (target.random(*shape, seed=i) for i, shape in enumerate([(48, 64), (48, 64), (64,)]))
    exact = x.double(), weight.double()
    want = [_rms_norm(*exact, eps), *_rms_norm_backward(dy.double(), *exact, eps)]
    dx, dweight = backward(dy, x, weight, eps)
    results = {"output": forward(x, weight, eps), "gradient of x": dx, "gradient of the weight": dweight}
    require_all_close(results, want, target)


RMS_NORM = Operation(
    [(COMPILED, compiled_norm), (TE, _te_norm), (APEX, _apex_norm), ("torch fused", _torch_fused)],
    ("torch", lambda target: (rms_norm, rms_norm_backward)),
    check_norm,
)
