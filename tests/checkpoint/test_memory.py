"""Copies of the state in memory: which is taken, and that a flipped bit is never."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megallama.checkpoint.manifest import STATE
from megallama.checkpoint.memory import _HEAD, MemoryCopies
from megallama.comm.group import Solo
from megallama.layers.param import Shard
from megallama.plan.box import Box
from tests.threads import run_threads


def files() -> list[int]:
    return [os.memfd_create("copy") for _ in range(2)]


def shards(seed: int, sizes: Sequence[int] = (40, 7, 1000), dtype: torch.dtype = torch.float32) -> list[Shard]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for number, size in enumerate(sizes):
        state = {kind: torch.randn(size, generator=draw, dtype=dtype) for kind in STATE}
        found.append(Shard(Box(f"w{number}", (0, 0), (1, size)), state))
    return found


def bits(found: Sequence[Shard]) -> list[list[float]]:
    return [shard.state[kind].tolist() for shard in found for kind in STATE]


def resume(own: MemoryCopies, above: int = 0) -> tuple[dict[str, Any] | None, list[str]]:
    said: list[str] = []
    return own.resume(Solo(), above, said.append), said


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_process_goes_on_from_the_newest(dtype: torch.dtype) -> None:
    kept, state = files(), shards(1, dtype=dtype)
    copies = MemoryCopies(kept, state, "a", pinned=False)
    assert resume(copies) == (None, [])
    for step in (5, 6, 7):
        for shard in state:
            for tensor in shard.state.values():
                tensor += step
        copies.keep(step, {"step": step, "samples": 16 * step})
    want, other = bits(state), shards(2, dtype=dtype)
    again = MemoryCopies(kept, other, "a", pinned=False)
    assert resume(again) == ({"step": 7, "samples": 112}, [])
    assert bits(other) == want
    assert resume(again, above=7) == (None, [])  # a save on disk is as new
    sizes = [-(-t.nbytes // 64) * 64 for shard in state for t in shard.state.values()]
    assert MemoryCopies.need(state) == 2 * (_HEAD + sum(sizes))


def test_a_copy_of_another_run_is_none() -> None:
    kept = files()
    MemoryCopies(kept, shards(1), "a", pinned=False).keep(3, {})
    assert resume(MemoryCopies(kept, shards(1), "b", pinned=False)) == (None, [])
    assert resume(MemoryCopies(kept, shards(1, (40, 7)), "a", pinned=False)) == (None, [])


def test_a_copy_that_was_not_finished_is_none_and_the_older_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, state = files(), shards(1)
    copies = MemoryCopies(kept, state, "a", pinned=False)
    copies.keep(1, {"step": 1})
    want = bits(state)
    for shard in state:
        shard.state["master"] += 1

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megallama.checkpoint.memory.digest", killed)
    with pytest.raises(KeyboardInterrupt):
        copies.keep(2, {"step": 2})
    monkeypatch.undo()
    other = shards(3)
    assert resume(MemoryCopies(kept, other, "a", pinned=False)) == ({"step": 1}, [])
    assert bits(other) == want


def test_of_a_thousand_flipped_bits_none_is_accepted() -> None:
    kept, state, draw = files(), shards(1, (40, 7, 500)), random.Random(7)
    copies = MemoryCopies(kept, state, "a", pinned=False)
    copies.keep(1, {"step": 1})
    copies.keep(2, {"step": 2})
    ends = [0]
    for shard in state:
        for kind in STATE:
            ends.append(ends[-1] + -(-shard.state[kind].nbytes // 64) * 64)
    spans = [(start, shard.state[kind].nbytes) for start, (shard, kind) in zip(
        ends, ((shard, kind) for shard in state for kind in STATE), strict=False)]  # fmt: skip
    newest = max(range(2), key=lambda slot: copies._said(copies._memories[slot])["step"])
    for _ in range(1000):
        start, size = draw.choice(spans)
        at, bit = _HEAD + start + draw.randrange(size), 1 << draw.randrange(8)
        copies._memories[newest][at] ^= bit
        counters, said = resume(copies)
        assert counters == {"step": 1} and len(said) == 1
        assert said[0] == "warning: the copy of step 2 in memory is damaged (1 tensors)"
        copies._memories[newest][at] ^= bit
    assert resume(copies) == ({"step": 2}, [])


def test_a_damaged_head_is_no_copy() -> None:
    kept = files()
    copies = MemoryCopies(kept, shards(1), "a", pinned=False)
    copies.keep(1, {"step": 1})
    for text in (b"\xff" * 8, (30).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]"):
        copies._memories[0][: len(text)] = text
        assert resume(copies) == (None, [])


def test_ranks_take_the_newest_step_that_all_have() -> None:
    """Rank 1 ended before its copy of step 3; of rank 2 the one of step 2 is damaged."""

    def rank(group: Any) -> tuple[Any, int]:
        number, kept, state = group.rank, files(), shards(group.rank)
        copies = MemoryCopies(kept, state, "a", pinned=False)
        for step in (1, 2) if number == 1 else (2, 3):
            copies.keep(step, {"step": step})
        if number == 2:
            slot = next(i for i in range(2) if copies._said(copies._memories[i])["step"] == 2)
            copies._memories[slot][_HEAD] ^= 1
        said: list[str] = []
        return copies.resume(group, 0, said.append), len(said)

    assert [found for found, _ in run_threads(2, rank)] == [{"step": 2}] * 2
    assert run_threads(3, rank) == [(None, 0), (None, 0), (None, 1)]


def test_memory_that_does_not_suffice_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        MemoryCopies(files(), shards(1), "a", pinned=False)
