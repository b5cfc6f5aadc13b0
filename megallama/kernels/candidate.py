"""What the candidates for an operation share: where they are to run, how they decline, packages, the comparison.

Every operation has a file of its own with its implementations, the check that they must pass, and an `Operation` that
lists them in order.  Implementations of Transformer Engine and of NVIDIA's apex are made by functions that import them
when a GPU asks: both packages can fail to import in many ways (missing CUDA libraries, other versions, an unrelated
package of the same name), so such a function returns an implementation or raises whatever it raises.
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
    product: Callable[[Tensor, Tensor], Tensor] | None = None  # the matrix product that was chosen; None: torch's

    def need_cuda(self) -> None:
        if self.device.type != "cuda":
            raise Refused("no CUDA device")

    def need_half_on_cuda(self) -> None:
        self.need_cuda()
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise Refused(f"16-bit formats only, not {self.dtype}")


@dataclass(frozen=True)
class Operation:
    """The candidates for one operation, in order. The last is taken unchecked: nothing is left if it is refused.

    A check takes a candidate and compares it on a small problem with the plain formula in float64: forward, backward,
    accumulation.  It raises `Refused` with what differs and by how much (relative to the norm of what it should be).
    """

    candidates: Sequence[tuple[str, Callable[[Place], Any]]]
    last: tuple[str, Callable[[Place], Any]]
    check: Callable[[Any, Place], None]


def te_module(place: Place, name: str = "transformer_engine_torch") -> ModuleType:
    """A module of Transformer Engine; the functions below its modules are there once the package has been imported."""
    place.need_cuda()
    if importlib.util.find_spec("transformer_engine") is None:
        raise Refused("not installed")
    importlib.import_module("transformer_engine.pytorch")
    return importlib.import_module(name)


def apex_module(place: Place, name: str) -> ModuleType:
    """A module of NVIDIA's apex; the package index holds an unrelated one of the same name."""
    place.need_cuda()
    if importlib.util.find_spec(name) is None:
        if importlib.util.find_spec("apex") is None:
            raise Refused("not installed")
        if importlib.util.find_spec("apex.optimizers") is None:
            raise Refused("the installed package named apex is not NVIDIA's; build NVIDIA/apex from source")
        raise Refused(f"apex was built without its CUDA extension {name}")
    return importlib.import_module(name)


def agree(what: str, mine: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Raises: Wrong if `mine` is further from `theirs` than `tolerance`, or not a number."""
    mine, theirs = mine.detach().double(), theirs.detach().double().to(mine.device)
    error = float((mine - theirs).norm() / theirs.norm())
    if not error <= tolerance:
        raise Wrong(f"{what} differs from the plain formula by {error:.1e}")


def agree_all(mine: dict[str, Tensor], theirs: Sequence[Tensor | None], place: Place) -> None:
    """`agree` of several results, within what the format of `place` can tell."""
    for (what, got), want in zip(mine.items(), theirs, strict=True):
        assert want is not None
        agree(what, got, want, TOLERANCE[place.dtype])


def random(place: Place, *shape: int, seed: int = 0) -> Tensor:
    """Normal values in the format of `place`, on its device."""
    generator, wide = torch.Generator(place.device).manual_seed(seed), accumulate_dtype(place.dtype)
    return torch.randn(shape, device=place.device, generator=generator, dtype=wide).to(place.dtype)
