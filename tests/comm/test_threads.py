"""The thread group is the instrument of many tests: here it shows that it notices mistakes."""

from __future__ import annotations

import pytest
import torch

from megallama.comm.group import Group, Solo
from megallama.comm.groups import Groups
from megallama.plan.topology import Topology
from tests.threads import ThreadGroup, run_threads


def test_nothing_can_be_read_before_wait() -> None:
    def body(group: Group) -> list[bool]:
        x, number, out = torch.ones(2), torch.ones(2, dtype=torch.int64), torch.zeros(4)
        handles = [group.all_reduce(x), group.all_reduce(number), group.all_gather(out, torch.ones(2))]
        hidden = [bool(x.isnan().all()), bool((number > 1e9).all()), bool(out.isnan().all())]
        for handle in handles:
            handle.wait()
        assert x.tolist() == number.tolist() == [2, 2] and out.tolist() == [1] * 4
        return hidden

    assert run_threads(2, body) == [[True] * 3] * 2


def test_input_changed_under_way_is_an_error() -> None:
    def send(group: Group) -> None:
        x = torch.ones(2)
        if group.rank == 0:
            handle = group.send(x, 1)
            x.zero_()
            handle.wait()
        else:
            group.recv(x, 0).wait()

    def gather(group: Group) -> None:
        shard = torch.ones(2)
        handle = group.all_gather(torch.empty(4), shard)
        shard.zero_()
        handle.wait()

    with pytest.raises(AssertionError, match="sent tensor was changed before wait"):
        run_threads(2, send)
    with pytest.raises(AssertionError, match="shard was changed before wait"):
        run_threads(2, gather)


def test_different_calls_are_named() -> None:
    def shapes(group: Group) -> None:
        group.all_reduce(torch.ones(2 + group.rank)).wait()

    def operations(group: Group) -> None:
        if group.rank:
            group.barrier()
        else:
            group.all_reduce(torch.ones(2)).wait()

    def messages(group: Group) -> None:
        x = torch.ones(2, dtype=(torch.float32, torch.float64)[group.rank])
        (group.recv(x, 0) if group.rank else group.send(x, 1)).wait()

    with pytest.raises(RuntimeError, match=r"rank . calls all_reduce sum \(.,\) float32 .* where rank . calls all_re"):
        run_threads(2, shapes)
    with pytest.raises(RuntimeError, match="barrier"):
        run_threads(2, operations)
    with pytest.raises(RuntimeError, match="message 0 from 0 to 1 in world .* float64"):
        run_threads(2, messages)


def test_missing_ranks_are_named_instead_of_hanging() -> None:
    def body(group: Group) -> None:
        if group.rank != 1:
            group.barrier()

    with pytest.raises(TimeoutError, match=r"rank . waited 0.2 s in barrier .*: ranks \[1\] never called it"):
        run_threads(3, body, timeout=0.2)


def test_first_exception_is_raised_and_stops_the_others() -> None:
    def body(group: Group) -> None:
        if group.rank == 2:
            raise ValueError("mine")
        group.barrier()

    with pytest.raises(ValueError, match="mine") as caught:
        run_threads(4, body)
    assert caught.value.__notes__ == ["(in thread rank 2 of 4)"]


def test_send_completes_only_when_asked_for() -> None:
    def body(group: Group) -> list[bool]:
        x = torch.ones(1)
        if group.rank == 1:
            group.barrier()
            group.recv(x, 0).wait()
            group.barrier()
            return []
        handle = group.send(x, 1)
        before = handle.done()
        group.barrier()
        group.barrier()
        return [before, handle.done()]

    assert run_threads(2, body) == [[False, True], []]


def test_split_and_grid() -> None:
    def split(group: ThreadGroup) -> tuple[tuple[int, ...], float, str]:
        mine = group.split([(0, 2), (1,), (3,)], "pairs")
        x = torch.tensor([float(group.rank)])
        mine.all_reduce(x).wait()
        return mine.ranks, x.item(), type(mine).__name__

    assert run_threads(4, split) == [
        ((0, 2), 2.0, "ThreadGroup"),
        ((1,), 1.0, "Solo"),
        ((0, 2), 2.0, "ThreadGroup"),
        ((3,), 3.0, "Solo"),
    ]

    def grid(groups: Groups) -> tuple[float, float]:
        x, y = torch.tensor([float(groups.rank)]), torch.tensor([float(groups.rank)])
        groups.tp.all_reduce(x).wait()
        groups.pp.all_reduce(y).wait()
        return x.item(), y.item()

    assert run_threads(4, grid, Topology(tp=2, pp=2)) == [(1, 2), (1, 4), (5, 2), (5, 4)]
    (alone,) = run_threads(1, lambda groups: groups, Topology())
    assert isinstance(alone.tp, Solo) and isinstance(alone.world, Solo)
