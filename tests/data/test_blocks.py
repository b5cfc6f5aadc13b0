"""Checksums of blocks: any damage is found, once per block, and nothing else is taken for damage."""

from __future__ import annotations

import errno
import os
import random
import resource
import struct
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from megallama.config.errors import DataError
from megallama.data.blocks import BLOCK, File
from megallama.data.indexed import IndexedDataset
from megallama.data.look import verify
from megallama.data.samples import Source
from megallama.data.writer import IndexedWriter, SumsWriter, write_metadata
from megallama.text.preprocess import merge, preprocess
from tests.data.test_sources import opened

U16 = np.dtype("<u2")


def write(prefix: Path, *, documents: int = 4000, length: int = 110, seed: int = 1) -> Path:
    """A pair of about 890,000 and 80,000 bytes: 14 and 2 blocks."""
    draw = np.random.default_rng(seed)
    with IndexedWriter(prefix, U16) as writer:
        for _ in range(documents):
            writer.add(draw.integers(0, 500, length + int(draw.integers(0, 3))).astype(U16))
    return prefix


def damage(path: Path | str, at: int, raw: bytes) -> None:
    with Path(path).open("r+b") as file:
        file.seek(at)
        file.write(raw)


def table(prefix: Path) -> tuple[list[int], list[int]]:
    """The checksums of .bin and .idx, from the description of the format alone."""
    raw = Path(f"{prefix}.sums").read_bytes()
    magic, bin_bytes, idx_bytes, of_table = struct.unpack_from("<8sQQI", raw)
    assert magic == b"MLSUMS\0\1" and of_table == crc32(raw[28:])
    sums = struct.unpack_from(f"<{(len(raw) - 28) // 4}I", raw, 28)
    first = -(-bin_bytes // 65536)
    assert len(sums) == first + -(-idx_bytes // 65536)
    return list(sums[:first]), list(sums[first:])


def test_the_file_holds_the_checksum_of_every_block(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    for suffix, sums in zip((".bin", ".idx"), table(prefix), strict=True):
        raw = Path(f"{prefix}{suffix}").read_bytes()
        assert sums == [crc32(raw[at : at + BLOCK]) for at in range(0, len(raw), BLOCK)]
    assert [len(sums) for sums in table(prefix)] == [14, 2]


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_pieces_of_any_size_give_the_same_file(tmp_path: Path, size: int) -> None:
    raw, draw = random.Random(size).randbytes(size), random.Random(1)
    for name in ("bin", "idx"):
        (tmp_path / name).write_bytes(raw)
    found = set()
    for pieces in ([size], [1] * min(size, 99) + [size], [draw.randrange(100_000) for _ in range(99)]):
        writer, at = SumsWriter(str(tmp_path / "sums")), 0
        for piece in pieces:
            writer.add(raw[at : at + piece])
            at += piece
        writer.add(b"", last=True)
        writer.finish(File(str(tmp_path / "bin")), File(str(tmp_path / "idx")))
        found.add((tmp_path / "sums").read_bytes())
    assert len(found) == 1 and len(found.pop()) == 28 + 8 * -(-size // BLOCK)


def test_all_writers_write_it(jsonl: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    preprocess([jsonl], tmp_path / "s", tokenizer_path, split_valid=0.1)
    merge([tmp_path / "s_train", tmp_path / "s_valid"], tmp_path / "m")
    for name in ("s_train", "s_valid", "m"):
        assert verify(IndexedDataset(tmp_path / name)) == ""


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_any_flipped_bit_and_any_hole_is_found(tmp_path: Path, suffix: str) -> None:
    prefix, draw = write(tmp_path / "a"), random.Random(3)
    path = Path(f"{prefix}{suffix}")
    raw = path.read_bytes()
    places = [0, len(raw) - 1, BLOCK - 1, BLOCK, *(draw.randrange(len(raw)) for _ in range(60))]
    for at in places:
        damage(path, at, bytes([raw[at] ^ 1 << draw.randrange(8)]))
        with pytest.raises(DataError) as caught:
            verify(IndexedDataset(prefix), 500)
        if suffix == ".bin" or 60 < at < len(raw) - 60:  # the ends of an index are looked at when it is opened
            expected = f"{path}: the 65536 bytes from {at // BLOCK * BLOCK} on are not what was written, says {prefix}"
            assert str(caught.value).startswith(expected), (at, caught.value)
        damage(path, at, raw[at : at + 1])
    at, hole = (99_000, BLOCK) if suffix == ".bin" else (20_000, 20_000)  # not what opening an index looks at
    damage(path, at, bytes(hole))
    with pytest.raises(DataError, match="are not what was written"):
        verify(IndexedDataset(prefix), 500)
    damage(path, at, raw[at : at + hole])
    assert verify(IndexedDataset(prefix), 500) == ""


@pytest.mark.parametrize("documents", [1, 10, 400, 500])
@pytest.mark.parametrize("hole", [1, 1 << 16])
def test_damage_in_a_small_pair_is_no_other_pair(tmp_path: Path, documents: int, hole: int) -> None:
    """One or two blocks of .bin, all of which may be damaged."""
    prefix = write(tmp_path / "a", documents=documents)
    size = Path(f"{prefix}.bin").stat().st_size
    damage(f"{prefix}.bin", size // 3, bytes(min(hole, size - size // 3)) if hole > 1 else b"\xfe")
    with pytest.raises(DataError, match="are not what was written"):
        verify(IndexedDataset(prefix), 500)


def test_a_source_is_checked_when_first_read_and_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = IndexedDataset(write(tmp_path / "a"))
    source = Source(dataset, 100, 1, mark_documents=True)
    want = source.read(range(source.num_sequences))
    assert dataset.check_blocks() == ""
    read: list[tuple[int, int]] = []
    pure = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        read.append((len(buffers[0]), offset))
        return pure(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    for again in range(2):
        found = source.read(range(source.num_sequences))
        assert np.array_equal(found.tokens, want.tokens) and np.array_equal(found.starts, want.starts)
        blocks = sorted(offset for count, offset in read if count > 5_000)
        expected = [*(n * BLOCK for n in range(14)), 0, BLOCK]  # of .bin and of .idx
        assert blocks == ([] if again else sorted(expected))
        read.clear()


def test_a_damaged_block_ends_a_run_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "a")
    damage(f"{prefix}.bin", 5 * BLOCK + 10, b"\x01\x01")
    with pytest.raises(DataError, match="are not what was written"):  # the ids that are looked at in the beginning
        opened([(prefix, 1)], s=100, vocab=500)
    monkeypatch.setattr(IndexedDataset, "largest_token", lambda self: 499)
    data = opened([(prefix, 1)], s=100, vocab=500)
    assert not data.notes
    with pytest.raises(DataError, match=rf"a\.bin: the 65536 bytes from {5 * BLOCK} on are not what was written"):
        data.train.read(range(4000))
    unasked = opened([(prefix, 1)], s=100, vocab=500, checksums=False)
    unasked.train.read(range(4000))
    held = opened([(write(tmp_path / "b"), 1)], [prefix], s=100, vocab=500)
    held.train.read(range(4000))
    with pytest.raises(DataError, match=rf"a\.bin: the 65536 bytes from {5 * BLOCK} on"):
        held.valid[0].read(range(4000))


def test_a_damaged_pair_is_not_merged(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    Path(f"{second}.sums").unlink()
    output: list[str] = []
    merge([first, second], tmp_path / "m", say=output.append)
    assert len(output) == 1 and output[0].startswith(
        f"{second}.sums: No such file or directory; a flipped bit would not"
    )
    damage(f"{first}.bin", 300_000, b"\x01\x01")
    with pytest.raises(DataError, match=r"a\.bin: the 65536 bytes from 262144 on are not what was written"):
        merge([first, second], tmp_path / "n")
    assert not list(tmp_path.glob("n*"))


def sums_of(tmp_path: Path, what: str, prefix: Path) -> None:
    """Put another PREFIX.sums beside a pair."""
    sums = Path(f"{prefix}.sums")
    if what == "none":
        sums.unlink()
    elif what == "smaller":
        Path(f"{write(tmp_path / 'o', documents=2000)}.sums").replace(sums)
    elif what == "as large":  # as an earlier version leaves it, which writes a pair anew
        size = Path(f"{prefix}.bin").stat().st_size
        Path(f"{write(tmp_path / 'o', seed=2)}.sums").replace(sums)
        damage(sums, 8, struct.pack("<Q", size))
    elif what == "text":
        sums.write_text("9d1c\n")
    elif what == "begun":
        sums.write_bytes(sums.read_bytes()[:10])
    elif what == "another version":
        damage(sums, 7, b"\x02")
    elif what == "folder":
        sums.unlink()
        sums.mkdir()


@pytest.mark.parametrize("what, output", [
    ("none", "No such file or directory"), ("smaller", "it is of another pair and not used"),
    ("as large", "it is of another pair and not used"), ("text", "is damaged itself; delete it, or write it"),
    ("begun", "is damaged itself"), ("another version", "is damaged itself"), ("folder", "Is a directory"),
])  # fmt: skip
def test_sums_that_cannot_be_used_are_said_and_not_trusted(tmp_path: Path, what: str, output: str) -> None:
    prefix = write(tmp_path / "a")
    sums_of(tmp_path, what, prefix)
    lacking = verify(IndexedDataset(prefix), 500)
    assert (
        lacking.startswith(f"{prefix}.sums: ") and output in lacking and "a flipped bit would not be found" in lacking
    )
    data = opened([(prefix, 1)], [prefix], s=100, vocab=500)
    assert data.notes == [lacking]
    data.train.read(range(4000))


def test_damaged_sums_do_not_accuse_the_data(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    raw = Path(f"{prefix}.sums").read_bytes()
    damage(f"{prefix}.sums", len(raw) // 2, bytes([raw[len(raw) // 2] ^ 4]))
    with pytest.raises(DataError, match=r"^\S+a\.sums is damaged itself; delete it, or write it with"):
        verify(IndexedDataset(prefix), 500)
    Path(f"{prefix}.sums").write_bytes(raw[:-3])
    with pytest.raises(DataError, match=r"^\S+a\.sums is damaged itself"):
        verify(IndexedDataset(prefix), 500)


def test_a_passing_fault_of_reading_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, faults = IndexedDataset(write(tmp_path / "a")), [0, 0]
    pure = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = pure(fd, buffers, offset)
        if offset == 3 * BLOCK and len(buffers[0]) == BLOCK and faults[0] < 1:
            faults[0] += 1
            buffers[0][7] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    assert verify(dataset, 500) == "" and faults[0] == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_fault_of_reading_names_file_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    source = Source(IndexedDataset(write(tmp_path / "a")), 100, 1)

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(DataError, match=rf"cannot read \S+a\.bin at byte \d+: {os.strerror(code)}"):
        source.read([0])


def test_checking_costs_little(tmp_path: Path) -> None:
    """A hundredth of a step is the limit; the smallest step measured here takes 100 ms and reads 8 samples."""
    dataset = IndexedDataset(write(tmp_path / "a", documents=10_000))
    assert dataset.check_blocks() == ""
    check = dataset._bin.check
    assert check is not None
    seconds = timeit.timeit(lambda: check(0, 2_200_000), number=1) / (2_200_000 / BLOCK)
    assert 8 * seconds < 0.01  # 64 KiB each, the first time
    assert timeit.timeit(lambda: check(0, 2_200_000), number=100) / 100 < 1e-3  # 46 blocks, any other time


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may grow larger, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 30_000, 500_000, 800_000])
def test_a_full_disk_names_the_file_and_leaves_what_was_there(tmp_path: Path, size: int) -> None:
    """The data, the index or the checksums do not fit: some while they are written, some only at the end."""
    before = {p.name: p.read_bytes() for p in (write(tmp_path / "a").parent).iterdir()}
    with files_up_to(size), pytest.raises(DataError, match=r"cannot write \S+a\.bin and \.idx: File too large"):
        write(tmp_path / "a", seed=2, documents=5000 if size > 10**5 else 3000)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_disk_that_refuses_at_the_end_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in (write(tmp_path / "a").parent).iterdir()}

    def fsync(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DataError, match=r"cannot write \S+a\.bin and \.idx: No space left on device;"):
        write(tmp_path / "a", seed=2)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_metadata_that_the_disk_does_not_take_is_named_and_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_metadata(str(tmp_path / "a"), {"documents": 1})
    before = (tmp_path / "a.json").read_bytes()

    def full(*args: object, **named: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"cannot write .*a\.json: No space left on device"):
        write_metadata(str(tmp_path / "a"), {"documents": 2})
    assert (tmp_path / "a.json").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.json"]
