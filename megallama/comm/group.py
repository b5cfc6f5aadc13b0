"""Process groups: the one interface through which ranks talk, a rank's groups, work of all.

Every operation starts at once and returns a `Handle`, which keeps its tensors alive until it is waited for.
An overlapped call keeps the handle while other work runs; a blocking one is ``group.all_reduce(x).wait()``.

Positions (`rank`, `source`, `to`) are indices *within the group*; `ranks` are global ranks.
"""

import logging
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from megallama.config.errors import InternalError, MachineError, MegallamaError
from megallama.plan.topology import Topology

Partition = Sequence[tuple[int, ...]]
Op = Literal["sum", "max"]
_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())  # without a run's `Logger` nothing is said twice


class ContactLost(RuntimeError):
    """Another rank has gone or does not answer: usually the echo of a failure elsewhere."""


class Handle(Protocol):
    """A communication under way; what stands here is that of one which has already finished."""

    def wait(self) -> None:
        """Return when the result may be read (on CUDA: by the current stream)."""
        return None

    def done(self) -> bool:
        """Whether it has finished, so that its tensors may be freed."""
        return True


class Done(Handle):
    """The handle of an operation that has already finished."""


class Assembly(Protocol):
    """Ranks that tell one another small values. All ranks call the same operations in the same order.

    What stands in its operations, and in those of `Group`, is what one rank by itself does.
    """

    name: str
    rank: int
    size: int

    def gather_values(self, value: Any, summary: Callable[[list[Any]], Any] = list) -> Any:
        """On every rank what `summary` makes of all ranks' small JSON values, in rank order; by default these.

        Rank 0 calls `summary`; the others may. It makes a JSON value of the values alone.
        """
        return summary([value])


class Group(Assembly, Protocol):
    """Ranks that communicate with one another. Tensors are contiguous and on the group's device.

    All ranks call the same operations with the same shapes and dtypes in the same order. Until
    `wait()` returns, an output must not be read and an input must not be written.
    """

    ranks: tuple[int, ...]

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        """Reduce `tensor` over the ranks, in place."""
        return Done()

    @torch.no_grad()
    def all_gather(self, output: Tensor, shard: Tensor) -> Handle:
        """Concatenate every rank's `shard` [n, ...] along dim 0 into `output` [size * n, ...].

        `shard` may be its own place in `output`, and must not overlap it elsewhere.
        """
        if output.data_ptr() != shard.data_ptr():
            output.copy_(shard)
        return Done()

    def reduce_scatter(self, output: Tensor, full: Tensor) -> Handle:
        """Sum `full` [size * n, ...] over the ranks; this rank's rows [n, ...] arrive in `output`.

        `full` may be overwritten. `output` may be this rank's place in `full`. The order of the sum
        depends on nothing but the group, so results are bitwise the same however calls overlap.
        """
        return self.all_gather(output, full)

    def all_to_all(self, output: Tensor, full: Tensor) -> Handle:
        """Piece r of `full` [size * n, ...] goes to rank r, whose piece is piece r of `output`."""
        return self.all_gather(output, full)

    def send(self, tensor: Tensor, to: int) -> Handle:
        """Send to one rank; messages from one rank to another arrive in the order they were sent.

        `wait()` may last until the receiver has asked for the message.
        """
        raise AssertionError("a group of one rank has nobody to send to and nobody to receive from")

    def recv(self, tensor: Tensor, source: int) -> Handle:
        """Receive from one rank into `tensor`."""
        return self.send(tensor, source)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        return None


class Solo(Group):
    """One rank: every operation is the identity, so no caller asks for the size."""

    size = 1
    rank = 0

    def __init__(self, name: str = "solo", global_rank: int = 0) -> None:
        self.name = name
        self.ranks: tuple[int, ...] = (global_rank,)


class Wrapped:
    """A group around another: `_call` says what comes before and after its operations."""

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

    def all_to_all(self, output: Tensor, full: Tensor) -> Handle:
        return self._call("all_to_all", full, lambda: self.inner.all_to_all(output, full))

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


class Place(NamedTuple):
    """Of a rank on an axis along which nobody talks."""

    rank: int
    size: int


