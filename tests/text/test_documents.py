"""Reading documents: every kind of file, units that cover a file exactly once, faults named where they are."""

from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.errors import DataError
from megallama.text import documents as readers
from megallama.text.documents import BadRecord, Record, RecordReader, Unit, parse, place, units
from megallama.text.inputs import Found
from megallama.text.preprocess import preprocess
from tests.text.test_preprocess import documents
from tests.words import text_of

Seen = list[tuple[str, bytes, str]]


def seen(files: Sequence[Path | Unit], max_bytes: int = 1 << 20, key: str = "text") -> Seen:
    """FILE:LINE (without the folder), content and fault of every record."""
    reader = RecordReader(files, max_bytes, key)
    found = [(place(r).rpartition("/")[2], r.raw, ": ".join(r.fault)) for r in reader]
    assert reader.bytes_done == reader.bytes_total == sum(u.size for u in reader.units)
    return found


def outcome(files: Sequence[Path | Unit], **options: int) -> tuple[list[str], list[str]]:
    """The good texts, and "FILE:LINE: reason" of the bad."""
    good, bad = [], []
    for record in RecordReader(files, **options):  # type: ignore[arg-type]
        try:
            good.append(parse(record)[0])
        except BadRecord as error:
            bad.append(f"{place(record).rpartition('/')[2]}: {error}")
    return good, bad


def in_zstd_frames(raw: bytes, size: int) -> bytes:
    """`raw` as one zstd frame per `size` bytes."""
    compress = zstandard.ZstdCompressor().compress
    return b"".join(compress(raw[i : i + size]) for i in range(0, len(raw), size))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([b"", b"a", b"bb\r", b" ", b"\xef\xbb\xbf", b"x" * 30, b'{"text": "y"}']), max_size=12),
    st.booleans(),
    st.integers(1, 60),
)
def test_units_cover_json_lines_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], closed: bool, size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "units.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if closed else b""))
    cut = units([path], size)
    assert [u.start for u in cut] == ([*range(0, path.stat().st_size, size)] or [0])
    whole = seen([path], 20)
    assert seen(cut, 20) == whole
    assert [r for unit in cut for r in seen([unit], 20)] == whole  # each in a process of its own
    assert [int(w.rpartition(":")[2]) for w, _, _ in whole] == [
        n for n, line in enumerate(lines, 1) if line.strip() or (n == 1 and line.startswith(b"\xef"))
    ]


def test_what_a_unit_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n" + b"two\n" + b"\xef\xbb\xbfthree")
    assert units([path], 9) == [Unit(path, 0, 9, 9), Unit(path, 9, 18, 9), Unit(path, 18, None, 3)]
    assert seen([Unit(path, 0, 9, 9)]) == [("a.jsonl:1", b"one", "")]
    assert seen([Unit(path, 9, 18, 9)]) == [("a.jsonl:3", b"two", ""), ("a.jsonl:4", b"\xef\xbb\xbfthree", "")]
    assert seen([Unit(path, 18, None, 3)]) == []
    records = [*RecordReader([Unit(path, 9, 18, 9)])]
    assert [(r.line, r.origin) for r in records] == [(1, 9), (2, 9)]


