"""A group that writes down what is communicated, for tests of communication contracts and reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megallama.comm.group import Group, Handle, Op


@dataclass(frozen=True)
class Call:
    """One operation; `shape` and `nbytes` are of the whole tensor: all_gather's output, reduce_scatter's input."""

    op: str
    group: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    nbytes: int = 0
    peer: int | None = None  # broadcast, recv: the source; send: the destination (ranks within the group)


class Recording:
    """Passes every operation on to `inner` and appends a `Call` to `calls`, in order of the calls.

    Several groups may share one list, so the order between groups is kept too.
    """

    def __init__(self, inner: Group, calls: list[Call] | None = None) -> None:
        self.inner = inner
        self.calls: list[Call] = [] if calls is None else calls
        self.name, self.rank, self.size, self.ranks = inner.name, inner.rank, inner.size, inner.ranks

    def _record(self, op: str, tensor: Tensor | None = None, peer: int | None = None) -> None:
        if tensor is None:
            self.calls.append(Call(op, self.name))
        else:
            self.calls.append(Call(op, self.name, tuple(tensor.shape), tensor.dtype, tensor.nbytes, peer))

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        self._record("all_reduce", tensor)
        return self.inner.all_reduce(tensor, op)

    def all_gather(self, output: Tensor, shard: Tensor) -> Handle:
        self._record("all_gather", output)
        return self.inner.all_gather(output, shard)

    def reduce_scatter(self, output: Tensor, full: Tensor) -> Handle:
        self._record("reduce_scatter", full)
        return self.inner.reduce_scatter(output, full)

    def broadcast(self, tensor: Tensor, source: int) -> Handle:
        self._record("broadcast", tensor, source)
        return self.inner.broadcast(tensor, source)

    def send(self, tensor: Tensor, to: int) -> Handle:
        self._record("send", tensor, to)
        return self.inner.send(tensor, to)

    def recv(self, tensor: Tensor, source: int) -> Handle:
        self._record("recv", tensor, source)
        return self.inner.recv(tensor, source)

    def barrier(self) -> None:
        self._record("barrier")
        self.inner.barrier()

    def gather_values(self, value: Any) -> list[Any]:
        self._record("gather_values")
        return self.inner.gather_values(value)
