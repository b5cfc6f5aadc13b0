"""The project's Triton kernels without Triton: their host code runs, and each launch is counted, not made.

With Triton installed as well: the modules are imported anew with a stand-in in its place, and forgotten again.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

import megallama.kernels
from megallama.kernels.candidate import Target
from tests.cuda.launches import Launches

MODULES = ("triton_kernels",)
WRITTEN = {
    "_norm": "total out",
    "_norm_backward": "dx again partial",
    "_add_up": "main_grad",
    "_swiglu": "out",
    "_swiglu_backward": "grad again",
    "_rotate": "out",
    "_rotate_apart": "q_out k_out v_out",
    "_log_sums": "log_sum picked",
    "_gradient": "logits",
    "_largest": "partial",
    "_quantize": "by_rows by_columns inverse",
}
READ_TOO = {"_gradient": "logits", "_add_up": "main_grad"}  # all others are read or written


class Kernel:
    """What `triton.jit` makes of a function here."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name, self.signature = function.__name__, inspect.signature(function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **named: self.launch(grid, args, named)

    def launch(self, grid: tuple[int, ...], args: Any, named: Any) -> None:
        """Bind the arguments as Triton would, and tell the counter."""
        own = {k: v for k, v in named.items() if k in self.signature.parameters}
        assert set(named) - set(own) <= {"num_warps", "num_stages"}
        given = self.signature.bind(*args, **own).arguments
        assert 0 < grid[0] < 2**31 and all(0 < n < 2**16 for n in grid[1:]), f"{self.name}: a grid of {grid}"
        tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
        written, read_too = [name for name in WRITTEN[self.name].split() if name in tensors], READ_TOO.get(self.name)
        if self.name == "_norm" and tensors["total"] is tensors["x"]:  # nothing is added
            written.remove("total")
            del tensors["total"]
        if given.get("overwrite"):
            read_too = None
        reads = [t for name, t in tensors.items() if name not in written or name == read_too]
        writes = [tensors[name] for name in written]
        assert writes, self.name
        if isinstance(counter := _get_current_dispatch_mode(), Launches):
            counter.launched(f"triton {self.name}", reads, writes)


def _jit(function: Callable[..., Any] | None = None, **named: Any) -> Any:
    return Kernel if function is None else Kernel(function)


@contextmanager
def counted_triton() -> Iterator[None]:
    """Within the ``with`` block Triton is there as a candidate."""
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    given = {"jit": _jit, "cdiv": lambda a, b: -(-a // b), "next_power_of_2": lambda n: 1 << (n - 1).bit_length()}
    vars(triton).update(given, language=language)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton", triton)
        patch.setitem(sys.modules, "triton.language", language)
        patch.setattr(Target, "need_triton", Target.need_cuda)
        for name in MODULES:
            patch.delitem(sys.modules, f"megallama.kernels.{name}", raising=False)
            patch.delattr(megallama.kernels, name, raising=False)
        for name in MODULES:
            importlib.import_module(f"megallama.kernels.{name}")
        try:
            yield
        finally:
            for name in MODULES:
                del sys.modules[f"megallama.kernels.{name}"]
                delattr(megallama.kernels, name)
