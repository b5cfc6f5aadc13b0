"""What operations make: the largest tensor, and how much is alive at once."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """Within its ``with`` block: elements of the largest tensor made, and most bytes alive of all made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in (t for t in tree_leaves(out) if isinstance(t, Tensor)):
            self.largest = max(self.largest, made.numel())
            storage = made.untyped_storage()
            if storage.data_ptr() not in given and storage.nbytes():
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.freed, storage.nbytes())
        return out

    def freed(self, size: int) -> None:
        self.alive -= size
