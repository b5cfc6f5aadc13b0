"""Which implementation does each operation: candidates in order, each tried on the device before it is taken.

A candidate is refused with a reason: its package is missing or fails to import (any exception
counts), the device or number format is not its own, the user left it out (`run.without_kernels`), or its result on a
small problem differs from the plain formula.  So a broken installation costs a line in the log, never a run.

The order is fixed, never measured when a run starts: two ranks could take different candidates, and norms replicated
over tensor-parallel ranks would drift apart; a run that resumed would not repeat its bits.  ``tools/doctor.py
--measure`` times every candidate; what is slower on a device `run.without_kernels` leaves out, on all ranks alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch

from megallama.config.errors import MegallamaError
from megallama.kernels import accelerated, checks
from megallama.kernels.adam import AdamWStep, SumOfSquares, adamw_step, sum_of_squares
from megallama.kernels.attention import MakeAttention, blocked_attention, sdpa
from megallama.kernels.checks import Place, Refused, Wrong
from megallama.kernels.fp8 import TORCH_FP8
from megallama.kernels.gemm import Gemms, MatmulNT, matmul_nt, onednn_matmul_nt, processor
from megallama.kernels.leaves import EAGER, Leaves, compiled_leaf
from megallama.kernels.norm import NormPair, accumulate_dtype, fused_norm_backward, rms_norm
from megallama.kernels.wgrad import AddWgrad, add_wgrad_cuda, add_wgrad_with


@dataclass(frozen=True)
class Choice:
    """What was taken for an operation, and why not the ones before it."""

    operation: str
    taken: str
    refused: tuple[tuple[str, str], ...]
    broken: bool = False  # a candidate before it is installed and does not work

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.refused)
        return f"{self.operation}: {self.taken}" + (f" ({reasons})" if reasons else "")


@dataclass(frozen=True)
class Kernels:
    """The operations that have more than one implementation."""

    attention: MakeAttention
    leaves: Leaves
    gemms: Gemms  # of the head, and of everything without fp8
    layer_gemms: Gemms  # of the layers' linear maps
    adamw: AdamWStep
    sum_of_squares: SumOfSquares
    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        """One line: what is not torch's own."""
        used: dict[str, list[str]] = {}
        for choice in self.choices:
            plain = choice.operation in OPERATIONS and choice.taken == OPERATIONS[choice.operation].last[0]
            used.setdefault("" if plain else choice.taken, []).append(choice.operation)
        plain_ones = "the rest" if len(used) > 1 else "everything"
        others = [f"{name} for {', '.join(operations)}" for name, operations in used.items() if name]
        return "; ".join([*others, *([f"torch's own for {plain_ones}"] if "" in used else [])])


@dataclass(frozen=True)
class Operation:
    """The candidates for one operation, in order. The last is taken unchecked: nothing is left if it is refused."""

    candidates: Sequence[tuple[str, Callable[[Place], Any]]]
    last: tuple[str, Callable[[Place], Any]]
    check: Callable[[Any, Place], None]


def choose_kernels(
    device: torch.device,
    dtype: torch.dtype,
    *,
    documents: bool = False,
    fp8: str = "none",
    compiled: bool = False,
    without: Sequence[str] = (),
) -> Kernels:
    """Try the candidates of every operation on `device`; with `documents`, attention must also keep them apart.

    Raises: MegallamaError if no attention here does, if `fp8` is asked for and nothing here can, or if a name in
    `without` is that of no candidate.
    """
    place = Place(device, dtype, documents, compiled)
    taken: dict[str, Any] = {}
    choices, known = [], set[str]()
    for name, operation in {**OPERATIONS, **({FP8: FP8_PRODUCTS} if fp8 != "none" else {})}.items():
        known |= {text for kind, _ in operation.candidates for text in (kind, f"{name}: {kind}")}
        left_out = {kind for kind, _ in operation.candidates if {kind, f"{name}: {kind}"} & set(without)}
        taken[name], choice = _first(name, operation, place, left_out)
        choices.append(choice)
        place = replace(place, product=taken.get("matrix product", matmul_nt))
    if strange := sorted(set(without) - known):
        near = [hint for name in strange for hint in get_close_matches(name, sorted(known), 1)] or sorted(known)
        raise MegallamaError(f"run.without_kernels={strange} names no candidate; write for example {' or '.join(near)}")
    if documents and choices[0].taken == SDPA:
        try:
            checks.check_attention(taken["attention"], place)
        except Refused as error:
            wrong = f"no attention here keeps documents apart: torch's {error}"
            raise MegallamaError(f"{wrong}; use data.document_mask=false or another torch") from error
    product = place.product
    gemms = Gemms(product, lambda dy, weight: product(dy, weight.t()), taken["weight gradient"])
    norm, activation = taken["RMSNorm"], taken["SwiGLU"]
    leaves = Leaves(norm[0], norm[1], activation[0], activation[1], taken["RoPE"], taken["cross entropy"])
    layers = taken.get(FP8, gemms)
    return Kernels(taken["attention"], leaves, gemms, layers, taken["AdamW"], taken["gradient norm"], tuple(choices))


