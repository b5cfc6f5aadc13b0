"""Groups for the dry run: one that writes down what is communicated, one without its other members."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megallama.comm.group import Done, Group, Handle, Op, Solo, Wrapped


@dataclass(frozen=True)
class Call:
    """One operation; `shape`, `nbytes`: of the whole tensor (all_gather's output, reduce_scatter's input)."""

    op: str
    group: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    nbytes: int = 0
    peer: int | None = None  # recv: the source; send: the destination (ranks within the group)
    reduce: Op = "sum"
    label: str = ""  # what it is for, where somebody says so; the same on all members, and on both ends of a message

    def __str__(self) -> str:
        peer = "" if self.peer is None else f" {'to' if self.op == 'send' else 'from'} member {self.peer}"
        how = "" if self.reduce == "sum" else f" {self.reduce}"
        what = "" if self.dtype is None else f" {self.shape} {str(self.dtype).removeprefix('torch.')}"
        return f"{self.op}{how}{peer}{what}" + (f" in {self.label}" if self.label else "")


class Wait(NamedTuple):
    """Before call number `before`, or its end, a rank waits for call number `call`."""

    before: int
    call: int


class Recording(Wrapped):
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
        super().__init__(inner)
        self.calls: list[Call] = [] if calls is None else calls
        self.waits, self._label = waits, label

    def _call(
        self, op: str, tensor: Tensor, start: Callable[[], Handle], peer: int | None = None, reduce: Op = "sum"
    ) -> Handle:
        shape, dtype = tuple(tensor.shape), tensor.dtype
        assert tensor.is_contiguous() and tensor.numel(), f"{self.name}: {shape} empty or strided"
        assert peer is None or 0 <= peer < self.size, f"{self.name}: there is no member {peer} among {self.size}"
        handle = start()
        self.calls.append(Call(op, self.name, shape, dtype, tensor.nbytes, peer, reduce, self._label()))
        return handle if self.waits is None else _Noted(handle, len(self.calls) - 1, self.calls, self.waits)

    def _blocking(self, op: str) -> None:
        self.calls.append(Call(op, self.name, label=self._label()))
        if self.waits is not None:
            self.waits.append(Wait(len(self.calls), len(self.calls) - 1))


class _Noted:
    """A handle whose first wait is written down; before it nothing is done, so a wait must come."""

    def __init__(self, inner: Handle, call: int, calls: list[Call], waits: list[Wait]) -> None:
        self._inner, self._call, self._calls, self._waits = inner, call, calls, waits
        self._waited = False

    def wait(self) -> None:
        if not self._waited:
            self._waits.append(Wait(len(self._calls), self._call))
            self._waited = True
        self._inner.wait()

    def done(self) -> bool:
        return self._waited


class FakeGroup(Solo):
    """The group of one rank whose other members are not there: nothing moves, and sums are its addend."""

    def __init__(self, name: str, ranks: tuple[int, ...], rank: int) -> None:
        super().__init__(name)
        self.ranks, self.rank, self.size = ranks, ranks.index(rank), len(ranks)

    def _nothing(self, *arguments: Any, **named: Any) -> Handle:
        return Done()

    all_gather = reduce_scatter = all_to_all = send = recv = _nothing

    def gather_values(self, value: Any, summary: Callable[[list[Any]], Any] = list) -> Any:
        return summary([value] * self.size)
