"""Ranks as threads of one process: an 8-rank test in milliseconds, with a debugger in reach.

`ThreadGroup` moves real data and is stricter than any network: until `wait()` an output holds NaN
(integers: a huge value), so a missing wait shows as a wrong number every time; an input that is
changed under way, or ranks that call different operations, shapes or dtypes, are errors that name
the ranks; `send(...).wait()` returns only when the receiver has asked for the message.  Sums run in
rank order (half precision in float32), so results are the same in every run.

One thread computes at a time, until it waits for another: threads that compute together take the interpreter's lock
from one another in every operation, which costs several times what tiny models do.  Who holds the turn for long, as one
that sleeps or waits for something else, has others beside it.

With a `Delays` the threads also sleep at random, and about half of the inputs are read as late as the contract of
`Group` permits: when their owner waits, or when another rank that waits needs them.  Whoever writes to an input under
way then changes what others receive.  A handle that is dropped before anybody has waited for it is an error.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from megallama.comm.group import Group, Groups, Handle, Op, Solo, build_groups
from megallama.plan.topology import Topology

_HALF = (torch.bfloat16, torch.float16)
_PATIENCE = 0.2  # that a thread waits for its turn, then goes on without it [s]


class Aborted(Exception):
    """Another rank failed first."""


@dataclass
class _Meeting:
    """What the members of one operation have brought so far; `complete` wakes those who wait, and nobody else."""

    complete: threading.Condition
    brought: dict[int, Any] = field(default_factory=dict)
    what: dict[int, str] = field(default_factory=dict)
    taken: int = 0


class Delays:
    """Chance of one rank: when it sleeps, which inputs are read late, how often `done` does not know yet."""

    def __init__(self, seed: int, rank: int) -> None:
        self._random = random.Random(1000 * seed + rank)

    def nap(self) -> None:
        """Let others go first, now and then."""
        if self._random.random() < 0.3:
            time.sleep(self._random.random() * 1e-3)

    def late(self) -> bool:
        """Whether the input of the next operation is read late."""
        return self._random.random() < 0.5


class _Input:
    """A tensor that is read once: at once, or later by whoever comes first."""

    def __init__(self, tensor: Tensor, late: bool) -> None:
        self._lock = threading.Lock()
        self._late, self._copy = (tensor.detach(), None) if late else (None, tensor.detach().clone())

    def read(self) -> Tensor:
        with self._lock:
            if self._late is not None:  # the tensor itself is let go: its owner counts on that
                self._late, self._copy = None, self._late.clone()
            assert self._copy is not None
            return self._copy


class _Turn:
    """Held by the rank that computes; one that has waited long for it computes without it.

    Other threads of a rank, as one that saves, compute beside it: they neither take nor give.
    """

    def __init__(self) -> None:
        self._lock, self._mine = threading.Lock(), threading.local()

    def begin(self) -> None:
        """Of a rank's own thread, first."""
        self._mine.held = False
        self.take()

    def take(self) -> None:
        if hasattr(self._mine, "held"):
            self._mine.held = self._lock.acquire(timeout=_PATIENCE)

    def give(self) -> None:
        if getattr(self._mine, "held", False):
            self._mine.held = False
            self._lock.release()


