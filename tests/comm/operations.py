"""Every operation of a `Group` against its definition: the same program for threads and for gloo."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import Tensor

from megallama.analysis.recording import Recording
from megallama.comm.group import Group, partitions
from megallama.comm.launch import World, files_needed
from megallama.comm.shared_memory import SharedMemory
from megallama.plan.topology import Topology

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64)


def values(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    """Rank's input: small integers, so that sums are exact in every dtype."""
    return ((torch.arange(count) * 7 + 3 * rank) % 11 - 5).to(dtype)


def check_all(group: Group, dtype: torch.dtype, rows: int) -> None:
    """Assert every operation on tensors of `rows` * 2 elements per rank."""
    n, me = group.size, group.rank
    everyone = [values(r, rows * 2 * n, dtype) for r in range(n)]

    for op, want in (("sum", torch.stack(everyone).sum(0)), ("max", torch.stack(everyone).amax(0))):
        x = everyone[me].clone().view(rows * n, 2)
        group.all_reduce(x, op).wait()  # type: ignore[arg-type]
        assert torch.equal(x.view(-1), want.to(dtype)), f"all_reduce {op} {dtype}"

    shard = everyone[me][: rows * 2].view(rows, 2).clone()
    output = torch.empty(rows * n, 2, dtype=dtype)
    group.all_gather(output, shard).wait()
    gathered = torch.cat([e[: rows * 2] for e in everyone])
    assert torch.equal(output.view(-1), gathered), f"all_gather {dtype}"

    output = torch.zeros(rows * n, 2, dtype=dtype)
    place = output[me * rows : (me + 1) * rows]
    place.copy_(shard)
    group.all_gather(output, place).wait()
    assert torch.equal(output.view(-1), gathered), f"all_gather in place {dtype}"

    want = torch.stack(everyone).sum(0).to(dtype).view(rows * n, 2)[me * rows : (me + 1) * rows]
    output = torch.empty(rows, 2, dtype=dtype)
    group.reduce_scatter(output, everyone[me].clone().view(rows * n, 2)).wait()
    assert torch.equal(output, want), f"reduce_scatter {dtype}"

    full = everyone[me].clone().view(rows * n, 2)
    place = full[me * rows : (me + 1) * rows]
    group.reduce_scatter(place, full).wait()
    assert torch.equal(place, want), f"reduce_scatter in place {dtype}"

    output = torch.empty(rows * n, 2, dtype=dtype)
    group.all_to_all(output, everyone[me].clone().view(rows * n, 2)).wait()
    swapped = torch.cat([e.view(n, -1)[me] for e in everyone])
    assert torch.equal(output.view(-1), swapped), f"all_to_all {dtype}"


def check_messages(group: Group, dtype: torch.dtype) -> None:
    """Messages around the ring both ways, several under way, arriving in order."""
    n, me = group.size, group.rank
    after, before = (me + 1) % n, (me - 1) % n
    sends = [group.send(torch.full((5,), 10 * me + i).to(dtype), after) for i in range(3)]
    sends += [group.send(torch.full((2,), 10 * me + 7).to(dtype), before)]
    up = [torch.empty(5, dtype=dtype) for _ in range(3)]
    down = torch.empty(2, dtype=dtype)
    receives = [group.recv(x, before) for x in up] + [group.recv(down, after)]
    for handle in reversed(receives):
        handle.wait()
    for handle in sends:
        handle.wait()
        assert handle.done()
        handle.wait()  # a second wait is harmless
    assert [x.tolist() for x in up] == [[10 * before + i] * 5 for i in range(3)]
    assert down.tolist() == [10 * after + 7] * 2


def check_overlap(group: Group) -> None:
    """Several operations under way, waited for in another order, messages between them."""
    n, me = group.size, group.rank
    a, b = torch.full((4 * n,), 1.0 + me), torch.full((3,), 1.0 + me)
    scattered, gathered, message = torch.empty(4), torch.empty(3 * n), torch.empty(2)
    first = group.reduce_scatter(scattered, a)
    second = group.all_gather(gathered, b)
    send = group.send(torch.full((2,), float(me)), (me + 1) % n)
    big = torch.full((300_000,), 1.0 + me)
    third = group.all_reduce(big)
    receive = group.recv(message, (me - 1) % n)
    for handle in (third, receive, second, send, first):
        handle.wait()
    total = n * (n + 1) / 2
    assert scattered.tolist() == [total] * 4
    assert gathered.tolist() == [1.0 + r for r in range(n) for _ in range(3)]
    assert message.tolist() == [float((me - 1) % n)] * 2
    assert big.unique().tolist() == [total]


