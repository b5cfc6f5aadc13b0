"""A CUDA graph on the CPU: records a function's operations on tensors, and makes them again without its Python.

Like a real one, recording leaves every tensor that existed before as it was, and a replay reads and writes
the memory of the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # storage -> a tensor of it, its bytes before the recording
        self.own: set[int] = set()  # storages made by the recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs or {})):
            if isinstance(tensor, Tensor) and tensor.numel():
                at = tensor.untyped_storage().data_ptr()
                if at not in self.own and at not in self.before:
                    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]
                    self.before[at] = whole, whole.clone()
        out = func(*args, **(kwargs or {}))
        outs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.own |= {x.untyped_storage().data_ptr() for x in outs} - self.before.keys()
        self.made.append((func, args, kwargs or {}, outs))
        return out


class TapeRecorder:
    """A recorder for the CPU; `log` has what it was asked for."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def warm_up(self, work: Callable[[], None]) -> None:
        self.log.append("warm up")
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.log.append("record")
        with _Tape() as tape:
            work()
        for whole, bytes_before in tape.before.values():
            whole.copy_(bytes_before)

        @torch.no_grad()
        def replay() -> None:
            self.log.append("replay")
            for func, args, kwargs, recorded in tape.made:
                new = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
                for old, value in zip(recorded, new, strict=True):
                    if old.numel() and old.data_ptr() != value.data_ptr():
                        old.copy_(value)

        return replay
