"""Page-locked memory of checkpoints: torch takes it in powers of two, and a snapshot lies in several such pieces."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.checkpoint.manager import pieces
from megallama.config.presets import PRESETS
from megallama.config.schema import ModelConfig
from megallama.plan.params import global_shapes
from tests.checkpoint.states import assert_holds, empty_solo, make_config, make_manager, make_state, solo_shards


def sizes_of(preset: str, dp: int) -> list[int]:
    """Elements of each tensor of the optimizer's state on one of `dp` ranks."""
    model = ModelConfig(preset=preset, **PRESETS[preset])
    return [torch.Size(shape).numel() // dp for shape in global_shapes(model).values()] * 3


@pytest.mark.parametrize(
    ("preset", "dp"), [("llama-7b", 1), ("llama-7b", 8), ("llama-65b", 64), ("llama3-8b", 1), ("llama3-70b", 512)]
)
def test_pieces_waste_little(preset: str, dp: int) -> None:
    sizes = sizes_of(preset, dp)
    found = list(pieces(sizes))
    assert sum(count for _, count in found) == len(sizes)
    ends, first = [0, *accumulate(sizes)], 0
    for room, count in found:
        assert room.bit_count() == 1 and count and ends[first + count] - ends[first] <= room
        first += count
    taken, need = sum(room for room, _ in found), sum(sizes)
    one = 1 << (need - 1).bit_length()  # what torch would take for one piece
    assert taken <= 1.1 * need and taken <= one
    assert (preset, dp) != ("llama-7b", 1) or (taken * 4 < 84 << 30 and one * 4 == 128 << 30)


@pytest.mark.parametrize("sizes", [[1], [5], [8], [1, 1, 1], [7, 9, 100], [100, 1, 1, 1], list(range(1, 60)), [3] * 64])
def test_any_sizes_fit(sizes: list[int]) -> None:
    found, first = list(pieces(sizes)), 0
    for room, count in found:
        assert room.bit_count() == 1 and 0 < sum(sizes[first : first + count]) <= room
        first += count
    assert first == len(sizes) and sum(room for room, _ in found) < 2 * sum(sizes)
    assert list(pieces([])) == []


def test_a_snapshot_in_pieces_is_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, taken = make_state(), list[torch.Tensor]()
    shards = solo_shards(state)
    empty = torch.empty

    def pinned(*size: Any, pin_memory: bool = False, **named: Any) -> torch.Tensor:
        made = empty(*size, **named)
        return taken.append(made) or made if pin_memory else made

    manager = make_manager(tmp_path, make_config(async_save=True))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", pinned)
        patched.setattr(torch.Tensor, "is_cuda", True)
        patched.setattr(torch.cuda, "current_stream", lambda device: torch.cuda.Stream)
        patched.setattr(torch.cuda.Stream, "synchronize", lambda: None)
        manager.prepare(shards)
        assert len(taken) > 1 and {t.numel().bit_count() for t in taken} == {1}
        copies = manager._snapshot(shards)
        assert_holds(copies, state)
        places = {t.untyped_storage().data_ptr() for shard in copies for t in shard.state.values()}
        assert places == {t.untyped_storage().data_ptr() for t in taken}
    for shard in shards:
        for tensor in shard.state.values():
            tensor.zero_()
    assert_holds(copies, state)
    manager._write(1, copies, {})
    loaded = empty_solo()
    make_manager(tmp_path, make_config()).load(tmp_path / "step-00000001", loaded)
    assert_holds(loaded, state)
