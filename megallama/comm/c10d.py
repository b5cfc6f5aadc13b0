"""Groups over torch.distributed: NCCL between GPUs, gloo between CPUs.

Gloo's reduce-scatter and all-gather take two to five times as long as sending the pieces directly, and a small
all-reduce twice as long, so these are messages; the sum is taken in `wait()`, in rank order.
"""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.comm.flight_record import FlightRecord
from megallama.comm.group import ContactLost, Handle, Op

_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
_HALF = (torch.bfloat16, torch.float16)
MESSAGE, PIECE, FREE_TAG = range(3)  # tags: of callers, of our collectives' pieces; free from here on


class Works:
    """Handle of torch's works, and of what follows them; an empty `limit`: the process group's.

    gloo tells only who waits, and once, that a send is over: a thread per receiver does, in order, and tells `over`.
    """

    over: Future[None] | None = None

    def __init__(
        self, where: str, works: Sequence[Any], keep: Any, finish: Callable[[], Any] | None, limit: Sequence[timedelta],
        record: FlightRecord, place: int,
    ) -> None:  # fmt: skip
        self._where, self._works, self._keep, self._finish, self._limit = where, works, keep, finish, limit
        self.record, self.place = record, place

    def wait(self) -> None:
        self.record.waits(self.place)
        self.wait_unseen() if self.over is None else self.over.result()
        self.record.arrived(self.place)

    def wait_unseen(self) -> None:
        """In a thread that is not the one whose waits are recorded."""
        try:
            for work in self._works:
                try:
                    work.wait(*self._limit)
                except RuntimeError as error:
                    raise ContactLost(str(error)) from error
            if self._finish is not None:
                with torch.no_grad():
                    self._finish()
        except RuntimeError as error:
            error.add_note(f"in {self._where}")
            raise
        self._works, self._keep, self._finish = (), None, None

    def done(self) -> bool:
        if self.over is not None:
            return self.over.done() and self.over.result() is None
        return self._finish is None and all(work.is_completed() for work in self._works)


def _wait_in_order(queue: SimpleQueue[tuple[Works, Future[None]]]) -> None:
    while True:
        works, over = queue.get()
        try:
            works.wait_unseen()
            over.set_result(None)
        except RuntimeError as error:
            over.set_exception(error)


