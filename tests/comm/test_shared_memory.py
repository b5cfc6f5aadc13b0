"""Shared memory between processes: what differs from gloo is only how the bytes travel, and how it fails."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megallama.comm import shared_memory
from megallama.comm.group import ContactLost
from megallama.comm.launch import World
from megallama.comm.shared_memory import SharedMemory
from tests.comm.operations import everything
from tests.pool import Pool, WorkerError

HERE = "tests.comm.test_shared_memory:"
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="shared memory is used on x86-64 only")


def sums(world: World) -> list[bytes]:
    """The bits of sums that depend on the order of the additions."""
    out = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(world.rank)
        x = (torch.randn(3000 * world.world_size, generator=generator) * 10.0 ** (world.rank * 3 % 5)).to(dtype)
        scattered = torch.empty(3000, dtype=dtype)
        world.group.reduce_scatter(scattered, x.clone()).wait()
        world.group.all_reduce(x).wait()
        out += [t.view(torch.uint8).numpy().tobytes() for t in (scattered, x)]
    return out


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_have_the_bits_of_gloo(pool: Pool, size: int) -> None:
    assert pool.run(size, HERE + "sums") == pool.run(size, HERE + "sums", gloo=True)


def without_room(world: World) -> bool:
    """Everything again with an arena in which only some operations find room."""
    before, shared_memory._ARENA = shared_memory._ARENA, 80
    try:
        return everything(world.group)
    finally:
        shared_memory._ARENA = before


@pytest.mark.parametrize("size", [2, 3])
def test_what_finds_no_room_goes_over_gloo(pool: Pool, size: int) -> None:
    assert pool.run(size, HERE + "without_room") == [True] * size


def touched(world: World) -> int:
    """Bytes of this rank's arena that were ever used, after many operations one at a time."""
    assert isinstance(world.group, SharedMemory)
    arena = world.group._segments[world.rank].arena
    for _ in range(3000):  # more than there are notices
        world.group.all_reduce(torch.full((1000,), 3.0)).wait()
    return int(arena.nonzero().max()) + 1


def test_little_memory_is_touched_by_operations_one_at_a_time(pool: Pool) -> None:
    assert max(pool.run(2, HERE + "touched")) <= 3 * 4032  # the last may not yet be read when the next starts


def leaves(world: World, how: str, messages: str) -> None:
    """Rank 1 leaves in the middle; what rank 0, which waits for it, is told."""
    world.group.barrier()
    if world.rank == 1 and how == "dies":
        os._exit(9)
    if world.rank == 1:
        world.group.close()  # type: ignore[attr-defined]
        time.sleep(3)
    try:
        world.group.all_reduce(torch.ones(1)).wait()
    except RuntimeError as error:
        Path(messages).write_text(f"{error} {error.__notes__}")
        raise


@pytest.mark.parametrize("how", ["dies", "closes"])
def test_a_rank_that_leaves_is_named(pool: Pool, tmp_path: Path, how: str) -> None:
    messages = tmp_path / "told"
    with pytest.raises(WorkerError):
        pool.run(2, HERE + "leaves", how, str(messages), collective_timeout=60)
    want = "lost the connection to rank 1: its process has left ['in all_reduce of group world (ranks (0, 1))']"
    assert messages.read_text() == want


def differ(world: World) -> str:
    """Ranks that disagree on the size of an operation."""
    try:
        world.group.all_reduce(torch.ones(4 + world.rank)).wait()
    except RuntimeError as error:
        return str(error)
    return "nobody noticed"


def test_operations_of_different_sizes_are_found(pool: Pool) -> None:
    assert pool.run(2, HERE + "differ") == [
        "rank 1 posted 20 bytes where 16 are expected",
        "rank 0 posted 16 bytes where 20 are expected",
    ]


def floods(world: World) -> str:
    """One message more than there are notices, which nobody takes."""
    if world.rank == 0:
        try:
            for _ in range(shared_memory._NOTICES + 1):
                world.group.send(torch.ones(1), 1)
        except RuntimeError as error:
            return str(error)
    return ""


def test_too_many_operations_under_way_are_an_error(pool: Pool) -> None:
    assert pool.run(2, HERE + "floods")[0] == "group world: more than 2048 operations under way"


def refused(world: World) -> str | None:
    """One rank cannot: all keep gloo, and it works."""
    group = dist.new_group()
    shared = SharedMemory(group, "tp", range(world.world_size), world.rank, world.device)
    before = os.memfd_create
    if world.rank == 1:
        os.memfd_create = lambda name: (_ for _ in ()).throw(OSError("no such call"))  # type: ignore[assignment]
    try:
        reason = shared.connect(oversubscribed=False, timeout=world.timeout)
    finally:
        os.memfd_create = before
    assert everything(shared)
    return reason