class _Hub:
    """The place where the threads of one `run_threads` meet."""

    def __init__(self, timeout: float, seed: int | None) -> None:
        self.timeout, self.seed = timeout, seed
        self.turn = _Turn()
        self.dropped: list[str] = []
        self.lock = threading.Lock()
        self.meetings: dict[Any, _Meeting] = {}
        self.error: BaseException | None = None

    def abort(self, error: BaseException) -> None:
        with self.lock:
            self.error = self.error or error
            for meeting in self.meetings.values():
                meeting.complete.notify_all()

    def bring(self, key: Any, members: int, rank: int, what: str, value: Any) -> None:
        with self.lock:
            if key not in self.meetings:
                self.meetings[key] = _Meeting(threading.Condition(self.lock))
            meeting = self.meetings[key]
            meeting.brought[rank], meeting.what[rank] = value, what
            for other, theirs in meeting.what.items():
                if theirs != what:
                    raise RuntimeError(f"rank {rank} calls {what} where rank {other} calls {theirs}")
            if len(meeting.brought) == members:
                meeting.complete.notify_all()

    def ready(self, key: Any, members: int) -> bool:
        """Whether `take` would return at once."""
        with self.lock:
            return self.error is not None or len(self.meetings[key].brought) == members

    def take(self, key: Any, members: Sequence[int], rank: int, what: str) -> dict[int, Any]:
        """Everything the members brought, once all have; the last to take clears the table."""
        if not self.ready(key, len(members)):
            self.turn.give()
            try:
                self._wait(key, members, rank, what)
            finally:
                self.turn.take()
        with self.lock:
            meeting = self.meetings[key]
            if self.error is not None:
                raise Aborted(f"rank {rank} stopped in {what}") from self.error
            meeting.taken += 1
            if meeting.taken == len(members):
                del self.meetings[key]
            return meeting.brought

    def _wait(self, key: Any, members: Sequence[int], rank: int, what: str) -> None:
        deadline = time.monotonic() + self.timeout
        with self.lock:
            meeting = self.meetings[key]
            while self.error is None and len(meeting.brought) < len(members):
                if not meeting.complete.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    missing = [r for r in members if r not in meeting.brought]
                    raise TimeoutError(
                        f"rank {rank} waited {self.timeout:g} s in {what}: ranks {missing} never called it"
                    )


class _Pending:
    """A handle whose work happens in `wait`."""

    def __init__(self, group: ThreadGroup, what: str, finish: Callable[[], Any], ready: Callable[[], bool]) -> None:
        self._finish: Callable[[], Any] | None = finish
        self._group, self._what, self._ready = group, what, ready

    def wait(self) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            self._group.nap()
            with torch.no_grad():
                finish()

    def done(self) -> bool:
        if self._finish is not None and self._ready() and not self._group.late():
            self.wait()
        return self._finish is None

    def __del__(self) -> None:
        if self._finish is not None:
            self._group.dropped(self._what)


def _poison(tensor: Tensor) -> None:
    if tensor.dtype == torch.bool:
        tensor.logical_not_()
    else:
        tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _overlap(a: Tensor, b: Tensor) -> bool:
    first, second = sorted((a, b), key=Tensor.data_ptr)
    return first.data_ptr() + first.nbytes > second.data_ptr()


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].dtype in _HALF:
        return reduce(torch.add, [t.float() for t in tensors]).to(tensors[0].dtype)
    return reduce(torch.add, tensors)


