"""Groups over torch.distributed: NCCL between GPUs, gloo between CPUs.

NCCL's own collectives are used as they are.  Gloo's are not all good: its reduce-scatter and
all-gather take two to five times as long as sending the pieces directly, and a small all-reduce
twice as long, so these are built from point-to-point messages.  Gloo moves them in a thread of its
own, and the sum is taken in `wait()`, always in rank order (half precision in fp32), so the result
does not depend on when anybody waits.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.comm.errors import ContactLost
from megallama.comm.group import Handle, Op

_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
_HALF = (torch.bfloat16, torch.float16)
# A gloo all-reduce in which each rank sends at most this is quicker as one direct exchange.
_DIRECT_BYTES = 1 << 20
MESSAGE, PIECE, FREE_TAG = range(3)  # tags: send/recv of callers, pieces of our own collectives; free from here on


class Works:
    """Handle of one or more torch works, and what to do once they are done."""

    def __init__(
        self,
        where: str,
        works: Sequence[Any],
        keep: Any,
        finish: Callable[[], Any] | None = None,
        longest: timedelta | None = None,
    ) -> None:
        """`longest`: the longest that a wait may last; None leaves that to the process group."""
        self._where, self._works, self._keep, self._finish = where, works, keep, finish
        self._limit = () if longest is None else (longest,)

    def wait(self) -> None:
        try:
            for work in self._works:
                work.wait(*self._limit)
        except RuntimeError as error:
            lost = ContactLost(str(error))
            lost.add_note(f"in {self._where}")
            raise lost from error
        if self._finish is not None:
            with torch.no_grad():
                self._finish()
        self._works, self._keep, self._finish = (), None, None

    def done(self) -> bool:
        return self._finish is None and all(work.is_completed() for work in self._works)


class _Sends:
    """Sends to one rank over gloo, waited for in order by a thread.

    Gloo tells that a send has completed only to somebody who waits for it, and only once; without
    the thread a caller could not free what has arrived before it is willing to wait.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Send] = SimpleQueue()
        threading.Thread(target=self._watch, daemon=True, name="gloo-sends").start()

    def add(self, works: Works) -> Handle:
        send = _Send(works)
        self._queue.put(send)
        return send

    def _watch(self) -> None:
        while True:
            self._queue.get().watch()


class _Send:
    """Handle of one of `_Sends`."""

    def __init__(self, works: Works) -> None:
        self._works, self._over = works, threading.Event()
        self._error: RuntimeError | None = None

    def watch(self) -> None:
        try:
            self._works.wait()
        except RuntimeError as error:
            self._error = error
        self._over.set()

    def wait(self) -> None:
        self._over.wait()
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        if self._error is not None:
            raise self._error
        return self._over.is_set()


