"""What happens before what on a GPU: every read and write of every buffer, ordered by streams, events and waits.

On a CPU all is in order, so nothing would show that a wait is missing. A `Recorder` gives each rank streams with
vector clocks. Operations of torch run on the current stream, collectives and messages on a stream of their own as
NCCL's do, `wait` orders the current stream behind them, and the host is ordered behind a stream only where it waits.
Two accesses of the same bytes, one of them a write, that nothing orders are a race; so is memory that goes back to the
allocator of one stream while another may still use it.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megallama.comm.group import Group, Groups, Handle, Op, Solo

HOST, COMPUTE = "host", "compute"
Clock = dict[str, int]
_rank = threading.local()  # .recorder of the rank that this thread is


@dataclass
class Access:
    """Of bytes `start` to `stop` of a storage, by `actor` at its time `tick`."""

    actor: str
    tick: int
    start: int
    stop: int
    write: bool
    what: str


@dataclass
class Memory:
    """A storage: from which stream's allocator it is, and who uses it."""

    owner: str | None  # None: not from the recorder's time, or the host's
    accesses: list[Access] = field(default_factory=list)
    users: set[str] = field(default_factory=set)  # of which the allocator knows


class Stream:
    """In place of torch.cuda.Stream."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name, self.device = recorder, name, torch.device("cuda", 0)

    def record_event(self) -> Clock:
        return dict(self.recorder.clock(self.name))

    def wait_event(self, event: Clock) -> None:
        self.recorder.join(self.name, event)

    def synchronize(self) -> None:
        self.recorder.join(HOST, self.recorder.clock(self.name))


class Recorder(TorchDispatchMode):
    """Of one rank; within `with`, all that its thread does is recorded. `races` is what it found."""

    def __init__(self) -> None:
        super().__init__()
        self.races: list[str] = []
        self.seen: dict[str, int] = {}  # accesses, by the function of the package that made them
        self.current = Stream(self, COMPUTE)
        self._clocks: dict[str, Clock] = {}
        self._memories: dict[int, Memory] = {}
        self._freed: deque[tuple[int, Memory]] = deque()
        self._paused = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds

    def __enter__(self) -> Recorder:
        _rank.recorder = self
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        _rank.recorder = None
        super().__exit__(*error)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, nothing is recorded: what stands for another processor's work."""
        before, self._paused = self._paused, True
        yield
        self._paused = before

    def clock(self, actor: str) -> Clock:
        """What has happened before anything that `actor` does from here on."""
        return self._clocks.setdefault(actor, {})

    def join(self, actor: str, other: Clock) -> None:
        """`actor` goes on when all of `other` has happened."""
        own = self.clock(actor)
        own.update({name: tick for name, tick in other.items() if tick > own.get(name, 0)})

    def launch(self, actor: str) -> None:
        """The host gives `actor` something to do."""
        self.join(actor, self.clock(HOST))
        own = self.clock(actor)
        own[actor] = own.get(actor, 0) + 1

    def access(self, actor: str, tensor: Tensor, write: bool, what: str) -> None:
        """`actor` reads or writes all of `tensor`, in what it was last given to do."""
        self._settle()
        if not tensor.numel():
            return
        memory, clock = self._memory(tensor, None), self.clock(actor)
        first = tensor.storage_offset()
        last = first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        one = Access(actor, clock[actor], first * tensor.itemsize, (last + 1) * tensor.itemsize, write, what)
        kept = []
        for other in memory.accesses:
            overlap = one.start < other.stop and other.start < one.stop
            ordered = clock.get(other.actor, 0) >= other.tick
            if overlap and (write or other.write) and not ordered:
                self._race(f"{_said(one)} is not ordered after {_said(other)}")
            within = one.start <= other.start and other.stop <= one.stop
            covered = within and ordered and (write or (actor == other.actor and not other.write))
            if not covered:
                kept.append(other)
        memory.accesses = [*kept, one]
        place = what.rpartition(" in ")[2]
        self.seen[place] = self.seen.get(place, 0) + 1

    def _memory(self, tensor: Tensor, owner: str | None) -> Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._memories:
            self._memories[key] = Memory(owner)
            weakref.finalize(storage, self._freed.append, (key, self._memories[key])).atexit = False
        return self._memories[key]

    def _settle(self) -> None:
        """Memory that nothing refers to any more may be used again by its stream, from here on."""
        while self._freed:
            key, memory = self._freed.popleft()
            if self._memories.get(key) is memory:
                del self._memories[key]
            if memory.owner is None:
                continue
            known = dict(self.clock(memory.owner))
            for name, tick in self.clock(HOST).items():
                known[name] = max(tick, known.get(name, 0))
            for one in memory.accesses:
                if one.actor not in memory.users and known.get(one.actor, 0) < one.tick:
                    self._race(f"memory of {memory.owner} is used again before {_said(one)}")

    def _race(self, text: str) -> None:
        if text not in self.races:
            self.races.append(text)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        given = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(func._schema.arguments)]
        out = func(*args, **kwargs)
        self._settle()
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return out  # a view: nothing is read
        actor, what = self.current.name, f"{func.overloadpacket.__name__} in {_place()}"
        self.launch(actor)
        for argument, value in given:
            write = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(value):
                self.access(actor, tensor, write, what)
        for tensor in _tensors(out):
            if tensor.untyped_storage()._cdata not in self._memories:
                self._memory(tensor, actor)
                self.access(actor, tensor, True, what)
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.current.synchronize()
        return out

    def host_reads(self, tensor: Tensor, what: str, actor: str = HOST) -> None:
        """The host, or a thread of it, looks at memory without asking torch."""
        own = self.clock(actor)
        own[actor] = own.get(actor, 0) + 1
        self.access(actor, tensor, False, what)

    def used_by(self, tensor: Tensor, stream: Stream) -> None:
        """Tensor.record_stream."""
        self._memory(tensor, None).users.add(stream.name)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _said(one: Access) -> str:
    return f"{'write' if one.write else 'read'} by {one.what} ({one.actor})"


