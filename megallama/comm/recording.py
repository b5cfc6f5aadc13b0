"""Groups around a group; `Timed` is how a traced step sees its communication."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megallama.comm.group import Group, Handle, Op


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


@dataclass
class TimedCall:
    """When an operation was called and waited for, by the tape's clock; None outside a step."""

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
    """While the tape has a clock, notes when operations were started and waited for."""

    def __init__(self, inner: Group, tape: Tape) -> None:
        super().__init__(inner)
        self._tape = tape

    def _call(
        self, op: str, tensor: Tensor, start: Callable[[], Handle], peer: int | None = None, reduce: Op = "sum"
    ) -> Handle:
        call, clock = TimedCall(self.name, op, tensor.nbytes), self._tape.clock
        if clock is not None:
            self._tape.calls.append(call)
            call.issued = clock()
        handle = start()
        if clock is not None:
            call.started = clock()
        return _TimedHandle(handle, call, self._tape)


class _TimedHandle:
    """A handle that notes its first wait."""

    def __init__(self, inner: Handle, call: TimedCall, tape: Tape) -> None:
        self._inner, self._timed, self._tape = inner, call, tape

    def wait(self) -> None:
        self._note(self._inner.wait)

    def done(self) -> bool:
        if done := self._inner.done():
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