class C10d:
    """A `Group` over a torch process group.

    `down`, for NCCL groups that send and receive, is a second process group of these ranks, for messages to
    lower ranks: NCCL runs those of two ranks one after another, and both may send first.
    """

    _direct_bytes = 1 << 20  # up to so much a gloo all-reduce is quicker as one direct exchange

    def __init__(
        self, process_group: dist.ProcessGroup, name: str, ranks: Sequence[int], rank: int, device: torch.device,
        down: dist.ProcessGroup | None = None, record: FlightRecord | None = None,
    ) -> None:  # fmt: skip
        """`rank`, of this process, and `ranks` are global."""
        self.name, self.ranks = name, tuple(ranks)
        self.rank, self.size = self.ranks.index(rank), len(self.ranks)
        self.device, self.record = device, record or FlightRecord()
        self._number = self.record.add_group(name, self.ranks)
        self._pg, self._down = process_group, down or process_group
        self._direct = device.type == "cpu"
        self._sends: dict[int, SimpleQueue[tuple[Works, Future[None]]]] = {}
        # gloo bounds messages as the group was made; NCCL's waits may not block the host
        self._limit: tuple[timedelta, ...] = ()

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        self._check(tensor)
        if not self._direct or tensor.nbytes * (self.size - 1) > self._direct_bytes:
            work = started(dist.all_reduce, tensor, _REDUCE[op], group=self._pg, async_op=True)
            return self._handle("all_reduce", [work], tensor, tensor)
        flat = tensor.view(-1)
        return self._exchange("all_reduce", tensor, [flat] * self.size, lambda parts: _reduce(parts, flat, op))

    def all_gather(self, output: Tensor, shard: Tensor) -> Handle:
        self._check(output, shard)
        assert output.numel() == self.size * shard.numel(), f"{output.shape} is not {self.size} x {shard.shape}"
        if not self._direct:
            work = started(dist.all_gather_into_tensor, output, shard, group=self._pg, async_op=True)
            return self._handle("all_gather", [work], (output, shard), output)
        places = output.view(-1).chunk(self.size)
        return self._exchange("all_gather", output, [shard.view(-1)] * self.size, partial(_put, places), places)

    def reduce_scatter(self, output: Tensor, full: Tensor) -> Handle:
        self._check(output, full)
        assert full.numel() == self.size * output.numel(), f"{full.shape} is not {self.size} x {output.shape}"
        if not self._direct:
            work = started(dist.reduce_scatter_tensor, output, full, group=self._pg, async_op=True)
            return self._handle("reduce_scatter", [work], (output, full), full)
        flat, pieces = output.view(-1), full.view(-1).chunk(self.size)
        return self._exchange("reduce_scatter", full, pieces, lambda parts: _reduce(parts, flat))

    def all_to_all(self, output: Tensor, full: Tensor) -> Handle:
        self._check(output, full)
        assert output.numel() == full.numel(), f"{output.shape} is not {full.shape}"
        if not self._direct:
            work = started(dist.all_to_all_single, output, full, group=self._pg, async_op=True)
            return self._handle("all_to_all", [work], (output, full), full)
        places, pieces = (x.view(-1).chunk(self.size) for x in (output, full))
        return self._exchange("all_to_all", full, pieces, partial(_put, places), places)

    def send(self, tensor: Tensor, to: int, tag: int = MESSAGE) -> Handle:
        self._check(tensor, peer=to)
        channel = self._down if to < self.rank else self._pg
        work = started(dist.isend, tensor, group=channel, group_dst=to, tag=tag)
        handle = self._handle("send", [work], tensor, tensor, peer=to)
        if not self._direct:
            return handle
        if to not in self._sends:
            self._sends[to] = SimpleQueue()
            threading.Thread(target=_wait_in_order, args=(self._sends[to],), daemon=True, name="gloo-sends").start()
        handle.over = Future()
        self._sends[to].put((handle, handle.over))
        return handle

    def recv(self, tensor: Tensor, source: int, tag: int = MESSAGE) -> Handle:
        self._check(tensor, peer=source)
        channel = self._down if self.rank < source else self._pg
        work = started(dist.irecv, tensor, group=channel, group_src=source, tag=tag)
        return self._handle("recv", [work], tensor, tensor, peer=source)

    def barrier(self) -> None:
        token = torch.zeros(1, device=self.device)
        self.all_reduce(token).wait()
        token.item()  # on CUDA wait() only orders the stream; this waits for it

    def gather_values(self, value: Any, summary: Callable[[list[Any]], Any] = list) -> Any:
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.empty(self.size, dtype=torch.int64, device=self.device)
        self.all_gather(sizes, torch.tensor([data.numel()], device=self.device)).wait()
        lengths = sizes.tolist()
        own = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        own[: data.numel()] = data.to(self.device)
        everyone = torch.empty(self.size * own.numel(), dtype=torch.uint8, device=self.device)
        self.all_gather(everyone, own).wait()
        rows = everyone.cpu().view(self.size, -1)
        return summary([json.loads(bytes(row[:n].tolist())) for row, n in zip(rows, lengths, strict=True)])

    def bound(self, timeout: timedelta) -> None:
        """Operations that start from here on fail after `timeout`."""
        self._limit = (timeout,) if self._direct else ()
        for group in dict.fromkeys((self._pg, self._down)):
            if hasattr(group, "set_timeout"):
                group.set_timeout(timeout)
            else:  # before torch 2.13
                dist.distributed_c10d._set_pg_timeout(timeout, group)

    def close(self) -> None:
        """Let go of the process groups: then gloo closes its connections."""
        del self._pg, self._down

    def _check(self, *tensors: Tensor, peer: int = -1) -> None:
        assert peer != self.rank, f"{self.name}: rank {peer} sends to itself, or receives from itself"
        for tensor in tensors:
            assert tensor.is_contiguous() and tensor.numel(), f"{self.name}: {tuple(tensor.shape)} empty or strided"
            assert tensor.dtype == tensors[0].dtype, f"{self.name}: {tensor.dtype} and {tensors[0].dtype}"

    def _handle(
        self, what: str, works: Sequence[Any], keep: Any, tensor: Tensor, finish: Callable[[], Any] | None = None,
        peer: int = -1,
    ) -> Works:  # fmt: skip
        other = self.ranks[peer] if peer >= 0 else -1
        place = self.record.begins(self._number, what, tensor.shape[0] if tensor.dim() else 1, tensor.nbytes, other)
        towards = f" {'to' if what == 'send' else 'from'} {other}" if peer >= 0 else ""
        where = f"{what}{towards} of group {self.name} (ranks {self.ranks})"
        return Works(where, works, keep, finish, self._limit, self.record, place)

    def _exchange(
        self, what: str, keep: Tensor, outgoing: Sequence[Tensor], use: Callable[[Sequence[Tensor]], None],
        incoming: Sequence[Tensor] = (),
    ) -> Handle:  # fmt: skip
        """Give outgoing[r] to rank r; what each gave this one, in `incoming`, goes to `use`."""
        own = outgoing[self.rank]
        others = [p for r, p in enumerate(incoming) if r != self.rank]
        parts = others or [*own.new_empty((self.size - 1, own.numel())).unbind()]
        parts.insert(self.rank, own)
        works = []
        for distance in range(1, self.size):
            to, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
            works.append(started(dist.irecv, parts[source], group=self._pg, group_src=source, tag=PIECE))
            works.append(started(dist.isend, outgoing[to], group=self._pg, group_dst=to, tag=PIECE))
        return self._handle(what, works, (keep, outgoing), keep, lambda: use(parts))

    def warm_up(self) -> None:
        """Open NCCL's connections, in one order: on first use, in a step, ranks could wait crosswise."""
        if self.name == "cp":  # it exchanges, too
            pieces = torch.zeros(2, self.size, device=self.device)
            self.all_to_all(*pieces).wait()
        if self._down is self._pg:
            return self.barrier()
        token = torch.zeros(1, device=self.device)
        for low, high in sorted({tuple(sorted((i, (i + 1) % self.size))) for i in range(self.size)}):
            for sender, receiver in ((low, high), (high, low)):
                if self.rank == sender:
                    self.send(token, receiver).wait()
                elif self.rank == receiver:
                    self.recv(token, sender).wait()
        torch.cuda.synchronize(self.device)


def started(operation: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What `operation` returns. Raises: ContactLost where others have gone."""
    try:
        return operation(*arguments, **named)
    except RuntimeError as error:
        raise ContactLost(f"{operation.__name__}: {error}") from error


def _put(places: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    for place, part in zip(places, parts, strict=True):
        if place.data_ptr() != part.data_ptr():
            place.copy_(part)


def _reduce(parts: Sequence[Tensor], output: Tensor, op: Op = "sum") -> None:
    """output = the largest, or the sum, of `parts`, two or more, added in order; `output` may be one of them.

    Half precision is added in fp32 and rounded once.
    """
    if op == "max":
        total = torch.stack([*parts]).amax(0)
    elif len(parts) == 2:
        torch.add(parts[0], parts[1], out=output)  # torch adds halves in fp32 too
        return
    else:
        total = parts[0].float().add_(parts[1]) if parts[0].dtype in _HALF else parts[0] + parts[1]
        for part in parts[2:]:
            total.add_(part)
    output.copy_(total)