class C10d:
    """A `Group` over a torch process group.

    `down`, given for NCCL groups that send and receive, is a second process group of the same
    ranks: messages to lower ranks use it.  NCCL runs the messages of two ranks one after another;
    with a channel per direction two ranks that both send first do not wait for each other for ever.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        name: str,
        ranks: Sequence[int],
        rank: int,
        device: torch.device,
        down: dist.ProcessGroup | None = None,
    ) -> None:
        """`rank` is the global rank of this process, one of the global `ranks`."""
        self.name, self.ranks = name, tuple(ranks)
        self.rank, self.size = self.ranks.index(rank), len(self.ranks)
        self.device = device
        self._pg, self._down = process_group, down or process_group
        self._direct = device.type == "cpu"
        self._sends: dict[int, _Sends] = {}
        # gloo bounds messages by the time-out with which the group was made; NCCL's waits may not block the host
        self._longest: timedelta | None = None
        if down is not None:
            self._connect_ring()

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        self._check(tensor)
        if self._direct and op == "sum" and tensor.nbytes * (self.size - 1) <= _DIRECT_BYTES:
            return self._all_reduce_direct(tensor)
        work = started(dist.all_reduce, tensor, _REDUCE[op], group=self._pg, async_op=True)
        return self._handle("all_reduce", [work], tensor)

    def all_gather(self, output: Tensor, shard: Tensor) -> Handle:
        self._check(output, shard)
        assert output.numel() == self.size * shard.numel(), f"{output.shape} is not {self.size} x {shard.shape}"
        if not self._direct:
            work = started(dist.all_gather_into_tensor, output, shard, group=self._pg, async_op=True)
            return self._handle("all_gather", [work], (output, shard))
        places = self._pieces(output)
        works = self._exchange([shard] * self.size, places)
        if places[self.rank].data_ptr() != shard.data_ptr():
            with torch.no_grad():
                places[self.rank].copy_(shard.view(-1))
        return self._handle("all_gather", works, (output, shard))

    def reduce_scatter(self, output: Tensor, full: Tensor) -> Handle:
        self._check(output, full)
        assert full.numel() == self.size * output.numel(), f"{full.shape} is not {self.size} x {output.shape}"
        if not self._direct:
            work = started(dist.reduce_scatter_tensor, output, full, group=self._pg, async_op=True)
            return self._handle("reduce_scatter", [work], (output, full))
        pieces = self._pieces(full)
        parts = self._receive_space(pieces[self.rank])
        works = self._exchange(pieces, parts)
        return self._handle("reduce_scatter", works, (full, parts), lambda: add_in_order(parts, output.view(-1)))

    def send(self, tensor: Tensor, to: int, tag: int = MESSAGE) -> Handle:
        self._check(tensor)
        assert to != self.rank, f"{self.name}: rank {to} sends to itself"
        channel = self._down if to < self.rank else self._pg
        work = started(dist.isend, tensor, group=channel, group_dst=to, tag=tag)
        handle = self._handle(f"send to {self.ranks[to]}", [work], tensor)
        if not self._direct:
            return handle
        if to not in self._sends:
            self._sends[to] = _Sends()
        return self._sends[to].add(handle)

    def recv(self, tensor: Tensor, source: int, tag: int = MESSAGE) -> Handle:
        self._check(tensor)
        assert source != self.rank, f"{self.name}: rank {source} receives from itself"
        channel = self._down if self.rank < source else self._pg
        work = started(dist.irecv, tensor, group=channel, group_src=source, tag=tag)
        return self._handle(f"recv from {self.ranks[source]}", [work], tensor)

    def barrier(self) -> None:
        token = torch.zeros(1, device=self.device)
        self.all_reduce(token).wait()
        token.item()  # on CUDA wait() only orders the stream; this waits for it

    def gather_values(self, value: Any, summary: Callable[[list[Any]], Any] = list) -> Any:
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.empty(self.size, dtype=torch.int64, device=self.device)
        self.all_gather(sizes, torch.tensor([data.numel()], device=self.device)).wait()
        lengths = sizes.tolist()
        mine = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        mine[: data.numel()] = data.to(self.device)
        everyone = torch.empty(self.size * mine.numel(), dtype=torch.uint8, device=self.device)
        self.all_gather(everyone, mine).wait()
        rows = everyone.cpu().view(self.size, -1)
        return summary([json.loads(bytes(row[:n].tolist())) for row, n in zip(rows, lengths, strict=True)])

    def bound(self, timeout: timedelta) -> None:
        """Operations that start from here on fail after `timeout`."""
        self._longest = timeout if self._direct else None
        for group in dict.fromkeys((self._pg, self._down)):
            if hasattr(group, "set_timeout"):
                group.set_timeout(timeout)
            else:  # before torch 2.13
                dist.distributed_c10d._set_pg_timeout(timeout, group)

    def close(self) -> None:
        """Let go of the process groups: gloo closes its connections when nothing refers to them."""
        del self._pg, self._down

    def _check(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            assert tensor.is_contiguous() and tensor.numel(), f"{self.name}: {tuple(tensor.shape)} empty or strided"
            assert tensor.dtype == tensors[0].dtype, f"{self.name}: {tensor.dtype} and {tensors[0].dtype}"

    def _handle(self, what: str, works: Sequence[Any], keep: Any, finish: Callable[[], Any] | None = None) -> Works:
        where = f"{what} of group {self.name} (ranks {self.ranks})"
        return Works(where, works, keep, finish, self._longest)

    def _pieces(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.view(-1).chunk(self.size))

    def _receive_space(self, mine: Tensor) -> list[Tensor]:
        """One tensor per rank to receive into; this rank's own is `mine`."""
        space = list(mine.new_empty((self.size - 1, mine.numel())).unbind())
        return [*space[: self.rank], mine, *space[self.rank :]]

    def _exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[Any]:
        """Start sending outgoing[r] to every other rank r and receiving its piece into incoming[r]."""
        works = []
        for distance in range(1, self.size):
            to, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
            works.append(started(dist.irecv, incoming[source], group=self._pg, group_src=source, tag=PIECE))
            works.append(started(dist.isend, outgoing[to], group=self._pg, group_dst=to, tag=PIECE))
        return works

    def _all_reduce_direct(self, tensor: Tensor) -> Handle:
        flat = tensor.view(-1)
        parts = self._receive_space(flat)
        works = self._exchange([flat] * self.size, parts)
        return self._handle("all_reduce", works, (tensor, parts), lambda: add_in_order(parts, flat))

    def _connect_ring(self) -> None:
        """Open NCCL's connections between neighbours in one order: opened on first use, ranks could wait crosswise."""
        token = torch.zeros(1, device=self.device)
        for low, high in sorted({tuple(sorted((i, (i + 1) % self.size))) for i in range(self.size)}):
            for sender, receiver in ((low, high), (high, low)):
                if self.rank == sender:
                    self.send(token, receiver).wait()
                elif self.rank == receiver:
                    self.recv(token, sender).wait()
        torch.cuda.synchronize(self.device)


def started(operation: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What `operation` returns. Raises: ContactLost where it finds that the others have gone."""
    try:
        return operation(*arguments, **named)
    except RuntimeError as error:
        raise ContactLost(f"{operation.__name__}: {error}") from error


def add_in_order(parts: Sequence[Tensor], output: Tensor) -> None:
    """output = the sum of `parts`, two or more, added in order; `output` may be one of them.

    Half precision is added in fp32 and rounded once.
    """
    if len(parts) == 2:
        torch.add(parts[0], parts[1], out=output)  # torch adds halves in fp32 too
        return
    total = parts[0].float().add_(parts[1]) if parts[0].dtype in _HALF else parts[0] + parts[1]
    for part in parts[2:]:
        total.add_(part)
    output.copy_(total)
