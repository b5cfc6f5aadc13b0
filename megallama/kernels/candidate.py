"""What the candidates for an operation share: where they run, how they decline, the comparison.

A candidate is a function that makes an implementation, or raises: packages fail in many ways.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import cycle
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

TE, APEX, TRITON, COMPILED = "Transformer Engine", "apex", "Triton", "torch.compile"
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-12}


class Unsupported(Exception):
    """A candidate that cannot be used here, with the reason."""


class Wrong(Unsupported):
    """A candidate that computes something else."""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The format in which sums over `dtype` are formed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Target:
    """Where and for what kernels are selected."""

    device: torch.device
    dtype: torch.dtype
    documents: bool = False  # attention must keep them apart
    fewer: bool = False  # attention also has fewer queries than keys
    compiled: bool = False  # run.compile
    width: int = 64  # of the rows on which norms are compared: the hidden size
    product: Callable[[Tensor, Tensor], Tensor] | None = None  # the selected one; None: torch's
    named: str = ""  # the candidate that a table of processors, or a checkpoint, names
    exact: bool = False  # values of `dtype` held in float64: operands of the reference

    def need_cuda(self) -> None:
        if self.device.type != "cuda":
            raise Unsupported("no CUDA device")

    def need_half_on_cuda(self) -> None:
        self.need_cuda()
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise Unsupported(f"16-bit formats only, not {self.dtype}")

    @staticmethod
    def on_cpu(kernel: Any, *also: torch.dtype, onednn: bool = False) -> Callable[[Target], Any]:
        """A candidate for 16 bits, and the formats `also`, on a CPU that is faster in fp32."""
        formats = (torch.bfloat16, torch.float16, *also)

        def make(target: Target) -> Any:
            if target.device.type != "cpu" or target.dtype not in formats:
                names = " and ".join(str(f).removeprefix("torch.") for f in formats)
                raise Unsupported(f"{names} on a CPU only")
            if onednn:
                target.need_onednn()
            return kernel

        return make

    @staticmethod
    def need_onednn() -> None:
        if not torch.backends.mkldnn.is_available():
            raise Unsupported("this torch was built without oneDNN")

    @staticmethod
    def contiguous(x: Tensor) -> Tensor:
        """`x`, for a kernel that reads by size and address: of a view it would take others."""
        assert x.is_contiguous(), f"strides {x.stride()} of {tuple(x.shape)}: a copy is needed first"
        return x

    def te_module(self, name: str = "transformer_engine_torch") -> ModuleType:
        """A module of Transformer Engine, once the package was imported."""
        self.need_cuda()
        if importlib.util.find_spec("transformer_engine") is None:
            raise Unsupported("not installed")
        importlib.import_module("transformer_engine.pytorch")
        return importlib.import_module(name)

    def apex_module(self, name: str) -> ModuleType:
        """A module of NVIDIA's apex; the package index has another of that name."""
        self.need_cuda()
        if importlib.util.find_spec(name) is None:
            if importlib.util.find_spec("apex") is None:
                raise Unsupported("not installed")
            if importlib.util.find_spec("apex.optimizers") is None:
                raise Unsupported("the installed package named apex is not NVIDIA's; build NVIDIA/apex from source")
            raise Unsupported(f"apex was built without its CUDA extension {name}")
        return importlib.import_module(name)

    def need_triton(self) -> None:
        """Triton comes with torch's CUDA build; to compile a kernel it needs a C compiler."""
        self.need_cuda()
        if self.dtype == torch.float64:
            raise Unsupported(f"computes in fp32, not {self.dtype}")
        if importlib.util.find_spec("triton") is None:
            raise Unsupported("not installed")

    def compile(self, formula: Callable[..., Any]) -> Callable[..., Any]:
        """`formula` fused by torch.compile; it needs a C++ compiler (on a GPU also Triton)."""
        if not self.compiled:
            raise Unsupported("run.compile=false")
        # no symbolic shapes: bits would depend on which came first, and resumed runs differ
        # a formula writes into no argument: torch 2.13 was seen to write into another
        fused, met = torch.compile(formula, dynamic=False), set[Any]()

        def call(*args: Any) -> Any:
            plain = [a.detach() if isinstance(a, Tensor) else a for a in args]  # saved ones know a graph
            shapes = tuple((a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in plain)
            new = shapes not in met  # beyond its limit torch would not compile: other bits
            met.add(shapes)
            with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1000) if new else nullcontext():
                return fused(*plain)

        return call

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        """Normal values, in this format and place."""
        generator = torch.Generator(self.device).manual_seed(seed)
        acc_dtype = accumulate_dtype(self.dtype)
        values = torch.randn(shape, device=self.device, generator=generator, dtype=acc_dtype).to(self.dtype)
        return values.double() if self.exact else values


Results = list[tuple[str, Tensor]]  # what an implementation makes of a small problem, by name


@dataclass(frozen=True)
class Operation:
    """Candidates for an operation, in order; the last is selected unchecked."""

    candidates: Sequence[tuple[str, Callable[[Target], Any]]]
    last: tuple[str, Callable[[Target], Any]]
    results: Callable[[Any, Target], Results]  # forward, backward, accumulation
    tolerances: Sequence[float] = ()  # of the results in turn; none: what the format can tell
    plain: Any = None  # the formula to compare with, where it is not the last candidate
    named: Sequence[tuple[str, Callable[[Target], Any]]] = ()  # only by a table of processors

    @property
    def all(self) -> list[tuple[str, Callable[[Target], Any]]]:
        """In order, then those that only a table takes, then the last."""
        return [*self.candidates, *self.named, self.last]

    def check(self, made: Any, target: Target) -> None:
        """Compare with the plain formula in float64, relative to the norm of what should be.

        Raises: Wrong, with the name of what differs, or is not a number, and by how much.
        """
        exact = replace(target, exact=True, product=None)
        wanted = self.results(self.plain or self.last[1](exact), exact)
        tolerances = cycle(self.tolerances or [TOLERANCE[target.dtype]])
        for (name, result), (_, want) in zip(self.results(made, target), wanted, strict=True):
            want = want.detach().double().to(result.device)
            error = float((result.detach().double() - want).norm() / want.norm())
            if not error <= next(tolerances):
                raise Wrong(f"{name} differs from the plain formula by {error:.1e}")
