"""Pointwise operations: RMSNorm, rotary embedding, SwiGLU, the loss's softmax and gradient.

Backwards need nothing but the input of their forward.  The private formulas are for torch.compile: all
in the accumulation format, where the eager operations round between their steps.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megallama.config.schema import RopeScaling
from megallama.kernels.candidate import APEX, COMPILED, TE, TRITON, Operation, Results, Target, accumulate_dtype

AddNorm = Callable[..., tuple[Tensor, Tensor]]  # what `add_norm` does
AndAgain = Callable[..., tuple[Tensor, Tensor | None]]  # gradient, output if wanted
Norms = tuple[AddNorm, AndAgain]
Swiglus = tuple[Callable[[Tensor], Tensor], AndAgain]
ApplyRope = Callable[[Tensor, Tensor, Tensor, Tensor], None]  # x, cos, sin, out
RotateParts = Callable[[Sequence[Tensor], Tensor, Tensor, Sequence[Tensor], bool], None]  # as `rotate_parts`
Rope = tuple[ApplyRope, RotateParts]
Softmax = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None]  # what `softmax_` does
SoftmaxGradient = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor], None]
CrossEntropy = tuple[Softmax, SoftmaxGradient]
ELEMENTS_IN_FP32 = 1 << 19  # logits in fp32 at a time, when they are computed in 16 bits


@dataclass(frozen=True)
class PointwiseOps:
    """What layers are handed: of any implementation, but a backward goes with its forward."""

    add_norm: AddNorm
    add_norm_backward: AndAgain
    swiglu: Callable[[Tensor], Tensor]
    swiglu_backward: AndAgain
    apply_rope: ApplyRope
    rotate_parts: RotateParts
    softmax_: Softmax
    softmax_gradient_: SoftmaxGradient


def _own(*names: str) -> Callable[[Target], tuple[Any, ...]]:
    """Functions that launch our Triton kernels, whose file nothing else imports."""

    def make(target: Target) -> tuple[Any, ...]:
        target.need_triton()
        from megallama.kernels import triton_kernels

        return tuple(vars(triton_kernels)[name] for name in names)

    return make


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019): ``x / rms(x) * weight``; the same bits on every call."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms of each row, [T, 1] in fp32 (fp64 for fp64)."""
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulate_dtype(x.dtype))
    return norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(dx [T, h] in x's format, dweight [h] in fp32).

    With r = 1/rms, n = x r and p = dy n: dweight is the sum of p over rows, and
    dx = r (dy weight - n mean(p weight)).
    """
    acc_dtype, columns, rstd = accumulate_dtype(x.dtype), x.shape[-1], _inverse_rms(x, eps)
    normed, grad, scale = x.to(acc_dtype) * rstd, dy.to(acc_dtype), weight.to(acc_dtype)
    product = grad * normed
    mean = torch.mv(product, scale).div_(columns).unsqueeze(1)
    dx = (grad * scale).addcmul_(normed, mean, value=-1).mul_(rstd)
    return dx.to(x.dtype), product.sum(0)


def with_additions(norm: Callable[..., Tensor], norm_backward: Callable[..., tuple[Tensor, Tensor]]) -> Norms:
    """Both ways of a norm with what stands beside it, one after the other."""

    def add_norm(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(x + branch, x itself without one; the norm of that), of rows [T, h]."""
        total = x if branch is None else x + branch
        return total, norm(total, weight, eps)

    def add_norm_backward(
        dy: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, main_grad: Tensor, overwrite: bool,
        again: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(the gradient of x, plus `residual` [T, h]; the norm of x if it is wanted `again`).

        The weight's gradient is added to `main_grad` [h], or written over it.
        """
        normed = norm(x, weight, eps) if again else None
        dx, dweight = norm_backward(dy, x, weight, eps)
        main_grad.copy_(dweight) if overwrite else main_grad.add_(dweight)
        return dx if residual is None else dx.add_(residual), normed

    return add_norm, add_norm_backward


add_norm, add_norm_backward = with_additions(rms_norm, rms_norm_backward)


def _norm_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    exact = x.to(accumulate_dtype(x.dtype))
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _norm_backward_formula(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    acc_dtype = accumulate_dtype(x.dtype)
    exact, grad = x.to(acc_dtype), dy.to(acc_dtype)
    rstd = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    product = grad * exact * rstd
    mean = (product * weight).mean(-1, keepdim=True)
    return (rstd * (grad * weight - exact * rstd * mean)).to(x.dtype), product.sum(0)


def _fused_norm(target: Target) -> Norms:
    """The kernel behind the gradient of `F.rms_norm` on CUDA."""
    target.need_cuda()
    backward = torch.ops.aten._fused_rms_norm_backward
    return _norm_pair(
        lambda x, weight, eps: torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps),
        lambda dy, x, rstd, weight, eps: backward(dy, x, [x.shape[-1]], rstd, weight, [True, True]),
    )


def _te_norm(target: Target) -> Norms:
    target.need_half_on_cuda()
    tex = target.te_module()
    kind = target.te_module("transformer_engine.pytorch.constants").TE_DType[target.dtype]
    return _norm_pair(
        lambda x, weight, eps: tex.rmsnorm_fwd(target.contiguous(x), weight, eps, None, None, kind, 0, False),
        lambda dy, x, rstd, weight, eps: tex.rmsnorm_bwd(dy, x, rstd.view(-1), weight, 0, False),
    )


def _apex_norm(target: Target) -> Norms:
    target.need_half_on_cuda()
    extension = target.apex_module("fused_layer_norm_cuda")
    forward, backward = extension.rms_forward_affine, extension.rms_backward_affine
    return _norm_pair(
        lambda x, weight, eps: forward(x, x.shape[1:], weight, eps),
        lambda dy, x, rstd, weight, eps: backward(dy, rstd.view(-1), x, x.shape[1:], weight, eps, False),
    )


def _norm_pair(forward: Callable[..., Any], backward: Callable[..., Any]) -> Norms:
    """Kernels that give 1 / rms of the rows last in their forward, and want it in their backward.

    A layer norms its input again just before that: what came of it is at hand, and else made again.
    """
    latest: list[tuple[weakref.ref[Tensor], int, Tensor]] = []  # the input, its version, 1 / rms

    def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, *_, rstd = forward(x, weight, eps)
        latest[:] = [(weakref.ref(x), x._version, rstd)]
        return out

    def gradients(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        known = [rstd for of, version, rstd in latest if of() is x and version == x._version]
        latest.clear()
        # Transformer Engine and apex round the weight's to its format; sums go on in fp32
        return backward(dy, x, known[0] if known else _inverse_rms(x, eps), weight, eps)[:2]

    return with_additions(normed, gradients)


def _norm_results(pair: Norms, target: Target) -> Results:
    """With and without what is added; the weight's gradient written over, and added."""
    (forward, backward), eps, shape = pair, 1e-5, (48, target.width)
    x, branch, dy, residual = (target.random(*shape, seed=seed) for seed in range(4))
    weight = target.random(target.width, seed=4)
    grad = torch.full((target.width,), 7.0, dtype=accumulate_dtype(x.dtype), device=target.device)
    total, normed = forward(x, branch, weight, eps)
    results = [("output", forward(x, None, weight, eps)[1]), ("sum", total), ("output of the sum", normed)]
    # beside a gradient that is added the norm's own would hardly show
    for added, overwrite, again in ((None, True, False), (residual, False, False), (residual / 64, False, True)):
        dx, normed_again = backward(dy, x, weight, eps, added, grad, overwrite, again)
        results += [("gradient of x", dx), ("gradient of the weight", grad.clone())]
        results += [("output again", normed_again)] if normed_again is not None else []
    return results


RMS_NORM = Operation(
    [
        (COMPILED, lambda t: with_additions(t.compile(_norm_formula), t.compile(_norm_backward_formula))),
        (TE, _te_norm),
        (APEX, _apex_norm),
        (TRITON, _own("add_norm", "add_norm_backward")),
        ("torch fused", _fused_norm),
    ],
    ("torch", lambda target: (add_norm, add_norm_backward)),
    _norm_results,
)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype) -> Tensor:
    """[d/2] angles per position, theta^(-2i/d), of rotary embeddings (Su et al. 2021).

    Scaled for LLaMA 3.1 as in its reference: wavelengths longer than original/low_freq_factor are stretched by
    `factor`, those shorter than original/high_freq_factor kept, those between interpolated linearly.
    YaRN interpolates over i, between where beta_fast and beta_slow turns fill the original context.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).to(dtype) / head_dim
    inverse = 1.0 / (theta**exponent)
    if scaling is None:
        return inverse
    old, smooth = scaling.original_max_position, torch.zeros_like(inverse)  # linear: all are stretched
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / inverse
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = (old / wavelength - low) / (high - low)
        smooth = smooth.clamp(0, 1)
    elif scaling.kind == "yarn":
        turns = (scaling.beta_fast, scaling.beta_slow)
        fast, slow = (head_dim * math.log(old / (2 * math.pi * n)) / (2 * math.log(theta)) for n in turns)
        first, last = max(math.floor(fast), 0), min(math.ceil(slow), head_dim - 1)
        steps = torch.arange(head_dim // 2).to(dtype) - first
        smooth = 1 - (steps / (last - first or 0.001)).clamp(0, 1)
    return (1 - smooth) * inverse / scaling.factor + smooth * inverse


def attention_factor(scaling: RopeScaling | None) -> float:
    """What YaRN multiplies rotated queries and keys by; 1 without it."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(max(scaling.factor, 1.0)) + 1


def rope_tables(
    seq_length: int, head_dim: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [s, 1, d/2] in `dtype`: of positions 0..s-1, times `attention_factor`."""
    angles = torch.outer(torch.arange(seq_length).to(dtype), inverse_frequencies(head_dim, theta, scaling, dtype))
    cos, sin = (turned.unsqueeze(1) * attention_factor(scaling) for turned in (angles.cos(), angles.sin()))
    return cos.to(device), sin.to(device)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate x [b, s, heads, d] by its positions into `out`, perhaps x; -sin gives the gradient.

    Element i is rotated with i + d/2, as Hugging Face does.
    """
    # fp32 for 16 bits; in place, both halves are read after the first is written
    exact = x.to(cos.dtype, copy=out.data_ptr() == x.data_ptr())
    rotated = out if out.dtype == cos.dtype else torch.empty_like(exact)
    (a, b), (first, second) = exact.chunk(2, -1), rotated.chunk(2, -1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    if rotated is not out:
        out.copy_(rotated)


def _rotate_parts(
    rotate: ApplyRope, parts: Sequence[Tensor], cos: Tensor, sin: Tensor, out: Sequence[Tensor], back: bool
) -> None:
    """q [b, s, n, d], k and v [b, s, k, d] into `out`: q and k rotated, or `back`, and v."""
    sin = -sin if back else sin
    for part, to in zip(parts[:2], out[:2], strict=True):
        rotate(part, cos, sin, to)
    out[2].copy_(parts[2])


rotate_parts = partial(_rotate_parts, apply_rope)


def _compiled_rope(target: Target) -> Rope:
    rotated = target.compile(_rope_formula)

    def into(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
        out.copy_(rotated(x, cos, sin))

    return into, partial(_rotate_parts, into)


def _rope_formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def _rope_results(pair: Rope, target: Target) -> Results:
    """As layers do: q and k in place, before v; all three into tensors of their own; back."""
    packed, angles = target.random(2, 16, 8, 32), target.random(2, 16, 1, 16, seed=1)
    angles = (angles if target.documents else angles[0]).to(accumulate_dtype(packed.dtype))
    cos, sin, out, back = angles.cos(), angles.sin(), packed.clone(), torch.empty_like(packed)
    pair[0](out[:, :, :6], cos, sin, out[:, :, :6])
    dq, dk, dv = target.random(2, 16, 4, 32, seed=2), target.random(2, 16, 2, 32, seed=3), packed[:, :, 6:]
    apart = [torch.empty_like(part) for part in (dq, dk, dv)]
    pair[1](packed.split([4, 2, 2], 2), cos, sin, apart, False)
    pair[1]((dq, dk, dv), cos, sin, back.split([4, 2, 2], 2), True)
    return [("rotated heads", out), ("heads apart", torch.cat(apart, 2)), ("heads rotated back", back)]


ROPE = Operation(
    [(COMPILED, _compiled_rope), (TRITON, _own("apply_rope", "rotate_parts"))],
    ("torch", lambda target: (apply_rope, rotate_parts)),
    _rope_results,
)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020) of both, packed: [T, 2f] -> [T, f]."""
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


def with_product(forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor]) -> Swiglus:
    """Both ways, the second (dout, gate_up, again) -> (gradient, the product if wanted `again`)."""

    def gradient(dout: Tensor, gate_up: Tensor, again: bool) -> tuple[Tensor, Tensor | None]:
        product = forward(gate_up) if again else None
        return backward(dout, gate_up), product

    return forward, gradient


SWIGLUS = with_product(swiglu, swiglu_backward)


def _swiglu_formula(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.to(accumulate_dtype(gate_up.dtype)).chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _swiglu_backward_formula(dout: Tensor, gate_up: Tensor) -> Tensor:
    acc_dtype = accumulate_dtype(gate_up.dtype)
    (gate, up), grad = gate_up.to(acc_dtype).chunk(2, -1), dout.to(acc_dtype)
    prob = torch.sigmoid(gate)
    dgate = grad * up * prob * (1 + gate * (1 - prob))
    return torch.cat((dgate.to(dout.dtype), (grad * gate * prob).to(dout.dtype)), -1)


def _te_swiglu(target: Target) -> Swiglus:
    target.need_half_on_cuda()
    tex = target.te_module()
    return with_product(lambda gate_up: tex.swiglu(gate_up, None), lambda dout, x: tex.dswiglu(dout, x, None))


def _swiglu_results(pair: Swiglus, target: Target) -> Results:
    packed, results = target.random(16, 2080), Results()
    for again in (False, True):
        grad, product = pair[1](target.random(16, 1040, seed=1), packed, again)
        results += [("gradient", grad), ("output", pair[0](packed) if product is None else product)]
    return results


SWIGLU = Operation(
    [
        (COMPILED, lambda t: with_product(t.compile(_swiglu_formula), t.compile(_swiglu_backward_formula))),
        (TE, _te_swiglu),
        (TRITON, _own("swiglu", "swiglu_backward")),
    ],
    ("torch", lambda target: SWIGLUS),
    _swiglu_results,
)


def _blocks(matrix: Tensor) -> Iterable[slice]:
    """Rows that may exist in fp32 at a time: on a GPU all, for each pass is a launch."""
    if matrix.is_cuda:
        return [slice(None)]
    at_once = max(1, ELEMENTS_IN_FP32 // matrix.shape[1])
    return (slice(a, a + at_once) for a in range(0, len(matrix), at_once))


def _in_blocks(rows_: Callable[..., None]) -> Softmax:
    """`rows_` on as few rows at a time as may exist in fp32."""

    def into(logits: Tensor, *others: Tensor | None) -> None:
        for rows in _blocks(logits):
            rows_(logits[rows], *(None if other is None else other[rows] for other in others))

    return into


@_in_blocks
def softmax_(logits: Tensor, index: Tensor, log_sum: Tensor, picked: Tensor, scale: Tensor | None) -> None:
    """Replace `logits` [r, v] by their softmax, times `scale` [r] if it is given.

    Writes log(sum(exp(logits))) [r] and the logit [r] at `index` [r, 1] in the format of `log_sum`, in
    which all is computed, a few rows at a time.  Others may leave the logits to `softmax_gradient_`.
    """
    exact = logits.to(log_sum.dtype)
    probs = torch.softmax(exact, 1)
    # no more exponentials: the largest probability is exp(largest logit) / sum
    log_sum.copy_(exact.amax(1) - probs.amax(1).log())
    picked.copy_(exact.gather(1, index).squeeze(1))
    if scale is not None:  # two passes: a product rounded as it is written takes longer
        probs = torch.mul(probs, scale.unsqueeze(1), out=logits if logits.dtype == probs.dtype else probs)
    if probs is not logits:
        logits.copy_(probs)


def softmax_at_once_(logits: Tensor, index: Tensor, log_sum: Tensor, picked: Tensor, scale: Tensor | None) -> None:
    """`softmax_` for a GPU: fewer passes over more rows, one copy in the format of `log_sum`."""
    picked.copy_(logits.gather(1, index).squeeze(1))
    top = logits.amax(1, keepdim=True).to(log_sum.dtype)
    powers = (logits - top).exp_()
    total = powers.sum(1)
    torch.add(total.log(), top.squeeze(1), out=log_sum)
    factors = total.reciprocal_() if scale is None else scale / total
    torch.mul(powers, factors.unsqueeze(1), out=logits)


def softmax_gradient_(
    logits: Tensor, index: Tensor, at_label: Tensor, scale: Tensor, log_sum: Tensor | None, total: Tensor
) -> None:
    """Turn what `softmax_` has left in `logits` [r, v] into the gradient of the loss, in place.

    Its columns are a tensor-parallel rank's: `total` [r] is of all, `log_sum` [r] theirs, or None if that is all: then
    `softmax_` had `scale` [r].  At `index` [r, 1] `at_label` [r] is subtracted: the scale, 0 of others' labels.
    """
    if log_sum is not None:
        factors = torch.exp(log_sum - total) * scale
        for rows in _blocks(logits):
            logits[rows] = logits[rows].to(factors.dtype).mul_(factors[rows].unsqueeze(1))
    if logits.is_cuda:  # one element a row; on a CPU, in 16 bits, it copies all, twice
        logits.scatter_add_(1, index, -at_label.to(logits.dtype).unsqueeze(1))
        return
    every = torch.arange(len(logits), device=logits.device)
    logits[every, index.squeeze(1)] -= at_label.to(logits.dtype)


def _compiled_softmax(target: Target) -> CrossEntropy:
    formula = target.compile(_softmax_formula)

    def into(logits: Tensor, index: Tensor, log_sum: Tensor, picked: Tensor, scale: Tensor | None) -> None:
        for to, new in zip((logits, log_sum, picked), formula(logits, index, scale, log_sum.dtype), strict=True):
            to.copy_(new)

    return _in_blocks(into), softmax_gradient_


def _softmax_formula(
    logits: Tensor, index: Tensor, scale: Tensor | None, acc_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    exact = logits.to(acc_dtype)
    top = exact.amax(1)
    powers = torch.exp(exact - top.unsqueeze(1))
    total = powers.sum(1)
    probs = powers * ((1 if scale is None else scale) / total).unsqueeze(1)
    return probs.to(logits.dtype), top + total.log(), exact.gather(1, index).squeeze(1)


def _cross_entropy_results(pair: CrossEntropy, target: Target) -> Results:
    """Of a rank with all columns, and of one with some, and two thirds of the labels."""
    rows = torch.arange(24, device=target.device)
    index, results = (rows * 177).unsqueeze(1), Results()
    other = target.random(24, seed=1).to(accumulate_dtype(target.random(1).dtype)) + 8
    scale, (log_sum, picked) = rows.to(other.dtype) / 12, torch.empty(2, 24, dtype=other.dtype, device=target.device)
    for alone in (True, False):
        logits = target.random(24, 4256)[:, :4240]  # beside padding
        pair[0](logits, index, log_sum, picked, scale if alone else None)
        total = log_sum if alone else torch.logaddexp(log_sum, other)
        at_label = scale if alone else scale * (rows % 3 > 0)
        results += [("logarithm of the sum", log_sum.clone()), ("picked logits", picked.clone())]
        pair[1](logits, index, at_label, scale, None if alone else log_sum, total)
        # apart: labels would outweigh thousands of small probabilities
        results += [("probabilities", logits.scatter(1, index, 0)), ("gradient at labels", logits.gather(1, index))]
    return results


CROSS_ENTROPY = Operation(
    [(COMPILED, _compiled_softmax), (TRITON, _own("log_sums", "gradient_"))],
    ("torch", lambda target: (softmax_at_once_ if target.device.type == "cuda" else softmax_, softmax_gradient_)),
    _cross_entropy_results,
)
