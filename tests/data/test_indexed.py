"""The .bin/.idx pair against an independent reader, every kind of damage, and a writer that is killed."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megallama.config.errors import DataError
from megallama.data.indexed import IndexedDataset
from megallama.data.look import document, verify
from megallama.data.writer import IndexedWriter, dtype_for, write_metadata

U16, I32 = dtype_for(100), dtype_for(70000)
DOCUMENTS = [[5, 6, 7, 2], [2], [9] * 10 + [2], [1, 65535]]


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, dtype: np.dtype = U16) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.add(np.array(ids, np.int64))
    return prefix


def damage(path: str, at: int, value: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(value)


def read_megatron(prefix: Path) -> tuple[int, list[list[int]], list[int]]:
    """An independent reader of the format: type code, sequences, document marks."""
    raw = Path(f"{prefix}.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    version, code, n, d = struct.unpack_from("<QBQQ", raw, 9)
    assert version == 1 and len(raw) == 34 + 12 * n + 8 * d
    lengths = struct.unpack_from(f"<{n}i", raw, 34)
    pointers = struct.unpack_from(f"<{n}q", raw, 34 + 4 * n)
    marks = struct.unpack_from(f"<{d}q", raw, 34 + 12 * n)
    tokens, letter = Path(f"{prefix}.bin").read_bytes(), {8: "H", 4: "i"}[code]
    pairs = zip(lengths, pointers, strict=True)
    return code, [list(struct.unpack_from(f"<{k}{letter}", tokens, p)) for k, p in pairs], list(marks)


@pytest.mark.parametrize("dtype, code", [(U16, 8), (I32, 4)])
def test_written_files_are_megatrons_format(tmp_path: Path, dtype: np.dtype, code: int) -> None:
    assert read_megatron(write(tmp_path / "a", dtype=dtype)) == (code, DOCUMENTS, [0, 1, 2, 3, 4])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.sums"]


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    data = IndexedDataset(write(tmp_path / "a"))
    assert (data.num_documents, data.num_tokens) == (4, 18)
    assert [document(data, i).tolist() for i in range(4)] == DOCUMENTS
    stream = sum(DOCUMENTS, [])
    assert all(data.read(i, 18 - i).tolist() == stream[i:] for i in range(19))
    assert data.starts(1, 4).tolist() == [4, 5, 16, 18]
    assert data.largest_token() == 65535
    verify(data, 65536)


def test_documents_of_several_sequences_are_read(tmp_path: Path) -> None:
    """Other tools may store a document as several sequences, or none."""
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 3, 4)
    body = struct.pack("<3i3q4q", 2, 1, 3, 0, 4, 6, 0, 2, 2, 3)
    (tmp_path / "m.idx").write_bytes(header + body)
    (tmp_path / "m.bin").write_bytes(struct.pack("<6H", *range(6)))
    data = IndexedDataset(tmp_path / "m.bin")  # the suffix does not matter
    assert [document(data, i).tolist() for i in range(3)] == [[0, 1, 2], [], [3, 4, 5]]
    verify(data, 6)


def test_many_documents_added_at_once_give_the_same_files(tmp_path: Path) -> None:
    write(tmp_path / "one")
    with IndexedWriter(tmp_path / "many", U16) as writer:
        writer.add(np.array(sum(DOCUMENTS, []), U16), np.array([len(d) for d in DOCUMENTS]))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"many{suffix}").read_bytes()


def test_an_index_is_written_and_checked_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("indexed", "writer", "look"):
        monkeypatch.setattr(f"megallama.data.{module}.CHUNK", 7)  # smaller than the number of documents
    documents = [[i % 50] * (i % 5) for i in range(100)]
    prefix = write(tmp_path / "a", documents)
    assert read_megatron(prefix) == (8, documents, list(range(101)))
    checked: list[int] = []
    assert verify(IndexedDataset(prefix), 50, checked.append) == ""
    assert checked == [*range(14, 400, 14), 400]  # bytes of 200 tokens


@pytest.mark.parametrize("ids, dtype, text", [([70000], U16, "token id 70000 does not fit uint16"), ([-1], I32, "-1")])
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, ids: list[int], dtype: np.dtype, text: str) -> None:
    with pytest.raises(DataError, match=text):
        write(tmp_path / "a", [ids], dtype if ids[0] > 0 else U16)
    assert list(tmp_path.iterdir()) == []


def test_megatrons_limit_decides_the_type() -> None:
    assert (dtype_for(65499), dtype_for(65500)) == (np.dtype("<u2"), np.dtype("<i4"))


HEADER_DAMAGE = [
    (0, b"NOTANIDX", "begins with b'NOTANIDX"),
    (9, struct.pack("<Q", 2), "format version 2, expected 1"),
    (17, b"\x05", r"token type code 5, expected 8 \(uint16\) or 4 \(int32\)"),
    (18, struct.pack("<Q", 40), "has 122 bytes, expected 554 for its 40 sequences and 5 document marks: .* truncated"),
    (26, struct.pack("<Q", 3), "has 122 bytes, expected 106 .* it is too long"),
    (34 + 16, struct.pack("<q", 8), "first offset or its document marks are damaged"),
    (34 + 48 + 32, struct.pack("<q", 3), "first offset or its document marks are damaged"),
    (34 + 16 + 24, struct.pack("<q", 30), r"a\.bin has 36 bytes, expected 34 from a\.idx: it is of another run"),
]


@pytest.mark.parametrize("at, value, text", HEADER_DAMAGE)
def test_a_damaged_index_is_refused_at_open(tmp_path: Path, at: int, value: bytes, text: str) -> None:
    prefix = write(tmp_path / "a")
    damage(f"{prefix}.idx", at, value)
    with pytest.raises(DataError, match=text):
        IndexedDataset(prefix)


@pytest.mark.parametrize("suffix, keep, text", [
    (".bin", 30, r"a\.bin has 30 bytes, expected 36 from a\.idx: it is truncated"),
    (".idx", 100, r"a\.idx has 100 bytes, expected 122 for its 4 sequences and 5 document marks: it is truncated"),
    (".idx", 20, r"a\.idx has 20 bytes, expected at least 34 for its header"),
])  # fmt: skip
def test_a_truncated_file_is_refused_at_open(tmp_path: Path, suffix: str, keep: int, text: str) -> None:
    prefix = write(tmp_path / "a")
    os.truncate(f"{prefix}{suffix}", keep)
    with pytest.raises(DataError, match=text):
        IndexedDataset(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    prefix = write(tmp_path / "a")
    Path(f"{prefix}{suffix}").unlink()
    with pytest.raises(DataError, match=rf"a\{suffix} does not exist; give the prefix .* megallama prepare"):
        IndexedDataset(prefix)


def test_a_corpus_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no documents"):
        IndexedDataset(write(tmp_path / "a", []))
    (tmp_path / "b.idx").write_bytes(struct.pack("<9sQBQQiqq", b"MMIDIDX\x00\x00", 1, 8, 1, 1, 1, 0, 0))
    (tmp_path / "b.bin").write_bytes(b"ab")
    with pytest.raises(DataError, match="holds no documents"):
        IndexedDataset(tmp_path / "b")


def test_truncation_while_reading_is_an_error(tmp_path: Path) -> None:
    data = IndexedDataset(write(tmp_path / "a"))
    os.truncate(tmp_path / "a.bin", 10)
    assert data.read(0, 5).tolist() == [5, 6, 7, 2, 2]
    with pytest.raises(DataError, match=r"a\.bin ends at byte 10, expected 12 bytes from byte 0 .* had 36 bytes"):
        data.read(0, 6)


@pytest.mark.parametrize("number", [-1, 4])
def test_a_document_that_is_not_there(tmp_path: Path, number: int) -> None:
    with pytest.raises(DataError, match=rf"holds documents 0\.\.3, not {number}"):
        document(IndexedDataset(write(tmp_path / "a")), number)


def test_a_document_that_a_damaged_index_puts_outside_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    damage(f"{prefix}.idx", 34 + 16 + 16, struct.pack("<q", 2 * 999))  # where document 2 begins
    data = IndexedDataset(prefix)
    for number in (1, 2):
        with pytest.raises(DataError, match=r"a\.bin holds 18 tokens; \d+\.\.\d+ are outside"):
            document(data, number)


def test_verify_finds_a_token_outside_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="token 17 of the stream is id 65535, outside the vocabulary of 100 ids"):
        verify(IndexedDataset(write(tmp_path / "a")), 100)


@pytest.mark.parametrize("at, value, text", [
    (34 + 16 + 8, struct.pack("<q", 6), "the offset of sequence 1 does not follow"),
    (34 + 4, struct.pack("<i", 3), "the offset of sequence 2 does not follow"),
    (34 + 48 + 16, struct.pack("<q", 4), "the marks of documents 0..4 do not ascend"),
])  # fmt: skip
def test_verify_finds_damage_inside_the_index(tmp_path: Path, at: int, value: bytes, text: str) -> None:
    prefix = write(tmp_path / "a")
    damage(f"{prefix}.idx", at, value)
    with pytest.raises(DataError, match=text):
        verify(IndexedDataset(prefix))


def test_the_fingerprint_sees_a_changed_file(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    before = IndexedDataset(prefix).fingerprint()
    assert before == IndexedDataset(write(tmp_path / "b")).fingerprint()
    assert (before["documents"], before["tokens"], before["bin_bytes"], before["idx_bytes"]) == (4, 18, 36, 122)
    damage(f"{prefix}.bin", 2, b"\x09")
    assert before["sha256"] != IndexedDataset(prefix).fingerprint()["sha256"]


LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LENGTHS, st.integers(0, 250), st.integers(0, 250))
def test_documents_in_a_range(tmp_path: Path, lengths: list[int], offset: int, count: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megallama.data.indexed.NEAR", 3)
        data = IndexedDataset(write(tmp_path / "a", [[1] * n for n in [*lengths, 1]]))
        starts = np.cumsum([0, *lengths])
        expected = sorted({int(s) for s in starts if offset <= s < offset + count})
        assert data.documents_in(offset, count).tolist() == expected


def test_documents_of_several_sequences_in_a_range(tmp_path: Path) -> None:
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 3, 5)
    (tmp_path / "m.idx").write_bytes(header + struct.pack("<3i3q5q", 2, 1, 3, 0, 4, 6, 0, 2, 2, 3, 3))
    (tmp_path / "m.bin").write_bytes(struct.pack("<6H", *range(6)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megallama.data.indexed.NEAR", 1)
        data = IndexedDataset(tmp_path / "m")
        assert [data.documents_in(offset, 2).tolist() for offset in range(5)] == [[0], [], [3], [3], []]


def test_empty_documents_at_the_end_hide_none_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another tool stores them: without a sequence of their own."""
    monkeypatch.setattr("megallama.data.indexed.NEAR", 1)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 2, 9)
    (tmp_path / "m.idx").write_bytes(header + struct.pack("<2i2q9q", 1, 2, 0, 2, 0, 1, *[2] * 7))
    (tmp_path / "m.bin").write_bytes(struct.pack("<3H", *range(3)))
    data = IndexedDataset(tmp_path / "m")
    assert [data.documents_in(offset, 1).tolist() for offset in range(3)] == [[0], [1], []]


