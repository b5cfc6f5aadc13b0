"""Which ranks make whole replicas of a model where others are lost: arithmetic on rank numbers, for supervisors."""

from __future__ import annotations

from collections.abc import Set


def whole_replicas(size: int, stride: int, dp: int, there: Set[int]) -> list[list[int]]:
    """The ranks of each replica that is whole, of `size` ranks in which neighbours along dp are `stride` apart.

    The first one, of rank 0, is made whole with ranks of broken ones that stood at the same place, else of the last
    whole one: rank 0 is needed.
    """
    first = [rank for rank in range(size) if rank // stride % dp == 0]
    replicas = [[rank + d * stride for rank in first] for d in range(dp)]
    donors = sorted(replicas[:0:-1], key=lambda replica: there >= {*replica})
    for i, seat in enumerate(replicas[0]):
        if seat not in there and (donor := next((r for r in donors if r[i] in there), None)):
            replicas[0][i], donor[i] = donor[i], seat
    return [replica for replica in replicas if there >= {*replica}]


def ranks_in_order(replicas: list[list[int]], stride: int) -> list[int]:
    """The ranks of these replicas, in the order in which a world of them counts its ranks from 0 on."""
    rows = range(0, len(replicas[0]), stride)
    return [rank for row in rows for replica in replicas for rank in replica[row : row + stride]]