def test_compressed_files_and_text_stay_whole(tmp_path: Path) -> None:
    raw = b"".join(json.dumps({"text": text_of(i)}).encode() + b"\n" for i in range(50))
    files = [tmp_path / n for n in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.JSONL.ZST", "e.txt", "f.txt.zst")]
    many = gzip.compress(raw[:1000]) + gzip.compress(raw[1000:])
    contents = [raw, many, in_zstd_frames(raw, 1000), in_zstd_frames(raw, len(raw)), raw, in_zstd_frames(raw, 77)]
    for path, content in zip(files, contents, strict=True):
        path.write_bytes(content)
    assert Found([tmp_path]).files == sorted(files)
    assert [u.file for u in units(files[1:], 10)] == files[1:]
    expected = [text_of(i) for i in range(50)]
    for path in files[:4]:
        assert outcome([path]) == (expected, [])
    assert outcome(files[4:]) == ([raw.decode()] * 2, [])


def test_a_skippable_zstd_frame_and_an_empty_file_are_nothing(tmp_path: Path) -> None:
    frame = in_zstd_frames(b'{"text": "x"}\n', 99)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x50\x2a\x4d\x18\x03\0\0\0abc" + frame)
    (tmp_path / "b.jsonl.zst").write_bytes(b"")
    assert outcome([tmp_path / "a.jsonl.zst", tmp_path / "b.jsonl.zst"]) == (["x"], [])


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_file_cut_anywhere_gives_what_is_whole_and_one_fault(tmp_path: Path, kind: str) -> None:
    raw = b"".join(b'{"text": "%d"}\n' % i for i in range(40))
    packed = gzip.compress(raw) if kind == "gz" else in_zstd_frames(raw, 100)
    path = tmp_path / f"a.jsonl.{kind}"
    frames = {len(in_zstd_frames(raw[:n], 100)): n for n in range(100, len(raw), 100)} if kind == "zst" else {}
    for cut in range(2, len(packed)):  # one byte says nothing about the kind
        path.write_bytes(packed[:cut])
        good, bad = outcome([path])
        if cut in frames:  # between two frames a file may end; then only the line is cut
            assert len(bad) == (raw[frames[cut] - 1] != 10) and all("not JSON" in b for b in bad)
        else:
            name = {"gz": "gzip", "zst": "zstd"}[kind]
            assert bad == [f"a.jsonl.{kind}:{len(good) + 1}: the {name} file is cut off"], cut
        assert good == [str(i) for i in range(len(good))]


def test_what_is_not_compressed_is_named(tmp_path: Path) -> None:
    frames = in_zstd_frames(b'{"text": "x"}\n' * 3, 14)
    for name, content, reason in (
        ("a.jsonl.gz", b"plain", "1: not valid gzip (Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n') + b"more", "2: not valid gzip (Not a gzipped file"),
        ("a.jsonl.zst", b"plain text", "1: not valid zstd (zstd decompressor error: Unknown frame descriptor"),
        ("a.jsonl.zst", frames + b"more", "4: not valid zstd (zstd decompressor error: Unknown frame descriptor"),
    ):
        (tmp_path / name).write_bytes(content)
        good, (bad,) = outcome([tmp_path / name])
        assert bad.startswith(f"{name}:{reason}") and good == ["x"] * (int(reason[0]) - 1)


def test_a_line_of_100_mb_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "one"}\n{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\r\n{"text": "two"}\n')
    tracemalloc.start()
    try:
        found = outcome([path], max_bytes=2_000_000), outcome(units([path], 1 << 24), max_bytes=2_000_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    reason = "a.jsonl:2: too long (100000012 bytes, the limit is 2000000)"
    assert found == ((["one", "two"], [reason]),) * 2 and peak < 10_000_000


def test_a_zstd_bomb_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor(level=1).compress(bytes(300_000_000)))
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    try:
        found = outcome([path], max_bytes=1_000_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == ([], ["a.jsonl.zst:1: too long (300000000 bytes, the limit is 1000000)"]) and peak < 100_000_000


def table(texts: Sequence[str | bytes | None], kind: str = "string", key: str = "text") -> pa.Table:
    """A table of two columns with one text per row."""
    return pa.table({"id": range(len(texts)), key: pa.array(texts, kind)})


@pytest.mark.parametrize("kind", ["string", "large_string", "binary"])
def test_parquet_rows_are_documents(tmp_path: Path, kind: str) -> None:
    texts = [text_of(i) + "\0\n🦙" for i in range(95)]
    path = tmp_path / "a.parquet"
    pq.write_table(table([t.encode() for t in texts] if kind == "binary" else texts, kind), path, row_group_size=10)
    assert Found([tmp_path]).files == [path]
    assert outcome([path]) == (texts, [])
    with pq.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(10)]
    cut = units([path], sizes[0] + 1)
    edges = [*(u.start for u in cut), 10]
    assert edges[0] == 0 and cut[-1].stop is None and [u.stop for u in cut[:-1]] == edges[1:-1] and 3 < len(cut) < 8
    held = [sum(sizes[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    assert all(sizes[0] < h < 3 * sizes[0] for h in held[:-1])
    assert sum(u.size for u in cut) == pytest.approx(path.stat().st_size, abs=5)
    assert seen(cut) == seen([path]) == [(f"a.parquet:{i}", t.encode(), "") for i, t in enumerate(texts, 1)]
    assert units([path], 1 << 30) == [Unit(path, 0, None, path.stat().st_size)]


def test_parquet_is_read_by_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{i:09d}" * 1000 for i in range(6000)]  # 54 MB in one row group
    pq.write_table(table(texts), path, row_group_size=1 << 20, use_dictionary=False, data_page_size=1 << 18)
    del texts
    before, most, count = pa.total_allocated_bytes(), 0, 0
    for record in RecordReader([path]):
        most = max(most, pa.total_allocated_bytes() - before)
        assert record.raw == b"%09d" % count * 1000
        count += 1
    assert count == 6000 and most < 12 << 20


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [b"one", None, b"caf\xe9", b"", b"x" * 300, b"a\xed\xa0\x80", "zwölf 🦙".encode()]
    pq.write_table(table(rows, "binary"), path, row_group_size=2)
    for files in ([path], units([path], 1)):
        assert outcome(files, max_bytes=200) == (["one", "zwölf 🦙"], [
            'a.parquet:2: "text" is null',
            "a.parquet:3: not UTF-8 (byte 0xe9 at byte 3)",
            "a.parquet:4: empty text",
            "a.parquet:5: too long (300 bytes, the limit is 200)",
            "a.parquet:6: not UTF-8 (byte 0xed at byte 1)",
        ])  # fmt: skip


def test_bad_parquet_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(["x"], key="body"), path)
    assert outcome([path])[1] == ["a.parquet:1: no column \"text\" (it has id, body; choose with --json-key)"]
    assert seen([path], key="body") == [("a.parquet:1", b"x", "")]
    assert seen([path], key="id")[0][2] == 'column "id" is not text: but int64'
    texts = [text_of(i) * 20 for i in range(200)]
    pq.write_table(table(texts), path, row_group_size=50, use_dictionary=False)
    raw = path.read_bytes()
    for damaged in (b"", b"plain text that is no parquet at all", raw[:-9], raw[: len(raw) // 2]):
        path.write_bytes(damaged)
        for files in ([path], units([path], 1000)):
            good, (bad,) = outcome(files)
            assert good == [] and bad.startswith("a.parquet:1: not valid Parquet (")
    with pq.ParquetFile(pa.BufferReader(raw)) as file:
        middle = file.metadata.row_group(2).column(1).data_page_offset
    path.write_bytes(raw[:middle] + b"\xff" * 200 + raw[middle + 200 :])
    for files in ([path], units([path], 1000)):
        good, (bad,) = outcome(files)
        assert good == texts[:100] + texts[150:]
        assert bad.startswith("a.parquet:101: not valid Parquet (50 rows cannot be read, ")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package in (("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")):
        (tmp_path / name).write_bytes(b"")
        monkeypatch.setitem(sys.modules, "pyarrow.parquet" if package == "pyarrow" else package, None)
        with pytest.raises(DataError, match=f"{name} needs the package {package} .*; pip install {package}"):
            seen([tmp_path / name])


GOOD = [f"{i} {text_of(i)} </s>" for i in range(200)]
MALFORMED = {  # what is planted, and what must be said about it
    b"plain text": "not JSON (Expecting value at column 1)",
    b'{"text": "a"': "not JSON (Expecting ',' delimiter at column 13)",
    b'{"text": "a"} {"text": "b"}': "not JSON (Extra data at column 15)",
    b"[" * 3000: "not JSON (maximum recursion depth exceeded",
    b"[]": 'not a JSON object (but a list; every line must be an object like {"text": "..."})',
    b'"text"': "not a JSON object (but a str;",
    b"{}": 'no key "text" (it has none; choose with --json-key)',
    b'{"body": "a", "n": 1}': "no key \"text\" (it has 'body', 'n'; choose with --json-key)",
    b'{"text": null}': '"text" is not a string (but a NoneType)',
    b'{"text": ["a"]}': '"text" is not a string (but a list)',
    b'{"text": ""}': "empty text",
    b'\xef\xbb\xbf{"text": "a"}': "not JSON (Unexpected UTF-8 BOM (decode using utf-8-sig) at column 1)",
    '{"text": "a"}'.encode("utf-16-le"): "not JSON (Expecting property name enclosed in double quotes at column 2)",
    b'{"text": "a\0b"}': "not JSON (Invalid control character at at column 12)",
    b"\0" * 100: "not JSON (Expecting value at column 1)",
    b'{"text": "a\rb"}': "not JSON (Invalid control character at at column 12)",
    b'{"text": "caf\xe9"}': "not UTF-8 (byte 0xe9 at byte 13)",
    b'{"text": "\xed\xa0\x80"}': "not UTF-8 (byte 0xed at byte 10)",
    b'{"text": "\xc0\x80"}': "not UTF-8 (byte 0xc0 at byte 10)",
    b'{"text": "' + b"y" * 30000 + b'"}': "too long (30012 bytes, the limit is 20000)",
}


def planted(end: bytes) -> tuple[bytes, dict[int, str]]:
    """Good documents with everything malformed between them and blank lines; and the fault of each bad line."""
    lines = [json.dumps({"text": t}, ensure_ascii=i % 2 == 0).encode() for i, t in enumerate(GOOD)]
    bad = {}
    for i, (line, reason) in enumerate(MALFORMED.items()):
        lines.insert(7 * i + 5, line)
        bad[7 * i + 6] = reason
    return b"\xef\xbb\xbf" + end.join(lines) + end * 3, bad


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1 << 30, 5000, 64])
def test_planted_faults_are_reported_exactly(tmp_path: Path, end: bytes, size: int) -> None:
    path = tmp_path / "a.jsonl"
    content, expected = planted(end)
    path.write_bytes(content)
    good, bad = outcome(units([path], size), max_bytes=20000)
    assert good == GOOD
    assert [b.partition(": ")[0] for b in bad] == [f"a.jsonl:{n}" for n in expected]
    assert all(b.partition(": ")[2].startswith(r) for b, r in zip(bad, expected.values(), strict=True))


def test_planted_faults_change_no_other_document(tmp_path: Path, tokenizer_path: Path) -> None:
    content, expected = planted(b"\n")
    (tmp_path / "good.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in GOOD))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(content)
    cut = gzip.compress(b'{"text": "x"}\n' * 9)[:-12]
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(cut)
    (tmp_path / "in" / "c.jsonl.zst").write_bytes(in_zstd_frames(b'{"text": "x"}\n' * 9, 1000)[:-3])
    (tmp_path / "in" / "d.parquet").write_bytes(b"PAR1 and no more")
    lenient = {"max_bad": "100%", "max_bad_per_file": "100%", "skip_bad_files": True}
    summary = preprocess([tmp_path / "in"], tmp_path / "out", tokenizer_path, max_document_bytes=20000, **lenient)
    preprocess([tmp_path / "good.jsonl"], tmp_path / "good", tokenizer_path, strict=True)
    assert documents(tmp_path / "out")[: len(GOOD)] == documents(tmp_path / "good")
    assert summary.losses.skipped.total() == len(expected)
    assert [Path(name).name for name in summary.losses.faults] == ["b.jsonl.gz", "c.jsonl.zst", "d.parquet"]
    folder = tmp_path / "in"
    for example, (line, reason) in zip(summary.losses.examples, expected.items(), strict=False):
        assert example.startswith(f"{folder}/a.jsonl:{line}: {reason}")
    first = next(iter(expected.items()))
    with pytest.raises(DataError) as error:
        preprocess([folder], tmp_path / "no", tokenizer_path, strict=True, max_document_bytes=20000)
    assert str(error.value).startswith(f"{folder}/a.jsonl:{first[0]}: {first[1]}")


def test_a_record_of_a_whole_file_has_no_line() -> None:
    assert place(Record("a/b.txt", 0, b"x")) == "a/b.txt" and place(Record("a/b.jsonl", 4, b"x")) == "a/b.jsonl:4"


LINES = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=20).map(lambda t: json.dumps({"text": t}).encode()),
    st.text(max_size=20).map(lambda t: json.dumps({"a": [1e400, 10**30], "text": t}, ensure_ascii=False).encode()),
    st.sampled_from([
        b'{"text": "\\ud800"}', b'{"text": "\\ud83e\\udd99"}', b'{"text": "a", "text": "b"}', b'{"text": NaN}',
        b'{"text": "x", "y": NaN}', b'{"text": "x", "y": 123456789012345678901234567890}', b'{"text": ""}',
        b'{"text": "\x00"}', b'{"text": "\\u0000"}', b' {"text" : "x"} ', b'{"text": "x"} more',
        b'["text"]', b"[" * 5000, b'{"text": "\xff"}',
    ]),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(LINES)
def test_the_quick_parser_changes_nothing(line: bytes) -> None:
    """With and without orjson: the same text, or the same reason."""

    def result() -> Any:
        try:
            return parse(Record("a.jsonl", 1, line))
        except BadRecord as error:
            return str(error)

    assert readers._orjson is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_orjson", None)
        slow = result()
    assert result() == slow


def test_what_is_as_long_as_may_be_is_read(tmp_path: Path) -> None:
    """The limit is of the document's bytes as they are read: a line of JSON, a value of Parquet, a text file."""
    for extra, fault in ((0, []), (1, ["too long (51 bytes, the limit is 50)"])):
        text = "x" * (50 + extra)
        (tmp_path / "a.txt").write_text(text)
        line = json.dumps({"text": "y" * (38 + extra)})
        (tmp_path / "b.jsonl").write_text(f"{line}\n")
        (tmp_path / "c.jsonl").write_text(line)
        pq.write_table(table([text]), tmp_path / "d.parquet")
        for name in ("a.txt", "b.jsonl", "c.jsonl", "d.parquet"):
            good, bad = outcome([tmp_path / name], max_bytes=50)
            assert [reason.partition(": ")[2] for reason in bad] == fault and len(good) == 1 - extra, name


def test_how_far_a_unit_of_parquet_is_read(tmp_path: Path) -> None:
    """In the middle of a file as at its beginning: the share of the unit's own rows."""
    pq.write_table(table([text_of(i) for i in range(90)]), tmp_path / "a.parquet", row_group_size=30)
    cut = units([tmp_path / "a.parquet"], 1)
    assert [(unit.start, unit.stop) for unit in cut] == [(0, 1), (1, 2), (2, None)]
    for unit in cut:
        reader = RecordReader([unit])
        assert [reader.bytes_done for _ in reader] == [unit.size * i // 30 for i in range(1, 31)]
