"""Groups around a group: one writes down what is communicated, one when; and one whose other members are not there.

`Recording` and `FakeGroup` together are a dry run; `Timed` is how a traced step sees its communication.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megallama.comm.group import Done, Group, Handle, Op, Solo


@dataclass(frozen=True)
class Call:
    """One operation; `shape` and `nbytes` are of the whole tensor: all_gather's output, reduce_scatter's input."""

    op: str
    group: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    nbytes: int = 0
    peer: int | None = None  # recv: the source; send: the destination (ranks within the group)
    reduce: Op = "sum"
    label: str = ""  # what it is for, where somebody says so; alike on all members, and on both ends of a message

    def __str__(self) -> str:
        peer = "" if self.peer is None else f" {'to' if self.op == 'send' else 'from'} member {self.peer}"
        how = "" if self.reduce == "sum" else f" {self.reduce}"
        what = "" if self.dtype is None else f" {self.shape} {str(self.dtype).removeprefix('torch.')}"
        return f"{self.op}{how}{peer}{what}" + (f" in {self.label}" if self.label else "")


class Wait(NamedTuple):
    """Before a rank makes call number `before`, or ends, it waits for call number `call` to finish."""

    before: int
    call: int


class Wrapped:
    """Passes every operation on to `inner`; what comes before and after it is said in `_call`."""

    def __init__(self, inner: Group) -> None:
        self.inner = inner
        self.name, self.rank, self.size, self.ranks = inner.name, inner.rank, inner.size, inner.ranks

    def _call(
        self, op: str, tensor: Tensor, start: Callable[[], Handle], peer: int | None = None, reduce: Op = "sum"
    ) -> Handle:
        raise AssertionError("said by those who inherit")

    def _blocking(self, op: str) -> None:
        """Before an operation without a handle."""

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        return self._call("all_reduce", tensor, lambda: self.inner.all_reduce(tensor, op), reduce=op)

    def all_gather(self, output: Tensor, shard: Tensor) -> Handle:
        return self._call("all_gather", output, lambda: self.inner.all_gather(output, shard))

    def reduce_scatter(self, output: Tensor, full: Tensor) -> Handle:
        return self._call("reduce_scatter", full, lambda: self.inner.reduce_scatter(output, full))

    def send(self, tensor: Tensor, to: int) -> Handle:
        return self._call("send", tensor, lambda: self.inner.send(tensor, to), to)

    def recv(self, tensor: Tensor, source: int) -> Handle:
        return self._call("recv", tensor, lambda: self.inner.recv(tensor, source), source)

    def barrier(self) -> None:
        self._blocking("barrier")
        self.inner.barrier()

    def gather_values(self, value: Any, summary: Callable[[list[Any]], Any] = list) -> Any:
        self._blocking("gather_values")
        return self.inner.gather_values(value, summary)


class Recording(Wrapped):
    """Passes every operation on to `inner` and appends a `Call` to `calls`, in order of the calls.

    Several groups may share the lists, so the order between groups is kept too.  With `waits` the first wait of
    every handle is written down there; `label` says what the call at hand is for.
    """

    def __init__(
        self, inner: Group, calls: list[Call] | None = None,
        waits: list[Wait] | None = None, label: Callable[[], str] = str,
    ) -> None:  # fmt: skip
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
    """A handle whose first wait is written down; before it, nothing is ever said to be done, so a wait must come."""

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


@dataclass
class TimedCall:
    """When one operation was called and waited for, as readings of the tape's clock; None outside traced steps."""

    axis: str
    op: str
    nbytes: int
    issued: Any = None
    started: Any = None  # the call that started it has returned
    waited: Any = None  # somebody began to wait
    end: Any = None  # and need not wait any more


@dataclass
class Tape:
    """What `Timed` groups write while `clock` is set, in order of the calls."""

    clock: Callable[[], Any] | None = None
    calls: list[TimedCall] = field(default_factory=list)


class Timed(Wrapped):
    """Passes every operation on to `inner`; while the tape has a clock, notes when it was started and waited for."""

    def __init__(self, inner: Group, tape: Tape) -> None:
        super().__init__(inner)
        self._tape = tape

    def _call(
        self, op: str, tensor: Tensor, start: Callable[[], Handle], peer: int | None = None, reduce: Op = "sum"
    ) -> Handle:
        call = TimedCall(self.name, op, tensor.nbytes)
        if (clock := self._tape.clock) is None:
            return _TimedHandle(start(), call, self._tape)
        self._tape.calls.append(call)
        call.issued = clock()
        handle = _TimedHandle(start(), call, self._tape)
        call.started = clock()
        return handle


class _TimedHandle:
    """A handle that notes its first wait."""

    def __init__(self, inner: Handle, call: TimedCall, tape: Tape) -> None:
        self._inner, self._timed, self._tape = inner, call, tape

    def wait(self) -> None:
        self._note(self._inner.wait)

    def done(self) -> bool:
        done = self._inner.done()
        if done:
            self._note(lambda: None)
        return done

    def _note(self, wait: Callable[[], None]) -> None:
        clock, call = self._tape.clock, self._timed
        if clock is None or call.end is not None:
            wait()
            return
        if call.issued is None:  # before the traced step
            self._tape.calls.append(call)
        call.waited = clock()
        wait()
        call.end = clock()


class FakeGroup(Solo):
    """The group of one rank whose other members are not there: nothing moves, and sums are its addend."""

    def __init__(self, name: str, ranks: tuple[int, ...], rank: int) -> None:
        super().__init__(name)
        self.ranks, self.rank, self.size = ranks, ranks.index(rank), len(ranks)

    def _nothing(self, *arguments: Any, **named: Any) -> Handle:
        return Done()

    all_gather = reduce_scatter = send = recv = _nothing

    def gather_values(self, value: Any, summary: Callable[[list[Any]], Any] = list) -> Any:
        return summary([value] * self.size)
