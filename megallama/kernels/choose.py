"""Which implementation does each operation: candidates in order, each tried on the device before it is taken.

A candidate is refused with a reason: its package is missing or fails to import (any exception
counts), the device or number format is not its own, or its result on a small problem differs from
the plain formula.  So a broken installation costs a line in the log, never a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megallama.config.errors import MegallamaError
from megallama.config.schema import OptimizerConfig
from megallama.kernels import accelerated
from megallama.kernels.adam import AdamWStep, adamw_step
from megallama.kernels.attention import Attend, blocked_attention, plain_attention, sdpa
from megallama.kernels.documents import Documents
from megallama.kernels.gemm import MatmulNT, matmul_nt, onednn_matmul_nt, processor
from megallama.kernels.norm import accumulate_dtype
from megallama.kernels.wgrad import AddWgrad, add_wgrad_cuda, add_wgrad_with


@dataclass(frozen=True)
class Choice:
    """What was taken for an operation, and why not the ones before it."""

    operation: str
    taken: str
    refused: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.refused)
        return f"{self.operation}: {self.taken}" + (f" ({reasons})" if reasons else "")


@dataclass(frozen=True)
class Kernels:
    """The operations that have more than one implementation."""

    attention: Callable[[int, int, int], Attend]  # query heads, kv heads, head size -> attention
    matmul_nt: MatmulNT
    add_wgrad: AddWgrad
    adamw: AdamWStep
    choices: tuple[Choice, ...]


Candidate = tuple[str, Callable[[], Any]]
MakeAttention = Callable[[int, int, int], Attend]  # query heads, kv heads, head size
SDPA = "torch scaled_dot_product_attention"


def choose_kernels(device: torch.device, dtype: torch.dtype, *, documents: bool = False) -> Kernels:
    """Try the candidates of every operation on `device`; with `documents`, attention must also keep them apart.

    Raises: MegallamaError if no attention here does.
    """
    cuda = device.type == "cuda"

    def checked(make: MakeAttention) -> MakeAttention:
        return _checked_attention(make, device, dtype, documents)

    attention, chose_attention = _first(
        "attention",
        [
            ("Transformer Engine", lambda: checked(accelerated.te_attention(cuda, dtype))),
            ("blocks of matrix products", lambda: checked(_blocked(cuda, dtype))),
        ],
        (SDPA, lambda num_heads, num_kv_heads, head_dim: sdpa),
    )
    if documents and chose_attention.taken == SDPA:
        _documents_apart(attention, device, dtype)
    product, chose_product = _first(
        "matrix product",
        [("oneDNN", lambda: _checked_product(_onednn(device, dtype), dtype))],
        ("torch mm", matmul_nt),
    )
    wgrad, chose_wgrad = _first(
        "weight gradient",
        [
            ("Transformer Engine", lambda: _checked_wgrad(accelerated.te_wgrad(cuda, dtype), device, dtype)),
            ("apex", lambda: _checked_wgrad(accelerated.apex_wgrad(cuda, dtype), device, dtype)),
            ("torch addmm into fp32", lambda: _checked_wgrad(_torch_wgrad(cuda, dtype), device, dtype)),
        ],
        (f"{chose_product.taken}, then add", add_wgrad_with(product)),
    )
    adam, chose_adam = _first(
        "AdamW",
        [
            ("Transformer Engine", lambda: _checked_adam(accelerated.te_adam(cuda), device)),
            ("apex", lambda: _checked_adam(accelerated.apex_adam(cuda), device)),
        ],
        ("torch fused", adamw_step),
    )
    return Kernels(attention, product, wgrad, adam, (chose_attention, chose_product, chose_wgrad, chose_adam))


def _first(operation: str, candidates: Sequence[Candidate], fallback: tuple[str, Any]) -> tuple[Any, Choice]:
    refused: list[tuple[str, str]] = []
    for name, make in candidates:
        try:
            return make(), Choice(operation, name, tuple(refused))
        except Exception as error:  # noqa: BLE001 - a broken package may raise anything; the reason is kept
            refused.append((name, str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__))
    return fallback[1], Choice(operation, fallback[0], tuple(refused))


def _torch_wgrad(cuda: bool, dtype: torch.dtype) -> AddWgrad:
    if not cuda or accumulate_dtype(dtype) == dtype:
        raise accelerated.Refused("CUDA with 16-bit weights only")
    return add_wgrad_cuda


def _blocked(cuda: bool, dtype: torch.dtype) -> MakeAttention:
    if cuda or dtype not in (torch.bfloat16, torch.float16):
        raise accelerated.Refused("16-bit formats on a CPU only")
    return lambda num_heads, num_kv_heads, head_dim: blocked_attention


def _onednn(device: torch.device, dtype: torch.dtype) -> MatmulNT:
    if device.type != "cpu" or dtype != torch.float32:
        raise accelerated.Refused("fp32 on a CPU only")
    if processor() == "GenuineIntel":
        raise accelerated.Refused("MKL is as fast on this processor")
    if not torch.backends.mkldnn.is_available():
        raise accelerated.Refused("this torch was built without oneDNN")
    return onednn_matmul_nt


def _checked_product(product: MatmulNT, dtype: torch.dtype) -> MatmulNT:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 48, generator=generator).to(dtype) for n in (33, 40))
    for x, y in ((a, b), (a[:, :40], b.t()[:, :40].t()[:, :40]), (a.t(), b[:33].t())):
        _agree("product", product(x, y), x.double() @ y.double().t(), 1e-5)
    return product


def _checked_attention(
    make: MakeAttention, device: torch.device, dtype: torch.dtype, documents: bool = False
) -> MakeAttention:
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(2, 128, n, 64, device=device, generator=generator).to(dtype) for n in (4, 2, 2))
    starts = torch.tensor([[0] * 70 + [70] * 58, [0] + [1] * 29 + [30] * 98], device=device)
    for case in (None, Documents.of(starts)) if documents else (None,):
        where = " within documents" if case else ""
        leaves = [[t.clone().requires_grad_() for t in (q, k, v)] for _ in range(2)]
        attends = make(4, 2, 64), plain_attention
        outs = [attend(q, k, v, case) for attend, (q, k, v) in zip(attends, leaves, strict=True)]
        for out in outs:
            out.reshape(2, 128, -1).square().sum().backward()
        _agree(f"output{where}", outs[0].reshape(outs[1].shape), outs[1], 2e-2)
        for name, mine, theirs in zip("qkv", *leaves, strict=True):
            assert mine.grad is not None and theirs.grad is not None
            _agree(f"gradient of {name}{where}", mine.grad, theirs.grad, 4e-2)
    return make


def _documents_apart(make: MakeAttention, device: torch.device, dtype: torch.dtype) -> None:
    try:
        _checked_attention(make, device, dtype, documents=True)
    except accelerated.Refused as error:
        raise MegallamaError(
            f"no attention here keeps documents apart: torch's {error}; use data.document_mask=false or another torch"
        ) from error


def _checked_wgrad(add: AddWgrad, device: torch.device, dtype: torch.dtype) -> AddWgrad:
    generator = torch.Generator(device).manual_seed(0)
    dy, x = (torch.randn(64, n, device=device, generator=generator).to(dtype) for n in (32, 48))
    want = dy.double().t() @ x.double()
    out = torch.full((32, 48), 7.0, dtype=torch.float32, device=device)
    add(out, dy, x, True)
    _agree("overwritten", out, want, 1e-5)
    add(out, dy, x, False)
    _agree("accumulated", out, 2 * want, 1e-5)
    return add


def _checked_adam(step: AdamWStep, device: torch.device) -> AdamWStep:
    results = []
    for one in (step, adamw_step):
        generator = torch.Generator(device).manual_seed(0)
        master, grad = (torch.randn(1000, device=device, generator=generator) for _ in range(2))
        state = [torch.zeros_like(master), torch.zeros_like(master), torch.zeros((), device=device)]
        for _ in range(3):
            divisor = torch.tensor(2.0, device=device)
            one([master], [grad.clone()], [state[0]], [state[1]], [state[2]], OptimizerConfig(), 1e-2, 0.1, divisor)
        results.append((master, *state))
    for name, mine, theirs in zip(("weights", "first moment", "second moment", "step"), *results, strict=True):
        _agree(name, mine, theirs, 1e-5)
    return step


def _agree(what: str, mine: Tensor, theirs: Tensor, tolerance: float) -> None:
    mine, theirs = mine.detach().double(), theirs.detach().double()
    error = float((mine - theirs).norm() / theirs.norm())
    if not error <= tolerance:
        raise accelerated.Refused(f"{what} differs from the plain formula by {error:.1e}")