def test_a_rank_that_cannot_makes_all_keep_gloo(pool: Pool) -> None:
    assert pool.run(3, HERE + "refused") == ["no such call"] * 3


def files(world: World) -> int:
    return len(os.listdir("/proc/self/fd"))


def test_closed_groups_leave_no_open_files(pool: Pool) -> None:
    first = pool.run(2, HERE + "files")
    for _ in range(3):
        last = pool.run(2, HERE + "files")
    assert last == first


def test_every_notice_has_a_tag_of_its_own() -> None:
    """Of the notices under way between two ranks: those of collectives and those of messages."""
    tags = [SharedMemory._tag(None, kind, number) for kind in (0, 1) for number in range(100)]
    assert len(set(tags)) == 200 and min(tags) >= shared_memory.FREE_TAG  # the lower ones are of messages and pieces


class Notices:
    """A segment's words: of each notice its number and the number that was read."""

    def __init__(self) -> None:
        self.words = [0] * 64


def alone(blocks: list[tuple[int, int, list[tuple[int, int]]]]) -> SharedMemory:
    group = SharedMemory.__new__(SharedMemory)
    group.rank, group._segments, group._blocks = 0, [Notices()], blocks  # type: ignore[list-item]
    return group


def test_data_take_the_lowest_place_that_nobody_reads_any_more() -> None:
    arena, unread, read = shared_memory._ARENA, [(8, 1)], [(0, 0)]
    assert alone([])._room(arena) == 0 and alone([])._room(arena + 1) == -1
    group = alone([(192, 300, unread), (0, 65, unread)])
    assert [group._room(n) for n in (64, 65, arena - 320, arena - 319)] == [128, 320, 320, -1], "places are whole lines"
    group = alone([(64, 128, unread), (0, 64, read)])
    assert (group._room(64), group._room(65)) == (0, 128) and group._blocks == [(64, 128, unread)]
    group._segments[0].words[8 + shared_memory._READ] = 1
    assert group._room(65) == 0 and group._blocks == []


def test_a_wait_ends_with_the_notice_the_time_out_or_a_rank_that_left(monkeypatch: pytest.MonkeyPatch) -> None:
    group, token = alone([]), 77
    files = [os.memfd_create(f"test-{rank}") for rank in range(2)]
    own, other = segments = [shared_memory._Segment(file, 2, token, own=True) for file in files]
    group._segments, group.ranks, group._syscall, group._spin = segments, (4, 6), ctypes.CDLL(None).syscall, 0.0
    with pytest.raises(OSError, match="do not see one another's processes"):
        shared_memory._Segment(files[1], 2, token + 1, own=False)
    seen = shared_memory._Segment(files[1], 2, token, own=False)
    at = other.notice(shared_memory._TO_ALL, 0, 5)
    monkeypatch.setattr(shared_memory, "_LOOK", 0.01)
    for alive, seconds, text in (
        (True, 0.05, "timed out after 0.05 s waiting for rank 6"),
        (False, 9.0, "lost the connection to rank 6: its process has left"),
    ):
        monkeypatch.setattr(seen, "owner_left", lambda alive=alive: not alive)
        group._seconds, began = seconds, time.monotonic()
        with pytest.raises(ContactLost, match=text):
            group._sleep_until(seen, at, 5, 1)
        assert time.monotonic() - began < 2
    bells = own.words[shared_memory._BELL]
    other.words[at + shared_memory._NUMBER] = 5
    group._sleep_until(seen, at, 5, 1)  # though it has left: it was told before
    group._ring(own)
    assert own.words[shared_memory._BELL] == bells + 1
    assert not segments[0].words[shared_memory._CLOSED] and os.fstat(files[0]).st_size > shared_memory._ARENA
    for file in files:
        os.close(file)


def test_every_notice_has_words_of_its_own() -> None:
    file = os.memfd_create("test")
    segment = shared_memory._Segment(file, 3, 1, own=True)
    ring = shared_memory._NOTICES
    places = [segment.notice(k, r, n) for k in (0, 1) for r in range(3) for n in range(ring)]
    assert sorted(places) == [*range(shared_memory._HEAD, len(segment.words), shared_memory._WORDS)]
    assert segment.notice(1, 2, ring + 3) == segment.notice(1, 2, 3)
    os.close(file)
