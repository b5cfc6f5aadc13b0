"""Keys at the ends of ranges belong to one range, and to the unit that comes first."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megallama.curate.duplicates import Files
from megallama.curate.stage import UnitKeys

EDGES = [1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 2, (1 << 64) - 1]


def test_every_key_is_in_one_range() -> None:
    stage, keys = Files(kind="files"), [np.array(EDGES[n:], np.uint64) for n in range(3)]
    units = [UnitKeys(Path(), mine, np.zeros(len(mine), np.uint32), np.zeros(1, np.int64)) for mine in keys]
    found = list[tuple[int, int]]()
    for part in range(4):
        ranges = stage.combine(units, *((part + i) * (1 << 64) // 4 for i in range(2)))
        found += [*zip(ranges.owners.tolist(), ranges.values.tolist(), strict=True)]
    assert sorted(found) == sorted([*((1, key) for key in EDGES[1:]), *((2, key) for key in EDGES[2:])])
