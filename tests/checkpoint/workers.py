"""What the processes of test_processes.py do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megallama.plan.topology import Topology
from tests.checkpoint.states import MODEL, assert_holds, boxes, empty, make_config, make_manager, make_state, take


def save_while_training(world: Any, folder: str, steps: int) -> dict[str, Any]:
    """Asynchronous saves beside all-reduces of another group; the last sum."""
    grid = Topology.fill(world.world_size, tp=2)
    training, group = world.group, world.host_group("checkpoint")
    manager = make_manager(Path(folder), make_config(async_save=True, keep_last=1), group)
    manager.acquire()
    found = boxes(MODEL, grid, 1, world.rank, owned=True)
    total = torch.zeros(1)
    for step in range(1, steps + 1):
        manager.save(step, take(make_state(seed=step), found), {"step": step})
        for _ in range(50):
            value = torch.full((1,), float(world.rank + step))
            training.all_reduce(value).wait()
            total += value
    manager.finish()
    manager.release()
    return {"total": total.item()}


def resume(world: Any, folder: str, step: int) -> dict[str, Any]:
    """Load under another layout; the counters."""
    group = world.host_group("checkpoint")
    shards = empty(boxes(MODEL, Topology.fill(world.world_size, pp=world.world_size), 1, world.rank, owned=False))
    counters = make_manager(Path(folder), make_config(), group).resume(shards)
    assert_holds(shards, make_state(seed=step))
    assert counters is not None
    return counters
