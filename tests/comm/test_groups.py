"""Which ranks form which group, for several topologies."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from megallama.comm.group import Groups, Solo, build_groups, partitions
from megallama.plan.topology import Topology
from tests.pool import Pool
from tests.threads import run_threads

NAMES = ("world", "tp", "dp", "pp", "embedding", "kv")
WITH_CP = ("world", "tp", "cp", "dp_cp", "pp", "embedding", "kv")


def test_tp2_pp2_dp2() -> None:
    assert partitions(Topology(tp=2, pp=2, dp=2), num_kv_heads=8) == {
        "world": [(0, 1, 2, 3, 4, 5, 6, 7)],
        "tp": [(0, 1), (2, 3), (4, 5), (6, 7)],
        "dp": [(0, 2), (1, 3), (4, 6), (5, 7)],
        "pp": [(0, 4), (1, 5), (2, 6), (3, 7)],
        "embedding": [(0, 4), (1, 5), (2, 6), (3, 7)],
        "kv": [(r,) for r in range(8)],
    }


def test_embedding_group_is_first_and_last_stage() -> None:
    parts = partitions(Topology(pp=4), num_kv_heads=1)
    assert parts["embedding"] == [(0, 3), (1,), (2,)]
    assert partitions(Topology(dp=2), num_kv_heads=1)["embedding"] == [(0,), (1,)]


def test_embedding_group_follows_the_stages() -> None:
    """In a V both copies are on the first rank of a pipeline; elsewhere they may be on any two."""
    v = Topology(pp=3, dp=2, ends=(0, 0))
    assert partitions(v, num_kv_heads=1)["embedding"] == [(0,), (1,), (2,), (4,), (3,), (5,)]
    assert partitions(Topology(pp=4, ends=(2, 1)), num_kv_heads=1)["embedding"] == [(1, 2), (0,), (3,)]
    assert Topology(pp=4) == Topology(pp=4, ends=(0, 3)) != Topology(pp=4, ends=(0, 0))


def test_one_rank_by_itself() -> None:
    """It is rank 0 unless said otherwise, and what it starts has finished."""
    alone, out = Solo(), torch.zeros(2)
    assert (alone.name, alone.rank, alone.size, alone.ranks) == ("solo", 0, 1, (0,))
    assert Solo("tp", 5).ranks == (5,) and Solo("tp", 5).rank == 0
    for start in (alone.all_gather, alone.reduce_scatter, alone.all_to_all):
        out.zero_()
        handle = start(out, torch.tensor([3.0, 4.0]))
        assert handle.done() is True and handle.wait() is None and out.tolist() == [3.0, 4.0]
    assert alone.all_reduce(out).done() is True and out.tolist() == [3.0, 4.0]


def test_kv_groups_are_ranks_with_the_same_head() -> None:
    assert partitions(Topology(tp=8), num_kv_heads=2)["kv"] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert partitions(Topology(tp=4), num_kv_heads=1)["kv"] == [(0, 1, 2, 3)]
    assert partitions(Topology(tp=4), num_kv_heads=4)["kv"] == [(0,), (1,), (2,), (3,)]


@pytest.mark.parametrize(
    "topology",
    [
        Topology(),
        Topology(tp=4, pp=3, dp=2),
        Topology(tp=2, pp=4, dp=3, order="pp-tp-dp-cp"),
        Topology(tp=8, pp=16, dp=16),
        Topology(tp=2, cp=4, pp=2, dp=3),
        Topology(tp=2, cp=2, pp=2, dp=3, order="dp-pp-cp-tp"),
    ],
    ids=str,
)
def test_every_name_is_a_partition_and_every_rank_is_told_its_own(topology: Topology) -> None:
    requested: list[list[str]] = []
    for rank in range(topology.world_size):
        names: list[str] = []

        def make(name: str, partition: Sequence[tuple[int, ...]], names: list[str] = names, rank: int = rank) -> Solo:
            names.append(name)
            assert sorted(r for ranks in partition for r in ranks) == list(range(topology.world_size))
            return Solo(name, rank)

        groups = build_groups(topology, rank, 2, make)
        assert groups.rank == rank and groups.coords == topology.coords(rank)
        at = topology.coords(rank)
        assert groups.dp == (at["dp"], topology.dp) and groups.cp.name == "cp"
        assert groups.dp_cp.name == ("dp_cp" if topology.cp > 1 else "dp")
        requested.append(names)
        if rank > 8:
            break
    assert all(names == list(NAMES if topology.cp == 1 else WITH_CP) for names in requested)


def test_gradients_are_reduced_over_dp_and_cp_in_any_order_of_ranks() -> None:
    near = partitions(Topology(tp=2, cp=2, dp=2, pp=2), num_kv_heads=8)
    assert near["cp"][:3] == [(0, 2), (1, 3), (4, 6)] and near["dp_cp"][:3] == [
        (0, 2, 4, 6),
        (1, 3, 5, 7),
        (8, 10, 12, 14),
    ]
    far = partitions(Topology(tp=2, cp=2, dp=2, pp=2, order="dp-pp-cp-tp"), num_kv_heads=8)
    assert far["cp"][:2] == [(0, 4), (1, 5)] and far["dp_cp"][:3] == [(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13)]
    assert far["tp"][:2] == [(0, 8), (1, 9)]


def in_threads(topology: Topology, num_kv_heads: int) -> list[dict[str, object]]:
    def body(groups: Groups) -> dict[str, object]:
        found: dict[str, object] = {"coords": groups.coords}
        for name in WITH_CP:
            group, x = getattr(groups, name), torch.tensor([float(groups.rank)])
            group.all_reduce(x).wait()
            found[name] = [list(group.ranks), group.rank, x.item()]
        return found

    return run_threads(topology.world_size, body, topology, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize(
    ("axes", "kv"),
    [
        ({"tp": 2, "dp": 2}, 1),
        ({"pp": 4}, 4),
        ({"tp": 2, "pp": 2, "order": "pp-tp-dp-cp"}, 2),
        ({"dp": 3}, 1),
        ({"cp": 2, "dp": 2, "order": "dp-tp-cp-pp"}, 1),
    ],
    ids=str,
)
def test_gloo_groups_equal_thread_groups(pool: Pool, axes: dict[str, int], kv: int) -> None:
    topology = Topology(**axes)  # type: ignore[arg-type]
    found = pool.run(topology.world_size, "tests.comm.operations:grid", axes, kv)
    assert found == in_threads(topology, kv)
    for rank, groups in enumerate(found):
        tp, dp_cp = (next(g for g in topology.groups(*axes) if rank in g) for axes in (("tp",), ("dp", "cp")))
        assert groups["tp"][0] == list(tp) and groups["dp_cp"][2] == sum(dp_cp)
