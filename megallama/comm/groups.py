"""The groups of one rank, made from the topology: every rank creates all groups in one order.

A group exists on every rank that is in it; where an axis has size 1 its group is a `Solo`.  Which
ranks form a group is a pure function of the topology, so the same code makes process groups in a
run, thread groups in the tests and recording groups in a dry run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megallama.comm.group import Group
from megallama.plan.topology import Topology

Partition = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Groups:
    """Everything a rank can talk to."""

    tp: Group  # tensor parallel: the same layers, other slices of them
    dp: Group  # data parallel: the same slices, other samples: who reads which
    pp: Group  # pipeline: the same samples and slices, other layers
    embedding: Group  # the ranks of the first and the last stage: they hold the two copies of a tied embedding
    kv: Group  # tensor-parallel ranks with copies of the same key/value heads (tp > num_kv_heads)
    world: Group
    rank: int
    coords: dict[str, int]

    @property
    def dp_cp(self) -> Group:
        """The ranks with the same weights: over them gradients are reduced and state is sharded."""
        return self.dp


def partitions(topology: Topology, num_kv_heads: int) -> dict[str, list[tuple[int, ...]]]:
    """Name -> all groups of that name, in creation order; each a partition of the ranks.

    tp > num_kv_heads gives tp / num_kv_heads neighbouring tp ranks the same key/value head: one kv group.
    """
    tp_groups = topology.groups("tp")
    copies = max(1, topology.tp // num_kv_heads) if num_kv_heads else 1
    first_last, middle = [], []
    for ranks in topology.groups("pp"):
        ends = sorted({ranks[end] for end in topology.ends})
        first_last.append(tuple(ends))
        middle += [(rank,) for rank in ranks if rank not in ends]
    return {
        "world": [tuple(range(topology.world_size))],
        "tp": tp_groups,
        "dp": topology.groups("dp"),
        "pp": topology.groups("pp"),
        "embedding": first_last + middle,
        "kv": [ranks[i : i + copies] for ranks in tp_groups for i in range(0, len(ranks), copies)],
    }


def build_groups(topology: Topology, rank: int, num_kv_heads: int, make: Callable[[str, Partition], Group]) -> Groups:
    """Rank's groups. make(name, partition) creates all groups of a partition and returns rank's own.

    make is called in the same order with the same arguments on every rank; it must return a `Solo`
    for a group of one.
    """
    groups = {name: make(name, parts) for name, parts in partitions(topology, num_kv_heads).items()}
    return Groups(**groups, rank=rank, coords=topology.coords(rank))
