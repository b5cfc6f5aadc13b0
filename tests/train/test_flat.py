"""A thousand steps hold no more than a hundred."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pool

SMALL: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 16},
    "batch": {"seq_length": 8, "micro_batch_size": 2, "global_batch_size": 4},
    "precision": {"dtype": "bf16"},
    "train": {"steps": 1000, "gc_interval": 100},
    "log": {"interval": 10, "tensorboard": False, "plot": False},
    "checkpoint": {"interval": 150},
    "data": {"prefetch": 0},  # what the thread of a loader has in hand differs from moment to moment
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_is_flat_over_a_thousand_steps(pool: Pool, tmp_path: Path, ranks: int) -> None:
    marks = pool.run(ranks, "tests.train.runs:live_memory", str(tmp_path), SMALL, [320, 540, 760, 999])
    for early, *later in marks:
        for seen in later:
            assert seen[:2] == early[:2]  # tensors and their bytes, to the last one
            assert abs(seen[3] - early[3]) <= 50, (early, seen)  # objects: a leak of one per step would be 220 and more
