"""Every group operation, in every implementation."""

from __future__ import annotations

import pytest
import torch

from megallama.analysis.recording import Call, Recording
from megallama.comm.group import Group, Solo
from tests.comm import operations
from tests.pool import Pool
from tests.threads import run_threads


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_threads(size: int) -> None:
    assert run_threads(size, operations.everything) == [True] * size


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("gloo", [True, False])
def test_processes(pool: Pool, size: int, gloo: bool) -> None:
    assert pool.run(size, "tests.comm.operations:in_processes", gloo, gloo=gloo) == [True] * size


@pytest.mark.parametrize("gloo", [True, False])
def test_large_sums_are_equal_on_all_ranks_and_accurate(pool: Pool, gloo: bool) -> None:
    for size in (2, 3):
        errors = pool.run(size, "tests.comm.operations:large", gloo=gloo)
        # size - 1 roundings of sums of at most `size` normal numbers (below 5.5 each)
        assert max(map(max, errors)) <= (size - 1) * 5.5 * size


def test_reduce_scatter_gives_the_same_bits_however_waited_for(pool: Pool) -> None:
    early, late, *shared = (
        pool.run(3, "tests.comm.operations:reduce_scatter_bits", 5000, late, gloo=gloo)
        for gloo in (True, False)
        for late in (False, True)
    )
    assert [early] * 3 == [late, *shared]
    assert len(set(early)) == 3

    def in_threads(group: Group) -> bytes:
        world = type("World", (), {"group": group})()
        return operations.reduce_scatter_bits(world, 5000, True)

    assert run_threads(3, in_threads) == early


def test_send_over_gloo_is_done_when_received(pool: Pool) -> None:
    assert pool.run(2, "tests.comm.operations:arrives_before_wait") == [True, True]


@pytest.mark.parametrize("gloo", [True, False])
def test_a_collective_that_nobody_joins_fails_within_the_timeout(pool: Pool, gloo: bool) -> None:
    sender, waiter = pool.run(2, "tests.comm.operations:waits_for_nobody", collective_timeout=2, gloo=gloo)
    assert sender == "done: False, then ['in send to 1 of group world (ranks (0, 1))']"
    assert waiter == "['in all_reduce of group world (ranks (0, 1))']"


def test_solo() -> None:
    group = Solo("tp", 5)
    assert (group.name, group.rank, group.size, group.ranks) == ("tp", 0, 1, (5,))
    for dtype in operations.DTYPES:
        operations.check_all(group, dtype, 3)
    operations.check_values(group)
    with pytest.raises(AssertionError, match="nobody to send to"):
        group.send(torch.ones(1), 0)
    with pytest.raises(AssertionError, match="nobody to receive from"):
        group.recv(torch.ones(1), 0)


def test_recording_writes_down_calls_in_order(pool: Pool) -> None:
    recorded = pool.run(3, "tests.comm.operations:recorded")
    for rank, calls in enumerate(recorded):
        assert calls == [
            ("all_gather", "world", (6, 3), "torch.bfloat16", 36, None),
            ("reduce_scatter", "world", (6,), "torch.float32", 24, None),
            ("all_reduce", "world", (3,), "torch.float64", 24, None),
            ("send", "world", (4,), "torch.float32", 16, (rank + 1) % 3),
            ("recv", "world", (4,), "torch.float32", 16, (rank - 1) % 3),
            ("all_to_all", "world", (3, 3), "torch.float32", 36, None),
            ("barrier", "world", (), "None", 0, None),
            ("gather_values", "world", (), "None", 0, None),
        ]


def test_recordings_may_share_a_list_and_pass_results_through() -> None:
    calls: list[Call] = []
    tp, dp = Recording(Solo("tp"), calls), Recording(Solo("dp"), calls)
    output = torch.zeros(2)
    dp.all_gather(output, torch.tensor([1.0, 2.0])).wait()
    tp.all_reduce(torch.ones(1)).wait()
    assert output.tolist() == [1.0, 2.0]
    assert [(call.op, call.group) for call in calls] == [("all_gather", "dp"), ("all_reduce", "tp")]