class ThreadGroup:
    """A `Group` whose ranks are threads. Made by `run_threads`; sub-groups by `split`."""

    def __init__(self, hub: _Hub, key: Any, name: str, ranks: tuple[int, ...], global_rank: int) -> None:
        self.name, self.ranks = name, ranks
        self.rank, self.size = ranks.index(global_rank), len(ranks)
        self._hub, self._key, self._me = hub, key, global_rank
        self._count: dict[Any, int] = {}
        self._delays = None if hub.seed is None else Delays(hub.seed, global_rank)

    def split(self, partition: Sequence[Sequence[int]], name: str) -> Group:
        """My group of a partition of the global ranks (Solo if I am alone); every rank calls it."""
        own = next((tuple(ranks) for ranks in partition if self._me in ranks), (self._me,))
        key = (self._key, name, self._next("split"), own)
        return ThreadGroup(self._hub, key, name, own, self._me) if len(own) > 1 else Solo(name, self._me)

    def _next(self, kind: Any) -> int:
        self._count[kind] = self._count.get(kind, -1) + 1
        return self._count[kind]

    def _meet(self, what: str, value: Any) -> Callable[[], list[Any]]:
        """Bring a value to the group's next operation; the result waits for everybody's, in rank order."""
        self.nap()
        number = self._next("collective")
        key, label = (self._key, number), f"{what} (operation {number} of group {self.name} {self.ranks})"
        self._hub.bring(key, self.size, self._me, label, value)

        def everything() -> list[Any]:
            brought = self._hub.take(key, self.ranks, self._me, label)
            return [brought[r] for r in self.ranks]

        return everything

    def nap(self) -> None:
        if self._delays is not None:
            self._hub.turn.give()
            self._delays.nap()
            self._hub.turn.take()

    def late(self) -> bool:
        return self._delays is not None and self._delays.late()

    def dropped(self, what: str) -> None:
        self._hub.dropped.append(f"rank {self._me} dropped the handle of {what} in {self.name} before wait()")

    def _check(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            assert tensor.is_contiguous(), f"{self.name}: tensor {tuple(tensor.shape)} is not contiguous"
            assert tensor.dtype == tensors[0].dtype, f"{self.name}: {tensor.dtype} and {tensors[0].dtype}"

    def _start(self, what: str, own: _Input, finish: Callable[[list[Tensor]], Any]) -> Handle:
        """An operation on everybody's input; `finish` gets them when it is waited for, and writes the result."""
        everything = self._meet(what, own)

        def end() -> None:
            own.read()  # from now on its owner may write to it
            finish([value.read() for value in everything()])

        return _Pending(self, what, end, lambda: False)

    @torch.no_grad()
    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        self._check(tensor)

        def finish(parts: list[Tensor]) -> None:
            tensor.copy_(_sum(parts) if op == "sum" else reduce(torch.maximum, parts))

        late = self.late()
        own = _Input(tensor, late)
        if not late:
            _poison(tensor)
        return self._start(f"all_reduce {op} {_describe(tensor)}", own, finish)

    @torch.no_grad()
    def all_gather(self, output: Tensor, shard: Tensor) -> Handle:
        self._check(output, shard)
        assert output.numel() == self.size * shard.numel(), f"{output.shape} is not {self.size} x {shard.shape}"
        before, inside, late = shard.detach().clone(), _overlap(output, shard), self.late()

        def finish(parts: list[Tensor]) -> None:
            if not (inside or late):
                assert _same_bytes(shard, before), f"{self.name}: all_gather's shard was changed before wait()"
            torch.cat([part.reshape(-1) for part in parts], out=output.view(-1))

        own = _Input(shard, late)
        _poison(output)
        if inside and late:
            shard.copy_(before)
        return self._start(f"all_gather {_describe(shard)}", own, finish)

    @torch.no_grad()
    def reduce_scatter(self, output: Tensor, full: Tensor) -> Handle:
        self._check(output, full)
        assert full.numel() == self.size * output.numel(), f"{full.shape} is not {self.size} x {output.shape}"
        late = self.late()
        rows = slice(self.rank * output.numel(), (self.rank + 1) * output.numel())

        def finish(parts: list[Tensor]) -> None:
            _poison(full)
            output.view(-1).copy_(_sum([part.view(-1)[rows] for part in parts]))

        own = _Input(full, late)
        if not late:
            _poison(full)
        if not (late and _overlap(output, full)):
            _poison(output)
        return self._start(f"reduce_scatter {_describe(full)}", own, finish)

    @torch.no_grad()
    def all_to_all(self, output: Tensor, full: Tensor) -> Handle:
        self._check(output, full)
        assert output.numel() == full.numel() and not _overlap(output, full), f"{output.shape} is not {full.shape}"
        before, late = full.detach().clone(), self.late()

        def finish(parts: list[Tensor]) -> None:
            assert late or _same_bytes(full, before), f"{self.name}: all_to_all's input was changed before wait()"
            torch.cat([part.view(-1).chunk(self.size)[self.rank] for part in parts], out=output.view(-1))

        own = _Input(full, late)
        _poison(output)
        return self._start(f"all_to_all {_describe(full)}", own, finish)

    def send(self, tensor: Tensor, to: int) -> Handle:
        assert to != self.rank, f"{self.name}: rank {to} sends to itself"
        self._check(tensor)
        before, late = tensor.detach().clone(), self.late()
        own = _Input(tensor, late)
        message, ready, label = self._message(tensor, self.rank, to, own)

        def finish() -> None:
            assert late or _same_bytes(tensor, before), f"{self.name}: a sent tensor was changed before wait()"
            own.read()
            message()

        return _Pending(self, label, finish, ready)

    @torch.no_grad()
    def recv(self, tensor: Tensor, source: int) -> Handle:
        assert source != self.rank, f"{self.name}: rank {source} receives from itself"
        self._check(tensor)
        message, ready, label = self._message(tensor, source, self.rank, None)
        _poison(tensor)
        return _Pending(self, label, lambda: tensor.copy_(message().read()), ready)

    def _message(self, tensor: Tensor, source: int, to: int, value: _Input | None) -> tuple[Any, Any, str]:
        """A function that waits for the message and returns it, one that says whether it is there, and its name."""
        self.nap()
        number, pair = self._next((source, to)), (self.ranks[source], self.ranks[to])
        key = (self._key, source, to, number)
        label = f"message {number} from {pair[0]} to {pair[1]} in {self.name} {_describe(tensor)}"
        self._hub.bring(key, 2, self._me, label, value)
        take = self._hub.take
        return lambda: take(key, pair, self._me, label)[pair[0]], lambda: self._hub.ready(key, 2), label

    def barrier(self) -> None:
        self._meet("barrier", None)()

    def gather_values(self, value: Any, summary: Callable[[list[Any]], Any] = list) -> Any:
        return summary([json.loads(text) for text in self._meet("gather_values", json.dumps(value))()])


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def run_threads(
    size: int,
    fn: Callable[[Any], Any],
    grid: Topology | None = None,
    *,
    num_kv_heads: int = 0,
    timeout: float = 60.0,
    delays: int | None = None,
) -> list[Any]:
    """fn(world group) on `size` threads; the results in rank order.

    With `grid`, a Topology of `size` ranks, fn receives the rank's `Groups` instead.
    `delays` is the seed of random delays; then handles that nobody waited for are an AssertionError.
    Raises: what the first failing rank raised (the others stop at their next wait); TimeoutError,
    naming who is missing, when ranks wait for one another for `timeout` seconds.
    """
    hub, results = _Hub(timeout, delays), [None] * size

    def body(rank: int) -> None:
        hub.turn.begin()
        try:
            ranks = tuple(range(size))
            world: Group = ThreadGroup(hub, "world", "world", ranks, rank) if size > 1 else Solo("world", 0)
            results[rank] = fn(world if grid is None else _groups(world, rank, grid, num_kv_heads))
        except Aborted:
            pass
        except BaseException as error:  # noqa: BLE001 - carried to the caller
            error.add_note(f"(in thread rank {rank} of {size})")
            hub.abort(error)
        finally:
            hub.turn.give()

    threads = [threading.Thread(target=body, args=(r,), name=f"rank-{r}", daemon=True) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.1)
            if hub.error is not None:
                thread.join(5)  # a rank that computes on is left behind: it stops at its next wait
                break
    if hub.error is not None:
        raise hub.error
    if delays is not None:
        assert not hub.dropped, hub.dropped[0]
    return results


def _groups(world: Group, rank: int, grid: Topology, num_kv_heads: int) -> Groups:
    def make(name: str, partition: Sequence[tuple[int, ...]]) -> Group:
        return world.split(partition, name) if isinstance(world, ThreadGroup) else Solo(name, rank)

    return build_groups(grid, rank, num_kv_heads, make)
