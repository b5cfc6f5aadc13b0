"""The thread group is the instrument of many tests: here it shows that it notices mistakes."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from megallama.comm.group import Group, Groups, Solo
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
        own = group.split([(0, 2), (1,), (3,)], "pairs")
        x = torch.tensor([float(group.rank)])
        own.all_reduce(x).wait()
        return own.ranks, x.item(), type(own).__name__

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


def test_with_delays_some_inputs_are_read_late() -> None:
    """Writing to an input under way changes what others receive, or is an error; after wait() it does neither."""

    def careless(group: Group) -> float:
        x, out = torch.ones(2), torch.empty(4)
        handle = group.all_gather(out, x)
        x.fill_(5.0)
        handle.wait()
        return float(out.sum())

    def careful(group: Group) -> list[float]:
        x, out, message = torch.ones(2), torch.empty(4), torch.empty(2)
        group.all_gather(out, x).wait()
        x.fill_(5.0)
        group.barrier()
        send = group.send(x, 1 - group.rank)
        group.recv(message, 1 - group.rank).wait()
        while not send.done():
            pass
        x.fill_(7.0)
        return [float(out.sum()), float(message.sum())]

    outcomes = set()
    for seed in range(8):
        try:
            outcomes.add(tuple(run_threads(2, careless, delays=seed)))
        except AssertionError as error:
            assert "shard was changed before wait" in str(error)
            outcomes.add(("noticed",))
    assert (4.0, 4.0) not in outcomes and ("noticed",) in outcomes and (20.0, 20.0) in outcomes
    assert all(run_threads(2, careful, delays=seed) == [[4.0, 10.0]] * 2 for seed in range(8))


def test_with_delays_sums_in_place_are_right_for_every_seed() -> None:
    def body(group: Group) -> list[list[float]]:
        x, full = torch.full((2,), 1.0 + group.rank), torch.arange(6.0) + group.rank
        own = full[2 * group.rank : 2 * group.rank + 2]
        handles = group.all_reduce(x), group.reduce_scatter(own, full)
        for handle in reversed(handles):
            handle.wait()
        return [x.tolist(), own.tolist()]

    for seed in range(8):
        sums = [[6.0, 6.0], [6.0, 6.0], [6.0, 6.0]]
        assert run_threads(3, body, delays=seed) == [[s, [6 * r + 3.0, 6 * r + 6.0]] for r, s in enumerate(sums)]


def test_with_delays_a_handle_that_is_dropped_is_an_error() -> None:
    def body(group: Group) -> None:
        group.all_reduce(torch.ones(2))

    assert run_threads(2, body) == [None, None]
    with pytest.raises(AssertionError, match=r"dropped the handle of all_reduce sum \(2,\) float32 in world before wa"):
        run_threads(2, body, delays=1)


def test_who_waits_for_something_else_or_by_a_thread_of_its_own_holds_nobody_up() -> None:
    """Ranks take turns; rank 0 keeps its own until rank 1 has had one, and both have a thread that communicates."""
    had_one = threading.Event()

    def body(group: Group) -> list[float]:
        if group.rank:
            had_one.set()
        else:
            assert had_one.wait(10)
        x = torch.ones(2)
        helper = threading.Thread(target=lambda: group.all_reduce(x).wait())
        helper.start()
        helper.join()
        return x.tolist()

    began = time.monotonic()
    assert run_threads(2, body) == [[2.0, 2.0]] * 2
    assert time.monotonic() - began < 5
