"""A candidate's result on a small problem against the plain formula in float64: forward, backward, accumulation.

Each check takes the candidate and the `Place`, and raises `Refused` with what differs and by how much (relative to
the norm of what it should be).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megallama.config.schema import OptimizerConfig
from megallama.kernels.adam import AdamWStep, SumOfSquares, adamw_step
from megallama.kernels.attention import MakeAttention, plain_attention
from megallama.kernels.documents import Documents
from megallama.kernels.gemm import Gemms, MatmulNT, matmul_nt
from megallama.kernels.norm import NormPair, accumulate_dtype
from megallama.kernels.rope import Rotate
from megallama.kernels.wgrad import AddWgrad


class Refused(Exception):
    """A candidate that cannot be used here, with the reason."""


class Wrong(Refused):
    """A candidate that computes something else."""


@dataclass(frozen=True)
class Place:
    """Where and for what kernels are chosen."""

    device: torch.device
    dtype: torch.dtype
    documents: bool = False  # attention must keep them apart
    compiled: bool = False  # run.compile
    product: MatmulNT = matmul_nt  # the matrix product that was chosen

    def need_cuda(self) -> None:
        if self.device.type != "cuda":
            raise Refused("no CUDA device")

    def need_half_on_cuda(self) -> None:
        self.need_cuda()
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise Refused(f"16-bit formats only, not {self.dtype}")


TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-12}


def check_attention(make: MakeAttention, place: Place) -> None:
    """Causal attention with grouped heads, and within documents where they matter."""
    q, k, v = (_random(place, 2, 128, n, 64, seed=n) for n in (4, 2, 2))
    starts = torch.tensor([[0] * 70 + [70] * 58, [0] + [1] * 29 + [30] * 98], device=place.device)
    for case in (None, Documents.of(starts)) if place.documents else (None,):
        where = " within documents" if case else ""
        leaves = [[t.clone().requires_grad_() for t in (q, k, v)] for _ in range(2)]
        attends = make(4, 2, 64), plain_attention
        outs = [attend(q, k, v, case) for attend, (q, k, v) in zip(attends, leaves, strict=True)]
        for out in outs:
            out.reshape(2, 128, -1).square().sum().backward()
        agree(f"output{where}", outs[0].reshape(outs[1].shape), outs[1], 2e-2)
        for name, mine, theirs in zip("qkv", *leaves, strict=True):
            assert mine.grad is not None and theirs.grad is not None
            agree(f"gradient of {name}{where}", mine.grad, theirs.grad, 4e-2)


def check_norm(pair: NormPair, place: Place) -> None:
    """RMSNorm and the gradients of its input and weight."""
    (forward, backward), eps = pair, 1e-5
    x, dy, weight = (_random(place, *shape, seed=i) for i, shape in enumerate([(48, 64), (48, 64), (64,)]))
    wide = [t.double().clone().requires_grad_() for t in (x, weight)]
    want = wide[0] * torch.rsqrt(wide[0].square().mean(-1, keepdim=True) + eps) * wide[1]
    want.backward(dy.double())
    dx, dweight = backward(dy, x, weight, eps)
    _agree_all(
        {"output": forward(x, weight, eps), "gradient of x": dx, "gradient of the weight": dweight},
        [want, wide[0].grad, wide[1].grad], place,
    )  # fmt: skip


def check_swiglu(pair: tuple[Callable[..., Tensor], Callable[..., Tensor]], place: Place) -> None:
    """SwiGLU on packed gate and up, and its gradient."""
    forward, backward = pair
    packed, dout = _random(place, 48, 64), _random(place, 48, 32, seed=1)
    leaf = packed.double().clone().requires_grad_()
    want = F.silu(leaf[:, :32]) * leaf[:, 32:]
    want.backward(dout.double())
    _agree_all({"output": forward(packed), "gradient": backward(dout.clone(), packed)}, [want, leaf.grad], place)


def check_rotate(rotate: Rotate, place: Place) -> None:
    """A turn in place and its inverse, the gradient."""
    x, angles = _random(place, 2, 16, 3, 8), _random(place, 16, 1, 4, seed=1).to(accumulate_dtype(place.dtype))
    a, b = x.double().chunk(2, -1)
    cos, sin = angles.double().cos(), angles.double().sin()
    out = x.clone()
    rotate(out, angles.cos(), angles.sin(), out)
    back = torch.empty_like(x)
    rotate(out, angles.cos(), -angles.sin(), back)
    want = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    _agree_all({"turned heads": out, "heads turned back": back}, [want, x], place)


def check_softmax(softmax_: Callable[..., Any], place: Place) -> None:
    """Probabilities in place, their logarithm's sum and the picked logits."""
    logits, wide = _random(place, 24, 61), accumulate_dtype(place.dtype)
    index = torch.arange(24, device=place.device).unsqueeze(1)
    scale = index.squeeze(1).to(wide) / 12
    for case in (None, scale):
        rows, log_sum, picked = logits.clone(), scale.clone(), scale.clone()
        softmax_(rows, index, log_sum, picked, case)
        exact = logits.double()
        chances = exact.softmax(1) * (1 if case is None else case.double().unsqueeze(1))
        want = [chances, exact.logsumexp(1), exact.gather(1, index).squeeze(1)]
        _agree_all({"probabilities": rows, "logarithm of the sum": log_sum, "picked logits": picked}, want, place)


