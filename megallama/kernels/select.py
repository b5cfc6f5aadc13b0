"""Which implementation does each operation: candidates in order, each tried on the device.

One is refused with a reason: its package is missing or broken (any exception counts), the device or format is
not its own, `run.without_kernels` leaves it out, or it is wrong on a small problem.  The table of processors may
name the first, else the order is fixed: by measurements ranks would drift apart, and resumed runs from their bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from megallama.config.errors import MegallamaError
from megallama.kernels.attention import ATTENTION, MakeAttention
from megallama.kernels.candidate import TE, Operation, Target, Unsupported, Wrong
from megallama.kernels.gemm import FP8_PRODUCTS, PRODUCT, WGRAD, Gemms
from megallama.kernels.optimizer import ADAMW, GRAD_NORM, AdamWStep, SumOfSquares
from megallama.kernels.pointwise import CROSS_ENTROPY, RMS_NORM, ROPE, SWIGLU, PointwiseOps

FP8 = "fp8 products"
OPERATIONS = {  # the names are those of the log and of run.without_kernels
    "attention": ATTENTION,
    "RMSNorm": RMS_NORM,
    "RoPE": ROPE,
    "SwiGLU": SWIGLU,
    "cross entropy": CROSS_ENTROPY,
    "matrix product": PRODUCT,  # before the weight gradient, which may use it
    "weight gradient": WGRAD,
    "AdamW": ADAMW,
    "gradient norm": GRAD_NORM,
}


@dataclass(frozen=True)
class Choice:
    """What was selected for an operation, and why not the ones before it."""

    operation: str
    selected: str
    refused: tuple[tuple[str, str], ...]
    broken: bool = False  # a candidate before it is installed and does not work

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.refused)
        return f"{self.operation}: {self.selected}" + (f" ({reasons})" if reasons else "")


@dataclass(frozen=True)
class Kernels:
    """The operations that have more than one implementation."""

    attention: MakeAttention
    pointwise: PointwiseOps
    gemms: Gemms  # of the head, and of everything without fp8
    layer_gemms: Gemms  # of the layers' linear maps
    adamw: AdamWStep
    sum_of_squares: SumOfSquares
    choices: tuple[Choice, ...]

    @property
    def apart(self) -> bool:
        """Attention copies q, k, v out of a packed tensor where they differ in size."""
        return ("attention", TE) in ((choice.operation, choice.selected) for choice in self.choices)

    def __str__(self) -> str:
        """One line: what is not torch's own."""
        used: dict[str, list[str]] = {}
        for choice in self.choices:
            plain = choice.operation in OPERATIONS and choice.selected == OPERATIONS[choice.operation].last[0]
            used.setdefault("" if plain else choice.selected, []).append(choice.operation)
        plain_ones = "the rest" if len(used) > 1 else "everything"
        others = [f"{name} for {', '.join(operations)}" for name, operations in used.items() if name]
        return "; ".join([*others, *([f"torch's own for {plain_ones}"] if "" in used else [])])


def select_kernels(
    target: Target, *, fp8: str = "none", without: Sequence[str] = (), named: Mapping[str, str] | None = None
) -> Kernels:
    """Try the candidates of every operation; what is compiled is compiled here, not in the first step.

    `named`: by operation the candidate that is tried first.

    Raises: MegallamaError without an attention for documents, a kernel for `fp8`, or a candidate of a name given.
    """
    named = named or {}
    operations = OPERATIONS | ({FP8: FP8_PRODUCTS} if fp8 != "none" else {})
    kinds = {(name, kind) for name, operation in operations.items() for kind, _ in operation.all}
    if unknown := sorted({*named.items()} - kinds):
        of, kind = unknown[0]
        raise MegallamaError(f"{kind!r} is no implementation of {of!r}; see megallama doctor --measure")
    kinds -= {(name, operation.last[0]) for name, operation in operations.items()}
    known = {text for name, kind in kinds for text in (kind, f"{name}: {kind}")}
    if strange := sorted(set(without) - known):
        near = [hint for name in strange for hint in get_close_matches(name, sorted(known), 1)] or sorted(known)
        raise MegallamaError(f"run.without_kernels={strange} names no candidate; write for example {' or '.join(near)}")
    selected: dict[str, Any] = {}
    choices = []
    for name, operation in operations.items():
        first = [c for c in operation.all if c[0] == named.get(name)]
        ordered = replace(operation, candidates=[*first, *(c for c in operation.candidates if c not in first)])
        selected[name], choice = _first(name, ordered, replace(target, named=named.get(name, "")), without)
        choices.append(choice)
        target = replace(target, product=selected.get("matrix product"))
    attention = OPERATIONS["attention"]
    if target.documents and choices[0].selected == attention.last[0]:
        try:
            attention.check(selected["attention"], target)
        except Unsupported as error:
            wrong = f"no attention here keeps documents apart: torch's {error}"
            raise MegallamaError(f"{wrong}; use data.document_mask=false or another torch") from error
    gemms = Gemms.of(selected["matrix product"], selected["weight gradient"])
    ops = (*selected["RMSNorm"], *selected["SwiGLU"], *selected["RoPE"], *selected["cross entropy"])
    update = selected["AdamW"], selected["gradient norm"]
    return Kernels(selected["attention"], PointwiseOps(*ops), gemms, selected.get(FP8, gemms), *update, tuple(choices))


def _first(name: str, operation: Operation, target: Target, without: Sequence[str]) -> tuple[Any, Choice]:
    refused: list[tuple[str, str]] = []
    broken = False
    for kind, make in operation.candidates:
        try:
            if {kind, f"{name}: {kind}"} & set(without):
                raise Unsupported("left out by run.without_kernels")
            made = make(target)
            operation.check(made, target)
            return made, Choice(name, kind, tuple(refused), broken)
        except Exception as error:  # noqa: BLE001 - a broken package may raise anything
            broken |= isinstance(error, Wrong) or not isinstance(error, Unsupported)
            refused.append((kind, next(iter(str(error).strip().splitlines()), type(error).__name__)))
    choice = Choice(name, operation.last[0], tuple(refused), broken)
    if name == FP8:
        raise MegallamaError(f'precision.fp8: {choice}; write precision.fp8="none"')
    return operation.last[1](target), choice
