"""Copies of the state in memory: which is taken, from where, and that a flipped bit is never."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megallama.checkpoint.disk import HEAD, read_head
from megallama.checkpoint.manifest import STATE
from megallama.checkpoint.memory import MemoryCopies
from megallama.comm.group import Solo
from megallama.layers.param import Shard
from megallama.plan.box import Box
from megallama.train.setup import _from_memory
from tests.small import small_config
from tests.threads import run_threads


def shards(seed: int, sizes: Sequence[int] = (40, 7, 1000), dtype: torch.dtype = torch.float32) -> list[Shard]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for number, size in enumerate(sizes):
        state = {kind: torch.randn(size, generator=draw, dtype=dtype) for kind in STATE}
        found.append(Shard(Box(f"w{number}", (0, 0), (1, size)), state))
    return found


def made(state: Sequence[Shard], file: int = -1) -> MemoryCopies:
    return MemoryCopies(os.memfd_create("copies") if file < 0 else file, state, {"rank": 0}, pinned=False)


def bits(found: Sequence[Shard]) -> list[list[float]]:
    return [shard.state[kind].tolist() for shard in found for kind in STATE]


def whole(copies: MemoryCopies) -> dict[int, int]:
    """Slots by step, of what says that it is a copy."""
    heads = [read_head(slot) for slot in copies.slots]
    return {said["step"]: slot for slot, said in enumerate(heads) if said}


def alone(**question: Any) -> dict[str, Any]:
    return {"problem": "nobody else has it"}


def resume(own: MemoryCopies) -> tuple[dict[str, Any] | None, list[str]]:
    said: list[str] = []
    return own.resume(Solo(), whole(own), alone, said.append), said


class Far:
    """A buddy with the copies of `other`; it counts the bytes that it was asked for."""

    def __init__(self, copies: MemoryCopies, other: MemoryCopies) -> None:
        self.copies, self.other, self.asked = copies, other, list[int]()

    def __call__(self, do: str, step: int, slot: int, spans: Sequence[tuple[int, int]]) -> dict[str, Any]:
        theirs = self.other.slots[whole(self.other)[step]]
        for start, length in spans:
            self.copies.slots[slot][start : start + length] = theirs[start : start + length]
            self.asked.append(length)
        return {"problem": "", "from": "taken from rank 1"}

    def resume(self) -> tuple[dict[str, Any] | None, list[str]]:
        said: list[str] = []
        return self.copies.resume(Solo(), whole(self.copies), self, said.append), said


def two(state: Sequence[Shard], *steps: int) -> tuple[MemoryCopies, MemoryCopies]:
    """The copies of a rank, and the same again."""
    found = made(state), made(state)
    for copies in found:
        copies.begin("x")
        for step in steps:
            copies.keep(step, {"step": step})
    return found


def test_another_process_goes_on_from_the_newest() -> None:
    for dtype in (torch.float32, torch.float64):
        file, state = os.memfd_create("copies"), shards(1, dtype=dtype)
        copies = made(state, file)
        assert resume(copies) == (None, [])
        copies.begin("x")
        for step in (5, 6, 7):
            for shard in state:
                for tensor in shard.state.values():
                    tensor += step
            copies.keep(step, {"step": step, "samples": 16 * step}, [None, step])
        want, other = bits(state), shards(2, dtype=dtype)
        again = made(other, file)
        said = read_head(again.slots[whole(again)[7]])
        assert (said["key"], said["chain"], said["after"]) == ({"rank": 0}, "x", [None, 7])
        assert whole(again) == {7: 0, 6: 1}
        assert resume(again) == ({"step": 7, "samples": 112}, [])
        assert bits(other) == want and again.chain == "x"
        again.keep(8, {})
        assert whole(again) == {7: 0, 8: 1}  # the older one was written over
        again.begin("y")
        assert resume(again) == (None, [])
        sizes = [-(-t.nbytes // 64) * 64 for shard in state for t in shard.state.values()]
        assert MemoryCopies.need(state) == 2 * (HEAD + sum(sizes)) == os.fstat(file).st_size


def test_a_copy_that_was_not_finished_is_none_and_the_older_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    file, state = os.memfd_create("copies"), shards(1)
    copies = made(state, file)
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
    assert resume(made(other, file)) == ({"step": 1}, [])
    assert bits(other) == want


def places(copies: MemoryCopies, slot: int) -> list[tuple[int, int]]:
    """Start and length of all bytes of a slot that say something: its head, and its tensors."""
    head = 40 + int.from_bytes(copies.slots[slot][:8], "little")
    return [(0, head), *((at, t.nbytes) for (at, _), t in zip(copies._spans, copies._tensors, strict=True))]


def test_of_a_thousand_flipped_bits_none_is_accepted() -> None:
    """Alone: the copy before is taken. With a buddy that has it: its bits are, but where nothing is said of them."""
    state, draw = shards(1, (40, 7, 500)), random.Random(7)
    copies, other = two(state, 1, 2)
    want, far = bits(state), Far(copies, other)
    newest = whole(copies)[2]
    spans = places(copies, newest)
    for number in range(1000):
        start, size = draw.choice(spans)
        at, bit = start + draw.randrange(size), 1 << draw.randrange(8)
        copies.slots[newest][at] ^= bit
        for shard in state:
            shard.state["master"].zero_()
        helps = number % 2 > 0 and start > 0
        counters, said = far.resume() if helps else resume(copies)
        assert counters == {"step": 1 + helps} and bits(state) == want
        assert len(said) == (start > 0), said
        if helps:
            assert copies.slots[newest] == other.slots[newest]  # it is mended
        else:
            copies.slots[newest][at] ^= bit
    assert resume(copies) == ({"step": 2}, []) and bits(state) == want


def test_a_damaged_tensor_comes_from_the_buddy_and_is_named() -> None:
    state = shards(1)
    copies, other = two(state, 1, 2)
    far, want = Far(copies, other), bits(state)
    slot = whole(copies)[2]
    start, length = copies._spans[4]
    copies.slots[slot][start + 5] ^= 16
    for shard in state:
        shard.state["exp_avg"].zero_()
    counters, said = far.resume()
    assert counters == {"step": 2} and bits(state) == want and far.asked == [length]
    assert said == ["the copy of step 2 in memory is damaged (w1 exp_avg): taken from rank 1"]
    copies.keep(3, {})
    assert whole(copies) == {2: slot, 3: 1 - slot}


def test_what_is_damaged_in_both_is_not_taken() -> None:
    copies, other = two(shards(1), 2)
    for one in (copies, other):
        one.slots[0][copies._spans[0][0]] ^= 1
    counters, said = Far(copies, other).resume()
    assert counters is None
    assert said == ["the copy of step 2 in memory is damaged and not used (w0 master): taken from rank 1"]
    counters, said = resume(copies)
    assert counters is None
    assert said == ["the copy of step 2 in memory is damaged and not used (w0 master): nobody else has it"]


def test_ranks_take_the_newest_step_that_all_have() -> None:
    """Rank 1 ended before its copy of step 3; of rank 2 the one of step 2 is damaged."""

    def rank(group: Any) -> tuple[Any, int]:
        number, state = group.rank, shards(group.rank)
        copies = made(state)
        for step in (1, 2) if number == 1 else (2, 3):
            copies.keep(step, {"step": step})
        if number == 2:
            copies.slots[whole(copies)[2]][HEAD] ^= 1
        said: list[str] = []
        return copies.resume(group, whole(copies), alone, said.append), len(said)

    assert [found for found, _ in run_threads(2, rank)] == [{"step": 2}] * 2
    assert run_threads(3, rank) == [(None, 0), (None, 0), (None, 1)]


def test_after_a_rollback_copies_of_before_are_none_wherever_they_are(tmp_path: Path) -> None:
    copies, elsewhere = two(shards(1), 5, 6)
    manager = SimpleNamespace(chain=tmp_path / "memory")
    manager.chain.write_text("x")
    world = SimpleNamespace(rank=0, group=Solo(), record=SimpleNamespace(ask=alone))
    setup: Any = SimpleNamespace(copies=copies, world=world, manager=manager, config=small_config())
    assert _from_memory(setup, rollback=True) is None
    assert whole(copies) == {} and copies.chain == manager.chain.read_text() != "x"
    assert {read_head(slot)["chain"] for slot in elsewhere.slots} == {"x"}
    copies.keep(7, {})
    assert read_head(copies.slots[0])["chain"] == copies.chain


@pytest.mark.parametrize("damage", [None, b"\xff\xfe", b"x" * 1000])
def test_copies_of_a_run_whose_mark_is_damaged_are_none(damage: bytes | None, tmp_path: Path) -> None:
    """And the run goes on from a checkpoint, with a new mark."""
    copies, _ = two(shards(1), 5, 6)
    manager, asked, said = SimpleNamespace(chain=tmp_path / "memory"), list[dict[str, Any]](), list[str]()
    if damage is not None:
        manager.chain.write_bytes(damage)

    def ask(**question: Any) -> dict[str, Any]:
        asked.append(question)
        return {"problem": "", "own": [], "notes": ["not used"]}

    world = SimpleNamespace(rank=0, group=Solo(), record=SimpleNamespace(ask=ask))
    log = SimpleNamespace(info=said.append, warn=said.append)
    setup: Any = SimpleNamespace(copies=copies, world=world, manager=manager, config=small_config(), log=log)
    assert _from_memory(setup, rollback=False) is None
    assert asked[0]["chain"] != "x" and said == ["not used"]
    assert copies.chain == manager.chain.read_text() and len(copies.chain) == 16


def test_memory_that_does_not_suffice_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        made(shards(1))