def check_product(product: MatmulNT, place: Place) -> None:
    """a @ b.T, also of operands that are views."""
    a, b = (_random(place, n, 48, seed=n) for n in (33, 40))
    for x, y in ((a, b), (a[:, :40], b.t()[:, :40].t()[:, :40]), (a.t(), b[:33].t())):
        agree("product", product(x, y), x.double() @ y.double().t(), TOLERANCE[place.dtype])


def check_wgrad(add: AddWgrad, place: Place, tolerance: float = 1e-5) -> None:
    """dy.T @ x written over what was there, and added to it."""
    dy, x = (_random(place, 64, n, seed=n) for n in (32, 48))
    want = dy.double().t() @ x.double()
    out = torch.full((32, 48), 7.0, dtype=accumulate_dtype(place.dtype), device=place.device)
    add(out, dy, x, True)
    agree("overwritten", out, want, tolerance)
    add(out, dy, x, False)
    agree("accumulated", out, 2 * want, tolerance)


def check_fp8(gemms: Gemms, place: Place) -> None:
    """All three products within what rounding normal operands to fp8 costs: 2.6 % (E4M3), 5.2 % (E5M2) each."""
    x, dy, weight = (_random(place, *shape, seed=shape[1]) for shape in ((64, 48), (64, 32), (32, 48)))
    agree("product", gemms.project(x, weight), x.double() @ weight.double().t(), 6e-2)
    agree("gradient of the input", gemms.project_back(dy, weight), dy.double() @ weight.double(), 8e-2)
    check_wgrad(gemms.add_wgrad, place, 8e-2)


def check_adam(step: AdamWStep, place: Place) -> None:
    """Three steps beside torch's."""
    results = []
    for one in (step, adamw_step):
        master, grad = (_random(replace(place, dtype=torch.float32), 1000, seed=i) for i in range(2))
        state = [torch.zeros_like(master), torch.zeros_like(master), torch.zeros((), device=place.device)]
        for _ in range(3):
            divisor = torch.tensor(2.0, device=place.device)
            one([master], [grad.clone()], [state[0]], [state[1]], [state[2]], OptimizerConfig(), 1e-2, 0.1, divisor)
        results.append((master, *state))
    for name, mine, theirs in zip(("weights", "first moment", "second moment", "step"), *results, strict=True):
        agree(name, mine, theirs, 1e-5)


def check_sum_of_squares(sum_of_squares: SumOfSquares, place: Place) -> None:
    """Over tensors of several lengths, one of them empty, with more equal terms than a plain fp32 sum bears."""
    runs, wide = ((0.1, 700_001), (0.2, 0), (0.3, 17)), accumulate_dtype(place.dtype)
    tensors = [torch.full((n,), value, dtype=wide, device=place.device) for value, n in runs]
    want = sum(float(t.double().square().sum()) for t in tensors)
    agree("sum of squares", sum_of_squares(tensors), torch.tensor(want), 1e-5)


def agree(what: str, mine: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Raises: Refused if `mine` is further from `theirs` than `tolerance`, or not a number."""
    mine, theirs = mine.detach().double(), theirs.detach().double().to(mine.device)
    error = float((mine - theirs).norm() / theirs.norm())
    if not error <= tolerance:
        raise Wrong(f"{what} differs from the plain formula by {error:.1e}")


def _agree_all(mine: dict[str, Tensor], theirs: Sequence[Tensor | None], place: Place) -> None:
    for (what, got), want in zip(mine.items(), theirs, strict=True):
        assert want is not None
        agree(what, got, want, TOLERANCE[place.dtype])


def _random(place: Place, *shape: int, seed: int = 0) -> Tensor:
    generator, wide = torch.Generator(place.device).manual_seed(seed), accumulate_dtype(place.dtype)
    return torch.randn(shape, device=place.device, generator=generator, dtype=wide).to(place.dtype)
