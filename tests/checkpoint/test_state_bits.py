"""A bit of masters or moments that flips between the beginning of a save and its writing: nothing of it is saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.checkpoint import manager as manager_module
from megallama.checkpoint.disk import CheckpointError
from megallama.checkpoint.manifest import STATE
from megallama.config.schema import ModelConfig
from megallama.layers.param import Shard
from megallama.plan.topology import Topology
from tests.checkpoint.states import boxes, make_config, make_manager, make_state, take

SMALL = ModelConfig(hidden_size=8, num_layers=1, num_heads=2, ffn_hidden_size=12, vocab_size=24)
OWN = make_state(SMALL)


def shards() -> list[Shard]:
    return take(OWN, boxes(SMALL, Topology(), 1, 0, owned=True))


@pytest.mark.parametrize("behind", [False, True], ids=["at once", "behind training"])
@pytest.mark.parametrize("kind", STATE)
def test_a_flipped_bit_is_not_saved(tmp_path: Path, monkeypatch: Any, kind: str, behind: bool) -> None:
    """Bits of the fraction and the sign: one of the exponent may make it infinite, which is refused anyway."""
    write, victim = manager_module.write_checkpoint, 1

    def flipped(bit: int, *rest: Any) -> None:
        state = next(part for part in rest if isinstance(part, list) and isinstance(part[0], Shard))[victim].state
        state[kind].view(torch.int32)[3] ^= 1 << bit if bit < 31 else -(1 << 31)
        write(*rest)

    manager = make_manager(tmp_path, make_config(SMALL, async_save=behind, max_failures=0))
    manager.save(1, shards(), {})
    manager.finish()
    key = shards()[victim].box.key
    for bit in (0, 11, 22, 31):
        with monkeypatch.context() as patch:
            patch.setattr(manager_module, "write_checkpoint", partial(flipped, bit))
            with pytest.raises(CheckpointError, match=f"{key} from .*, has other bits than when the save began"):
                manager.save(2, shards(), {})
                manager.finish()
        assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000001"]
    manager.save(2, shards(), {})  # and without one it is
    manager.finish()
    assert (tmp_path / "step-00000002" / "manifest.json").exists()
