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
        assert [getattr(groups, name).name for name in NAMES] == list(NAMES)
        requested.append(names)
        if rank > 8:
            break
    assert all(names == list(NAMES) for names in requested)


def in_threads(topology: Topology, num_kv_heads: int) -> list[dict[str, object]]:
    def body(groups: Groups) -> dict[str, object]:
        found: dict[str, object] = {"coords": groups.coords}
        for name in NAMES:
            group, x = getattr(groups, name), torch.tensor([float(groups.rank)])
            group.all_reduce(x).wait()
            found[name] = [list(group.ranks), group.rank, x.item()]
        return found

    return run_threads(topology.world_size, body, topology, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize(
    ("axes", "kv"),
    [({"tp": 2, "dp": 2}, 1), ({"pp": 4}, 4), ({"tp": 2, "pp": 2, "order": "pp-tp-dp-cp"}, 2), ({"dp": 3}, 1)],
    ids=str,
)
def test_gloo_groups_equal_thread_groups(pool: Pool, axes: dict[str, int], kv: int) -> None:
    topology = Topology(**axes)  # type: ignore[arg-type]
    found = pool.run(topology.world_size, "tests.comm.operations:grid", axes, kv)
    assert found == in_threads(topology, kv)
    for rank, groups in enumerate(found):
        own = {axis: next(g for g in topology.groups(axis) if rank in g) for axis in ("tp", "dp")}
        assert groups["tp"][0] == list(own["tp"]) and groups["dp"][2] == sum(own["dp"])