@dataclass(frozen=True)
class Groups:
    """Everything a rank can talk to."""

    tp: Group  # tensor parallel: the same layers, other slices of them
    cp: Group  # context parallel: the same weights and samples, other tokens of them
    dp: Place  # data parallel: the same weights and places of tokens, other samples
    dp_cp: Group  # the same weights: gradients are reduced, state is sharded over it; called dp where cp is 1
    pp: Group  # pipeline: the same samples and slices, other layers
    embedding: Group  # the first and the last stage, with both copies of a tied embedding
    kv: Group  # tensor-parallel ranks with copies of the same key/value heads (tp > num_kv_heads)
    world: Group
    rank: int
    coords: dict[str, int]


def partitions(topology: Topology, num_kv_heads: int) -> dict[str, list[tuple[int, ...]]]:
    """Name -> all groups of that name, in creation order; each a partition of the ranks.

    tp > num_kv_heads gives tp / num_kv_heads neighbouring tp ranks the same key/value head: one kv group.
    """
    tp_groups = topology.groups("tp")
    copies = max(1, topology.tp // num_kv_heads) if num_kv_heads else 1
    pipelines, same = topology.groups("pp"), topology.groups("dp", "cp")
    several = {"cp": topology.groups("cp"), "dp_cp": same} if topology.cp > 1 else {"dp": same}
    ends = [tuple(sorted({ranks[end] for end in topology.ends})) for ranks in pipelines]
    middle = [(rank,) for ranks, two in zip(pipelines, ends, strict=True) for rank in ranks if rank not in two]
    return {
        "world": [tuple(range(topology.world_size))],
        "tp": tp_groups,
        **several,
        "pp": pipelines,
        "embedding": [*ends, *middle],
        "kv": [ranks[i : i + copies] for ranks in tp_groups for i in range(0, len(ranks), copies)],
    }


def build_groups(topology: Topology, rank: int, num_kv_heads: int, make: Callable[[str, Partition], Group]) -> Groups:
    """Rank's groups. make(name, partition) creates a partition's groups and returns rank's own."""
    groups = {name: make(name, parts) for name, parts in partitions(topology, num_kv_heads).items()}
    at, groups = topology.coords(rank), {"cp": Solo("cp", rank), **groups}
    dp_cp = groups.pop("dp_cp" if topology.cp > 1 else "dp")
    return Groups(**groups, dp_cp=dp_cp, dp=Place(at["dp"], topology.dp), rank=rank, coords=at)


def on_all_ranks(group: Assembly, what: str, work: Callable[[], Any], *, collect: bool = False) -> list[Any]:
    """Run `work` on this rank; the JSON values it returned on every rank, in rank order.

    collect: the values go to rank 0 alone; the others must not look at theirs. Raises, on every rank, the
    MegallamaError of the first rank that failed, with its status; a `decisive` one before others. Else an OSError
    is a MachineError, all others an InternalError, logged with traceback. The message: `what`, the rank, why.
    """
    value, failure, cause = None, None, None
    try:
        value = work()
    except Exception as caught:  # noqa: BLE001 - the other ranks must not wait for us
        kind, text, status = type(caught), str(caught), getattr(caught, "status", 0)
        if not isinstance(caught, MegallamaError):
            _log.error("%s failed", what, exc_info=caught)
            kind = MachineError if isinstance(caught, OSError) else InternalError
            text, status = f"{type(caught).__name__}: {caught}", kind.status
        cause, failure = caught, [[kind.__module__, kind.__qualname__], text, status, socket.gethostname()]
    values: list[Any] = []

    def summary(results: list[Any]) -> list[Any]:
        values.extend(value for value, _ in results)
        failed = [[rank, *bad] for rank, (_, bad) in enumerate(results) if bad is not None]
        return [[] if collect else values, failed]

    everyone, failed = group.gather_values([value, failure], summary)
    if not failed:
        return values if collect else everyone
    # a kind that this rank does not know is what it is an example of
    failed = [(r, getattr(sys.modules.get(module), name, MegallamaError), *f) for r, (module, name), *f in failed]
    failed.sort(key=lambda f: not getattr(f[1], "decisive", False))
    rank, kind, text, status, host = failed[0]
    who = f"rank {rank} on {host}: " if group.size > 1 else ""
    others = f" (and {len(failed) - 1} more ranks: {[f[0] for f in failed[1:9]]})" if len(failed) > 1 else ""
    error = kind.__new__(kind, f"{what}: {who}{text}{others}")  # whatever else its __init__ asks for
    error.shared, error.status = True, status
    raise error from cause