def test_ten_million_documents_are_opened_without_reading_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse files of the real size: everything is zero except what opening and one search look at."""
    n, length = 10_000_000, 500
    read: list[int] = []

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        read.append(len(buffers[0]))
        return pure(fd, buffers, offset)

    with (tmp_path / "a.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, n, n + 1))
        for start in range(0, n, 1 << 20):
            count = min(1 << 20, n - start)
            for at, values in ((34 + 4 * start, np.full(count, length, "<i4")),
                               (34 + 4 * n + 8 * start, np.arange(start, start + count) * 2 * length),
                               (34 + 12 * n + 8 * start, np.arange(start, start + count + 1))):  # fmt: skip
                file.seek(at)
                file.write(values.tobytes())
    with (tmp_path / "a.bin").open("wb") as file:
        file.truncate(2 * n * length)
    pure = os.preadv
    monkeypatch.setattr(os, "preadv", preadv)
    data = IndexedDataset(tmp_path / "a")
    assert (data.num_documents, data.num_tokens) == (n, n * length)
    assert data.documents_in(3_000_000_001, 2049).tolist() == [3_000_000_500 + 500 * i for i in range(4)]
    assert data.read(3_000_000_001, 2049).sum() == 0
    assert 20 < len(read) < 60 and sum(read) < 20_000  # neither grows with the corpus
    data.fingerprint()
    assert sum(read) < 300_000


@pytest.mark.parametrize("suffix, at", [(".bin", 2), (".idx", 60)])
def test_a_replaced_file_is_refused_at_open(tmp_path: Path, suffix: str, at: int) -> None:
    prefix = write(tmp_path / "a")
    fingerprint = IndexedDataset(prefix).fingerprint()["sha256"]
    write_metadata(str(prefix), {"fingerprint": fingerprint})
    assert IndexedDataset(prefix).num_tokens == 18
    damage(f"{prefix}{suffix}", at, b"\x09")
    with pytest.raises(DataError, match=r"a\.bin or a\.idx is not the file that a\.json describes .*one was replaced"):
        IndexedDataset(prefix)


def test_new_tokens_never_stand_beside_old_facts(tmp_path: Path) -> None:
    write_metadata(str(write(tmp_path / "a")), {"documents": 4})
    write(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.sums"]


def test_a_killed_writer_leaves_no_files_under_their_names(tmp_path: Path) -> None:
    program = (
        "import numpy as np, os, signal, sys\n"
        "from megallama.data.writer import IndexedWriter, dtype_for\n"
        "writer = IndexedWriter(sys.argv[1], dtype_for(100))\n"
        "for _ in range(1000): writer.add(np.ones(1000, np.uint16))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.lock", "a.bin.tmp", "a.idx.tmp", "a.sums.tmp"]
    write(tmp_path / "a")  # and the next run is not disturbed by them
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.sums"]
    assert IndexedDataset(tmp_path / "a").num_tokens == 18
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.sums"]


def test_an_exception_keeps_the_earlier_pair(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt), IndexedWriter(prefix, U16) as writer:
        writer.add(np.array([3]))
        raise KeyboardInterrupt
    assert IndexedDataset(prefix).num_tokens == 18
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.sums"]


def test_a_file_that_the_disk_does_not_give_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with IndexedWriter(tmp_path / "text", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(100))
    dataset, out = IndexedDataset(tmp_path / "text"), np.empty((2, 10), np.uint16)

    def broken(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(DataError, match=r"cannot read .*text\.bin at byte 0: Input/output error"):
        dataset.read_rows([0, 50], out)
    monkeypatch.undo()
    dataset.read_rows([0, 50], out)
    assert out[:, 0].tolist() == [0, 50]