def _place() -> str:
    """The innermost function of the package that is being run."""
    frame = sys._getframe(2)
    while frame.f_back is not None and "/megallama/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_code.co_qualname


class _Pending:
    """The handle of what a stream of NCCL does."""

    def __init__(self, recorder: Recorder, inner: Handle, event: Clock) -> None:
        self._recorder, self._inner, self._event = recorder, inner, event

    def wait(self) -> None:
        with self._recorder.paused():
            self._inner.wait()
        self._recorder.current.wait_event(self._event)

    def done(self) -> bool:
        with self._recorder.paused():
            done = self._inner.done()
        if done:
            self._recorder.join(HOST, self._event)
        return done


class OverNccl:
    """A `Group` as it is over NCCL: what is started runs behind the current stream, on a stream of its own."""

    def __init__(self, inner: Group, recorder: Recorder) -> None:
        self.inner, self._recorder = inner, recorder
        self.name, self.rank, self.size, self.ranks = inner.name, inner.rank, inner.size, inner.ranks

    def _start(
        self, what: str, stream: str, reads: Sequence[Tensor], writes: Sequence[Tensor], start: Callable[[], Handle]
    ) -> Handle:
        recorder = self._recorder
        recorder.join(stream, recorder.current.record_event())
        recorder.launch(stream)
        for write, tensors in enumerate((reads, writes)):
            for tensor in tensors:
                recorder.access(stream, tensor, bool(write), f"{what} in {_place()}")
        event = dict(recorder.clock(stream))
        with recorder.paused():
            return _Pending(recorder, start(), event)

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        return self._start("all_reduce", self.name, [], [tensor], lambda: self.inner.all_reduce(tensor, op))

    def all_gather(self, output: Tensor, shard: Tensor) -> Handle:
        return self._start("all_gather", self.name, [shard], [output], lambda: self.inner.all_gather(output, shard))

    def reduce_scatter(self, output: Tensor, full: Tensor) -> Handle:
        start = lambda: self.inner.reduce_scatter(output, full)  # noqa: E731
        return self._start("reduce_scatter", self.name, [], [full, output], start)

    def all_to_all(self, output: Tensor, full: Tensor) -> Handle:
        return self._start("all_to_all", self.name, [full], [output], lambda: self.inner.all_to_all(output, full))

    def send(self, tensor: Tensor, to: int) -> Handle:
        return self._start("send", f"{self.name} to {to}", [tensor], [], lambda: self.inner.send(tensor, to))

    def recv(self, tensor: Tensor, source: int) -> Handle:
        return self._start("recv", f"{self.name} of {source}", [], [tensor], lambda: self.inner.recv(tensor, source))

    def barrier(self) -> None:
        with self._recorder.paused():
            self.inner.barrier()

    def gather_values(self, value: Any, summary: Callable[[list[Any]], Any] = list) -> Any:
        with self._recorder.paused():
            return self.inner.gather_values(value, summary)


def over_nccl(groups: Groups, recorder: Recorder) -> Groups:
    """All groups of a rank; those of one rank stay what they are."""
    names = ("tp", "cp", "dp_cp", "pp", "embedding", "kv", "world")
    found = {name: getattr(groups, name) for name in names}
    return replace(groups, **{n: g if isinstance(g, Solo) else OverNccl(g, recorder) for n, g in found.items()})


def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda's streams are those of the recorder of the rank whose thread asks."""

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, stream.recorder.current = stream.recorder.current, stream
        yield
        stream.recorder.current = before

    def tolist(tensor: Tensor) -> Any:
        recorder = getattr(_rank, "recorder", None)
        if recorder is not None:
            recorder.current.synchronize()
            recorder.host_reads(tensor, f"tolist in {_place()}")
        return plain(tensor)

    def pin(tensor: Tensor) -> Tensor:
        recorder = getattr(_rank, "recorder", None)
        with nullcontext() if recorder is None else recorder.paused():  # the host's work
            return tensor.clone()

    plain, empty = Tensor.tolist, torch.empty
    recorded = property(lambda tensor: getattr(_rank, "recorder", None) is not None)
    monkeypatch.setattr(Tensor, "is_cuda", recorded)  # where the program asks
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **named: empty(*size, **named))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(_rank.recorder, "copies"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: _rank.recorder.current)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: stream.recorder.used_by(tensor, stream))
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "tolist", tolist)
