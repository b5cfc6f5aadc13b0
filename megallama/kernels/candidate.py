"""What the candidates for an operation share: where they are to run, how they decline, packages, the comparison.

Every operation has a file of its own with its implementations, the check that they must pass, and
an `Operation` that lists them in order.  Implementations of Transformer Engine and of NVIDIA's apex
are made by functions that import them when a GPU asks: both packages can fail to import in many
ways (missing CUDA libraries, other versions, an unrelated package of the same name), so such a
function returns an implementation or raises whatever it raises.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megallama.kernels.dtypes import accumulate_dtype

TE, APEX, COMPILED = "Transformer Engine", "apex", "torch.compile"
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-12}


class Unsupported(Exception):
    """A candidate that cannot be used here, with the reason."""


class Wrong(Unsupported):
    """A candidate that computes something else."""


@dataclass(frozen=True)
class Target:
    """Where and for what kernels are selected."""

    device: torch.device
    dtype: torch.dtype
    documents: bool = False  # attention must keep them apart
    compiled: bool = False  # run.compile
    product: Callable[[Tensor, Tensor], Tensor] | None = None  # the matrix product that was selected; None: torch's

    def need_cuda(self) -> None:
        if self.device.type != "cuda":
            raise Unsupported("no CUDA device")

    def need_half_on_cuda(self) -> None:
        self.need_cuda()
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise Unsupported(f"16-bit formats only, not {self.dtype}")

    def need_fp8(self) -> None:
        self.need_cuda()
        major, minor = torch.cuda.get_device_capability(self.device)
        if (major, minor) < (8, 9):
            raise Unsupported(f"compute capability {major}.{minor} is below 8.9 (L40S, H100, H200, B200)")

    def te_module(self, name: str = "transformer_engine_torch") -> ModuleType:
        """A module of Transformer Engine; functions below its modules are there once the package was imported."""
        self.need_cuda()
        if importlib.util.find_spec("transformer_engine") is None:
            raise Unsupported("not installed")
        importlib.import_module("transformer_engine.pytorch")
        return importlib.import_module(name)

    def apex_module(self, name: str) -> ModuleType:
        """A module of NVIDIA's apex; the package index holds an unrelated one of the same name."""
        self.need_cuda()
        if importlib.util.find_spec(name) is None:
            if importlib.util.find_spec("apex") is None:
                raise Unsupported("not installed")
            if importlib.util.find_spec("apex.optimizers") is None:
                raise Unsupported("the installed package named apex is not NVIDIA's; build NVIDIA/apex from source")
            raise Unsupported(f"apex was built without its CUDA extension {name}")
        return importlib.import_module(name)

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        """Normal values in this format, on this device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        acc_dtype = accumulate_dtype(self.dtype)
        return torch.randn(shape, device=self.device, generator=generator, dtype=acc_dtype).to(self.dtype)


@dataclass(frozen=True)
class Operation:
    """The candidates for one operation, in order. The last is selected unchecked: nothing is left if it is refused.

    A check takes a candidate and compares it on a small problem with the plain formula in float64:
    forward, backward, accumulation.  It raises `Unsupported` with what differs and by how much,
    relative to the norm of what it should be.
    """

    candidates: Sequence[tuple[str, Callable[[Target], Any]]]
    last: tuple[str, Callable[[Target], Any]]
    check: Callable[[Any, Target], None]


def require_close(what: str, result: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises: Wrong if `result` is further from `expected` than `tolerance`, or not a number."""
    result, expected = result.detach().double(), expected.detach().double().to(result.device)
    error = float((result - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise Wrong(f"{what} differs from the plain formula by {error:.1e}")


def require_all_close(results: dict[str, Tensor], expected: Sequence[Tensor], target: Target) -> None:
    """`require_close` of several results, within what the format of `target` can tell."""
    for (what, result), want in zip(results.items(), expected, strict=True):
        require_close(what, result, want, TOLERANCE[target.dtype])