def check_values(group: Group) -> None:
    """Barrier and JSON values of different lengths."""
    group.barrier()
    own = {"rank": group.rank, "text": "ä" * group.rank * 3, "list": [None, 1.5]}
    want = [{"rank": r, "text": "ä" * r * 3, "list": [None, 1.5]} for r in range(group.size)]
    assert group.gather_values(own) == want


def everything(group: Group) -> bool:
    """All of the above on one group."""
    for dtype in DTYPES:
        for rows in (1, 3):
            check_all(group, dtype, rows)
        check_messages(group, dtype)
    check_overlap(group)
    check_values(group)
    return True


def in_processes(world: World, gloo: bool) -> bool:
    """Over gloo, or, what is small, through shared memory."""
    assert isinstance(world.group, SharedMemory) is not gloo
    return everything(world.group)


def large(world: World) -> list[float]:
    """Sizes above and below the one where the algorithm changes; sums of random numbers in rank order."""
    group, errors = world.group, []
    for count in (1000, 250_000, 2_000_000):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            parts = [
                torch.randn(count, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(group.size)
            ]
            want = torch.stack([part.double() for part in parts]).sum(0)
            x = parts[group.rank].clone()
            group.all_reduce(x).wait()
            share = count // group.size
            output = torch.empty(share, dtype=dtype)
            group.reduce_scatter(output, parts[group.rank][: share * group.size].clone()).wait()
            own = slice(group.rank * share, (group.rank + 1) * share)
            errors.append(float((x.double() - want).abs().max() / torch.finfo(dtype).eps))
            errors.append(float((output.double() - want[own]).abs().max() / torch.finfo(dtype).eps))
            same = torch.empty(group.size * count, dtype=dtype)
            group.all_gather(same, x).wait()
            assert all(torch.equal(row, x) for row in same.view(group.size, -1)), "ranks hold different sums"
            swapped = torch.empty(group.size * share, dtype=dtype)
            group.all_to_all(swapped, parts[group.rank][: share * group.size].clone()).wait()
            assert torch.equal(swapped, torch.cat([part[own] for part in parts])), "pieces went astray"
    return errors


def reduce_scatter_bits(world: World, count: int, late: bool) -> bytes:
    """The bits of a sum whose result depends on the order of the additions; `late`: waited for in reverse."""
    group = world.group
    outputs = [torch.empty(count) for _ in range(4)]
    generator = torch.Generator().manual_seed(group.rank)
    fulls = [torch.randn(count * group.size, generator=generator) * 10.0 ** (group.rank * 3 % 5) for _ in outputs]
    handles = []
    for output, full in zip(outputs, fulls, strict=True):
        handles.append(group.reduce_scatter(output, full))
        if not late:
            handles[-1].wait()
    for handle in reversed(handles):
        handle.wait()
    return torch.stack(outputs).numpy().tobytes()


def grid(world: World, axes: dict[str, Any], num_kv_heads: int) -> dict[str, Any]:
    """The groups of a topology: their ranks, and the sum of the global ranks over each."""
    groups = world.groups(Topology(**axes), num_kv_heads)
    found: dict[str, Any] = {"coords": groups.coords}
    for name in ("tp", "cp", "dp_cp", "pp", "embedding", "kv", "world"):
        group = getattr(groups, name)
        assert group.name == ("dp" if name == "dp_cp" and groups.cp.size == 1 else name)
        x = torch.tensor([float(world.rank)])
        group.all_reduce(x).wait()
        found[name] = [list(group.ranks), group.rank, x.item()]
    return found


def recorded(world: World) -> list[tuple[Any, ...]]:
    """What Recording writes down around real operations."""
    group = Recording(world.group)
    n, me = group.size, group.rank
    group.all_gather(torch.empty(2 * n, 3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16)).wait()
    group.reduce_scatter(torch.empty(2), torch.ones(2 * n)).wait()
    group.all_reduce(torch.ones(3, dtype=torch.float64), "max").wait()
    handles = [group.send(torch.ones(4), (me + 1) % n), group.recv(torch.empty(4), (me - 1) % n)]
    for handle in handles:
        handle.wait()
    group.all_to_all(torch.empty(n, 3), torch.ones(n, 3)).wait()
    group.barrier()
    assert group.gather_values(me) == list(range(n))
    return [(c.op, c.group, c.shape, str(c.dtype), c.nbytes, c.peer) for c in group.calls]


def identity(world: World) -> dict[str, Any]:
    return {"rank": world.rank, "size": world.world_size, "device": world.device.type, "pid": os.getpid()}


def fail_on(world: World, bad: int) -> None:
    if world.rank == bad:
        raise ValueError("this rank is bad")
    world.group.barrier()


def die_on(world: World, bad: int) -> None:
    if world.rank == bad:
        os._exit(9)
    world.group.barrier()


def echo_tensor(world: World, tensor: Tensor) -> Tensor:
    return tensor + world.rank


def waits_for_nobody(world: World) -> str:
    """Rank 0: a send that nobody receives is not done. Rank 1: a collective that nobody joins fails in time."""
    if world.rank == 0:
        handle = world.group.send(torch.ones(4_000_000), 1)
        time.sleep(0.5)
        early = handle.done()
        time.sleep(3.5)
        try:
            handle.done()
        except RuntimeError as error:
            return f"done: {early}, then {error.__notes__}"
    try:
        world.group.all_reduce(torch.ones(1)).wait()
    except RuntimeError as error:
        return str(error.__notes__)
    return "joined by somebody"


def arrives_before_wait(world: World) -> bool:
    """A send is done once it has been received, without anybody waiting for it."""
    if world.rank == 1:
        world.group.recv(torch.empty(4_000_000), 0).wait()
        world.group.barrier()
        return True
    handle = world.group.send(torch.ones(4_000_000), 1)
    world.group.barrier()
    deadline = time.monotonic() + 10
    while not handle.done() and time.monotonic() < deadline:
        time.sleep(0.01)
    return handle.done()


def first_failure(world: World, bad: int) -> str | None:
    """One rank reports and leaves; what the others then learn when their collective breaks."""
    world.group.barrier()
    if world.rank == bad:
        return (world.failed(ValueError("disk full")) or [None])[0]
    try:
        world.group.barrier()
    except RuntimeError as error:
        return (world.failed(error) or [None])[0]
    return "the barrier held"


def open_files(world: World, axes: dict[str, Any]) -> tuple[int, int]:
    """Files that this rank has opened for the groups of a topology, the one of all ranks and the star; as counted."""
    topology = Topology(**axes)
    groups = world.groups(topology, num_kv_heads=4)
    for name in ("tp", "dp_cp", "pp", "embedding"):
        getattr(groups, name).barrier()
    found = len(os.listdir("/proc/self/fd"))
    world.close()
    before = len(os.listdir("/proc/self/fd"))
    sizes = [len(ranks) for part in partitions(topology, 4).values() for ranks in part if world.rank in ranks]
    need = files_needed(world.launch, sizes, 0, cuda=False, shared=True)
    return found - before, sum(need[name] for name in ("gloo", "shared memory", "connections with rank 0"))


def takes_turns(world: World) -> tuple[bool, bool]:
    """Whether ranks share cores, and whether their own work is CPU time then."""
    return world.oversubscribed, world.record.clock is time.thread_time_ns


def bound(world: World) -> tuple[list[float], float]:
    """The time-outs of all groups of a rank and of the checkpoint group, once steps are bound to 7 s."""
    world.groups(Topology(tp=2), num_kv_heads=1)
    checkpoint: Any = world.host_group("checkpoint")
    world.bound(7.0)
    return [group._seconds for group in world.opened], checkpoint._seconds  # type: ignore[attr-defined]
