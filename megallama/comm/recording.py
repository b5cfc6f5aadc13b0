"""A group that writes down what is communicated, and one whose other members are not there: together, a dry run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    reduce: Op = "sum"
    label: str = ""  # what it is for, where somebody says so; alike on all members, and on both ends of a message

    def __str__(self) -> str:
        peer = "" if self.peer is None else f" {'to' if self.op == 'send' else 'from'} member {self.peer}"
        how = "" if self.reduce == "sum" else f" {self.reduce}"
        what = "" if self.dtype is None else f" {self.shape} {str(self.dtype).removeprefix('torch.')}"
        return f"{self.op}{how}{peer}{what}" + (f" in {self.label}" if self.label else "")


class Wait(NamedTuple):
    """Before making call `before` of its list (or, with as many calls, ending) a rank waits for `call` to finish."""

    before: int
    call: int


class Recording:
    """Passes every operation on to `inner` and appends a `Call` to `calls`, in order of the calls.

    Several groups may share the lists, so the order between groups is kept too.  With `waits` the first wait of
    every handle is written down there; `label` says what the call at hand is for.
    """

    def __init__(
        self,
        inner: Group,
        calls: list[Call] | None = None,
        waits: list[Wait] | None = None,
        label: Callable[[], str] = str,
    ) -> None:
        self.inner = inner
        self.calls: list[Call] = [] if calls is None else calls
        self.waits, self._label = waits, label
        self.name, self.rank, self.size, self.ranks = inner.name, inner.rank, inner.size, inner.ranks

    def _record(
        self, handle: Handle, op: str, tensor: Tensor, peer: int | None = None, reduce: Op = "sum"
    ) -> Handle:
        shape, dtype = tuple(tensor.shape), tensor.dtype
        self.calls.append(Call(op, self.name, shape, dtype, tensor.nbytes, peer, reduce, self._label()))
        return handle if self.waits is None else _Noted(handle, len(self.calls) - 1, self.calls, self.waits)

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        return self._record(self.inner.all_reduce(tensor, op), "all_reduce", tensor, reduce=op)

    def all_gather(self, output: Tensor, shard: Tensor) -> Handle:
        return self._record(self.inner.all_gather(output, shard), "all_gather", output)

    def reduce_scatter(self, output: Tensor, full: Tensor) -> Handle:
        return self._record(self.inner.reduce_scatter(output, full), "reduce_scatter", full)

    def broadcast(self, tensor: Tensor, source: int) -> Handle:
        return self._record(self.inner.broadcast(tensor, source), "broadcast", tensor, source)

    def send(self, tensor: Tensor, to: int) -> Handle:
        return self._record(self.inner.send(tensor, to), "send", tensor, to)

    def recv(self, tensor: Tensor, source: int) -> Handle:
        return self._record(self.inner.recv(tensor, source), "recv", tensor, source)

    def barrier(self) -> None:
        self._blocking("barrier")
        self.inner.barrier()

    def gather_values(self, value: Any) -> list[Any]:
        self._blocking("gather_values")
        return self.inner.gather_values(value)

    def _blocking(self, op: str) -> None:
        self.calls.append(Call(op, self.name, label=self._label()))
        if self.waits is not None:
            self.waits.append(Wait(len(self.calls), len(self.calls) - 1))


class _Noted:
    """A handle whose first wait is written down."""

    def __init__(self, inner: Handle, call: int, calls: list[Call], waits: list[Wait]) -> None:
        self._inner, self._call, self._calls, self._waits = inner, call, calls, waits
        self._waited = False

    def wait(self) -> None:
        if not self._waited:
            self._waits.append(Wait(len(self._calls), self._call))
            self._waited = True
        self._inner.wait()

    def done(self) -> bool:
        return self._waited or self._inner.done()


class _Later:
    """The handle of something that nobody will ever say has finished: so whoever asks will wait in the end."""

    def wait(self) -> None:
        return None

    def done(self) -> bool:
        return False


class Absent:
    """The group of one rank among others that are not there: operations are checked, and move nothing.

    Tensors keep what they hold, so sums are this rank's addend; meta tensors hold nothing to begin with.
    """

    def __init__(self, name: str, ranks: tuple[int, ...], rank: int) -> None:
        self.name, self.ranks = name, ranks
        self.rank, self.size = ranks.index(rank), len(ranks)

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        return self._checked(tensor)

    def all_gather(self, output: Tensor, shard: Tensor) -> Handle:
        assert output.numel() == self.size * shard.numel(), f"{output.shape} is not {self.size} x {shard.shape}"
        return self._checked(output, shard)

    def reduce_scatter(self, output: Tensor, full: Tensor) -> Handle:
        assert full.numel() == self.size * output.numel(), f"{full.shape} is not {self.size} x {output.shape}"
        return self._checked(output, full)

    def broadcast(self, tensor: Tensor, source: int) -> Handle:
        return self._checked(tensor, peer=source)

    def send(self, tensor: Tensor, to: int) -> Handle:
        assert to != self.rank, f"{self.name}: rank {to} sends to itself"
        return self._checked(tensor, peer=to)

    def recv(self, tensor: Tensor, source: int) -> Handle:
        assert source != self.rank, f"{self.name}: rank {source} receives from itself"
        return self._checked(tensor, peer=source)

    def barrier(self) -> None:
        return None

    def gather_values(self, value: Any) -> list[Any]:
        return [value] * self.size

    def _checked(self, *tensors: Tensor, peer: int = 0) -> Handle:
        assert 0 <= peer < self.size, f"{self.name}: there is no member {peer} among {self.size}"
        for tensor in tensors:
            assert tensor.is_contiguous() and tensor.numel(), f"{self.name}: {tuple(tensor.shape)} empty or strided"
            assert tensor.dtype == tensors[0].dtype, f"{self.name}: {tensor.dtype} and {tensors[0].dtype}"
        return _Later()
