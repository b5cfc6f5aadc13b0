"""A bit that changes in memory between the begin of a save and its writing is found: nothing is committed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.checkpoint import manager as manager_module
from megallama.checkpoint.disk import CheckpointError
from megallama.comm.group import Group
from megallama.layers.param import Shard
from megallama.plan.topology import Topology
from tests.checkpoint.states import MODEL, boxes, make_config, make_manager, make_state, on_grid, take

WRITE = manager_module.write_checkpoint


def save_with_a_flip(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, behind: bool, wrong: int) -> list[str]:
    """Save on two ranks, and once more; on rank `wrong` the last element of its last shard changes before the first
    is written. What rank 0 logs, and the errors."""
    log: list[str] = []
    flipped: list[str] = []

    def write(content: Any, shards: list[Shard], group: Group) -> None:
        shards = list(shards)
        if group.rank == wrong and not flipped:
            flipped.append(shards[-1].box.key)
            words = shards[-1].state[kind].view(torch.int32)
            words[-1] ^= 1 << 22
        WRITE(content, shards, group)

    def rank(group: Group) -> None:
        manager = make_manager(folder, make_config(async_save=True), group, log=log.append)
        shards = take(make_state(), boxes(MODEL, Topology(2), 1, group.rank, owned=True))
        for step in (1, 2):
            try:
                manager.save(step, shards, {}, behind=behind)
                manager.finish()
            except CheckpointError as error:
                if group.rank == 0:
                    log.append(f"error: {error}")
            shards = take(make_state(), [shard.box for shard in shards])

    monkeypatch.setattr(manager_module, "write_checkpoint", write)
    on_grid(Topology(2), rank)
    assert len(flipped) == 1
    return [*flipped, *log]


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize(("kind", "wrong"), [("master", 1), ("exp_avg_sq", 0)])
def test_a_changed_bit_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, wrong: int, behind: bool
) -> None:
    tensor, *lines = save_with_a_flip(tmp_path, monkeypatch, kind, behind, wrong)
    (error,) = [line for line in lines if line.startswith("error: ")]
    where = rf"rank {wrong} on \S+: {re.escape(tensor)} from \[\d+(, \d+)?\] on, for optimizer/{kind}-00"
    assert re.search(where, error) and "has other bits than when the save began" in error
    assert "step-00000001 failed" in error and any("saved " in line and "step-00000002" in line for line in lines)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000002"], "the next save is whole"


def test_what_is_made_shard_by_shard_is_saved_as_it_is(tmp_path: Path) -> None:
    """A converter uses the memory of one shard for the next: there is nothing to digest beforehand."""
    found, state = boxes(MODEL, Topology(1), 1, 0, owned=True), make_state()
    manager = make_manager(tmp_path, make_config())
    manager.save(1, (shard for box in found for shard in take(state, [box])), {})
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000001"]