def _first(name: str, operation: Operation, place: Place, left_out: set[str]) -> tuple[Any, Choice]:
    refused: list[tuple[str, str]] = []
    broken = False
    for kind, make in operation.candidates:
        try:
            if kind in left_out:
                raise Refused("left out by run.without_kernels")
            made = make(place)
            operation.check(made, place)
            return made, Choice(name, kind, tuple(refused), broken)
        except Exception as error:  # noqa: BLE001 - a broken package may raise anything; the reason is kept
            broken |= isinstance(error, Wrong) or not isinstance(error, Refused)
            refused.append((kind, str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__))
    choice = Choice(name, operation.last[0], tuple(refused), broken)
    if name == FP8:
        raise MegallamaError(f'precision.fp8: {choice}; write precision.fp8="none"')
    return operation.last[1](place), choice


def _blocked(place: Place) -> MakeAttention:
    if place.device.type == "cuda" or place.dtype not in (torch.bfloat16, torch.float16):
        raise Refused("16-bit formats on a CPU only")
    return lambda num_heads, num_kv_heads, head_dim: blocked_attention


def _fused_norm(place: Place) -> NormPair:
    place.need_cuda()
    return rms_norm, fused_norm_backward


def _onednn(place: Place) -> MatmulNT:
    if place.device.type != "cpu" or place.dtype != torch.float32:
        raise Refused("fp32 on a CPU only")
    if processor() == "GenuineIntel":
        raise Refused("MKL is as fast on this processor")
    if not torch.backends.mkldnn.is_available():
        raise Refused("this torch was built without oneDNN")
    return onednn_matmul_nt


def _addmm(place: Place) -> AddWgrad:
    if place.device.type != "cuda" or accumulate_dtype(place.dtype) == place.dtype:
        raise Refused("CUDA with 16-bit weights only")
    return add_wgrad_cuda


def _compiled(*leaves: str) -> tuple[str, Callable[[Place], Any]]:
    def make(place: Place) -> Any:
        if not place.compiled:
            raise Refused("run.compile=false")
        made = tuple(compiled_leaf(name) for name in leaves)
        return made if len(made) > 1 else made[0]

    return "torch.compile", make


def _fp8(make: Callable[[Place], Gemms]) -> Callable[[Place], Gemms]:
    def checked(place: Place) -> Gemms:
        place.need_cuda()
        if (capability := torch.cuda.get_device_capability(place.device)) < (8, 9):
            raise Refused(f"compute capability {capability[0]}.{capability[1]} is below 8.9 (L40S, H100, H200, B200)")
        return make(place)

    return checked


TE, SDPA, FP8 = "Transformer Engine", "torch scaled_dot_product_attention", "fp8 products"
OPERATIONS = {
    "attention": Operation(
        [(TE, accelerated.te_attention), ("blocks of matrix products", _blocked)],
        (SDPA, lambda p: lambda num_heads, num_kv_heads, head_dim: sdpa),
        checks.check_attention,
    ),
    "RMSNorm": Operation(
        [_compiled("rms_norm", "rms_norm_backward"), (TE, accelerated.te_norm), ("apex", accelerated.apex_norm),
         ("torch fused", _fused_norm)],
        ("torch", lambda p: (EAGER.rms_norm, EAGER.rms_norm_backward)),
        checks.check_norm,
    ),
    "RoPE": Operation([_compiled("rotate")], ("torch", lambda p: EAGER.rotate), checks.check_rotate),
    "SwiGLU": Operation(
        [_compiled("swiglu", "swiglu_backward"), (TE, accelerated.te_swiglu)],
        ("torch", lambda p: (EAGER.swiglu, EAGER.swiglu_backward)),
        checks.check_swiglu,
    ),
    "cross entropy": Operation([_compiled("softmax_")], ("torch", lambda p: EAGER.softmax_), checks.check_softmax),
    "matrix product": Operation([("oneDNN", _onednn)], ("torch mm", lambda p: matmul_nt), checks.check_product),
    "weight gradient": Operation(
        [(TE, accelerated.te_wgrad), ("apex", accelerated.apex_wgrad), ("torch addmm into fp32", _addmm)],
        ("that product, then add", lambda p: add_wgrad_with(p.product)),
        checks.check_wgrad,
    ),
    "AdamW": Operation(
        [(TE, accelerated.te_adam), ("apex", accelerated.apex_adam)],
        ("torch fused", lambda p: adamw_step),
        checks.check_adam,
    ),
    "gradient norm": Operation(
        [(TE, accelerated.te_sum_of_squares), ("apex", accelerated.apex_sum_of_squares)],
        ("torch", lambda p: sum_of_squares),
        checks.check_sum_of_squares,
    ),
}
FP8_PRODUCTS = Operation(
    [(TE, _fp8(accelerated.te_fp8)), ("torch _scaled_mm", _fp8(lambda p: TORCH_FP8))],
    ("nothing here can", lambda p: TORCH_FP8),
    checks.check_fp8,
)
