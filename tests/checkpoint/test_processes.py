"""The same over gloo processes: saves behind the back of training's own communication."""

from __future__ import annotations

from pathlib import Path

from tests.pool import Pool


def test_saves_run_beside_training_and_load_in_another_layout(pool: Pool, tmp_path: Path) -> None:
    found = pool.run(4, "tests.checkpoint.workers:save_while_training", str(tmp_path), 3)
    assert [f["total"] for f in found] == [50.0 * sum(6 + 4 * step for step in (1, 2, 3))] * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003"]
    assert pool.run(3, "tests.checkpoint.workers:resume", str(tmp_path), 3) == [{"step": 3}] * 3
