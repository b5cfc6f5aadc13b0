"""What is lost: files that cannot be read end the work, bad records are shares; what a format allows is read."""

from __future__ import annotations

import errno
import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megallama.config.errors import DataError
from megallama.text import documents
from megallama.text.documents import RecordReader
from megallama.text.inputs import Losses
from megallama.text.preprocess import preprocess
from megallama.text.train_tokenizer import train_tokenizer

GOOD = b'{"text": "one"}\n'


def read(files: Sequence[Path], **limits: Any) -> tuple[list[str], Losses]:
    """The good texts, and what was lost. Raises: DataError if that is too much."""
    losses = Losses(**limits)
    return [text for _, text in losses.texts(RecordReader(files))], losses


def refused(files: Sequence[Path], **limits: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(files, **limits)
    return str(caught.value)


@pytest.mark.parametrize("good, bad, empty, stops", [
    (1, 0, 0, ""), (1, 1, 0, ""), (2, 1, 0, ""), (1, 2, 0, "2 of 3 records"), (1, 3, 0, "3 of 4 records"),
    (0, 1, 0, "none of 1 record can be used"), (0, 3, 2, "none of 5 records can be used"), (0, 0, 1, ""),
    (0, 0, 5, "5 of 5 records are bad; empty text"),
    (999, 1, 0, ""), (998, 2, 0, "2 of 1,000 records"), (3996, 4, 0, ""), (3995, 5, 0, "5 of 4,000 records"),
    (90, 0, 10, ""), (90, 1, 0, ""), (89, 0, 11, "11 of 100 records are bad; empty text"), (1, 0, 1, ""),
    (1, 0, 3, "3 of 4 records are bad; empty text"),
])  # fmt: skip
def test_shares_of_all_and_of_one_file(tmp_path: Path, good: int, bad: int, empty: int, stops: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * good + b"x\n" * bad + b'{"text": ""}\n' * empty)
    if stops:
        assert stops in refused([path])
        return
    texts, losses = read([path])
    assert len(texts) == good and losses.skipped.total() == bad + empty and losses.records == good + bad + empty
    assert losses.lines()[0].startswith(
        f"skipped {bad + empty} bad record{'s' * (bad + empty != 1)} of {good + bad + empty:,} record"
    )
    assert "(allowed are 0.1% in all and 10% of one file)" in losses.lines()[0]


def test_one_bad_file_among_many_good_ones(tmp_path: Path) -> None:
    """3 bad records of 10,025 are few of all, but 12 % of their file."""
    (tmp_path / "a.jsonl").write_bytes(GOOD * 10_000)
    (tmp_path / "b.jsonl").write_bytes(GOOD * 22 + b"{}\n" * 3)
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert f"{tmp_path}/b.jsonl: 3 of 25 records are bad; no key" in refused(files)
    assert read(files, max_bad_per_file="12%")[1].skipped == {'no key "text"': 3}
    assert read(files, max_bad_per_file="3")[1].bad == 3
    assert "3 of 25 records" in refused(files, max_bad_per_file="2") and "3 of 10,025" in refused(files, max_bad="2")


@pytest.mark.parametrize("limit", ["many", "-1", "101%", "%", "1.5", "-2%", "nan%", "inf%", " "])
@pytest.mark.parametrize("name", ["max_bad", "max_bad_per_file"])
def test_limits_that_are_none(limit: str, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}='{limit}' is neither a number of records nor a share such as 5%"):
        Losses(**{name: limit})


def pretty(rows: list[dict[str, str]]) -> bytes:
    return "\n".join(json.dumps(row, indent=2) for row in rows).encode()


ROWS = [{"text": f"number {i}", "meta": "x"} for i in range(50)]
ONE_EACH = b"[\n" + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]\n"
MISTAKES: list[tuple[str, bytes, str]] = [
    ("a.json", json.dumps(ROWS).encode(), "it is a JSON array, not one object per line; convert it: jq -c '.[]'"),
    ("a.json", json.dumps(ROWS, indent=1).encode(), "it is a JSON array"),
    ("a.jsonl", ONE_EACH, "it is a JSON array"),
    ("a.jsonl.gz", gzip.compress(ONE_EACH), "it is a JSON array"),
    ("a.json", pretty(ROWS), "its JSON objects go over several lines"),
    ("a.json", pretty(ROWS[:1]), "its JSON objects go over several lines, not one per line; convert it: jq -c ."),
    ("a.json", b"\xef\xbb\xbf" + pretty(ROWS[:1]), "its JSON objects go over several lines"),
    ("a.json", json.dumps({"data": ROWS}).encode(), "no key \"text\" (it has 'data'; choose with --json-key)"),
    ("a.jsonl", b"id,text\n1,one\n2,two\n", "it seems to be a table (CSV), not JSON lines"),
    ("a.jsonl", b"id\ttext\n1\tone\n2\ttwo\n", "it seems to be a table (CSV), not JSON lines"),
    ("a.jsonl", GOOD.decode().encode("utf-16") * 3, "it is UTF-16 or UTF-32; convert it to UTF-8: iconv"),
    ("a.jsonl", GOOD.decode().encode("utf-16-le") * 3, "it is UTF-16 or UTF-32"),
    ("a.jsonl", GOOD.decode().encode("utf-32"), "it is UTF-16 or UTF-32"),
    ("a.txt", "zwölf".encode("utf-16"), "it is UTF-16 or UTF-32; convert it to UTF-8: iconv"),
    ("a.txt", "zwölf".encode("latin-1"), "not UTF-8 (byte 0xf6 at byte 2)"),
    ("a.jsonl", '{"text": "zwölf"}\n'.encode("latin-1") * 9, "not UTF-8 (byte 0xf6 at byte 12)"),
    ("a.jsonl", b'{"body": "one"}\n' * 9, "no key \"text\" (it has 'body'; choose with --json-key)"),
    ("a.txt", b"\x7fELF\0\0\0\0\0", "a NUL character in plain text (at character 4; is it a binary file?)"),
]


@pytest.mark.parametrize("name, raw, why", MISTAKES, ids=[f"{i} {why[:24]}" for i, (_, _, why) in enumerate(MISTAKES)])
def test_a_file_of_another_form_ends_the_work_and_is_said(tmp_path: Path, name: str, raw: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(raw)
    (tmp_path / "b.jsonl").write_bytes(GOOD * 2000)
    files = [tmp_path / name, tmp_path / "b.jsonl"]
    text = refused(files)
    assert f"{tmp_path}/{name}: " in text and why in text, text
    if "can be used" in text:  # else some line of it is an object all the same
        assert text.startswith("1 file cannot be read:\n  ") and "--skip-bad-files" in text
        texts, losses = read(files, skip_files=True)
        assert texts == ["one"] * 2000 and [*losses.faults] == [str(files[0])]
        assert losses.lines()[-1].startswith(f"left out what cannot be read of {tmp_path}/{name}: none of ")


def test_all_files_that_cannot_be_read_are_named(tmp_path: Path, tokenizer_path: Path) -> None:
    """In every reader, and with the option what can be read of them is used."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(GOOD * 50)
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(999)))[:-1500])
    (folder / "cut.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(GOOD * 99)[:-3])
    (folder / "no.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pa.table({"body": ["x"]}), folder / "other.parquet")
    names = ("cut.jsonl.gz: the gzip file is cut off", "cut.jsonl.zst: the zstd file is cut off",
             "no.parquet: not valid Parquet", 'other.parquet: no column "text" (it has body; choose')  # fmt: skip
    for work in (lambda: preprocess([folder], tmp_path / "o", tokenizer_path, workers=2),
                 lambda: train_tokenizer([folder], tmp_path / "t.model", 300)):  # fmt: skip
        with pytest.raises(DataError) as caught:
            work()
        assert str(caught.value).startswith("4 files cannot be read:\n")
        assert all(f"\n  {folder}/{name}" in str(caught.value) for name in names), caught.value
        assert not list(tmp_path.glob("o.*n")) and not list(tmp_path.glob("t*"))
    assert (tmp_path / "o.parts").is_dir()  # what is done serves the next start
    output = preprocess([folder], tmp_path / "o", tokenizer_path, skip_bad_files=True)
    assert len(output.losses.faults) == 4 and output.outputs[0].num_documents > 100
    losses = Losses(skip_files=True)
    train_tokenizer([folder], tmp_path / "t.model", 276, losses=losses)
    assert losses.faults == output.losses.faults and losses.records == output.outputs[0].num_documents


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("when", ["open", "read"])
def test_an_io_error_is_no_bad_record(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, when: str
) -> None:
    """It ends the run with the file's name; when it has passed, the same command goes on and loses nothing."""
    (tmp_path / "a.jsonl").write_bytes(GOOD * 500)
    (tmp_path / "b.txt").write_bytes(b"two")
    pure = Path.open

    class Faulty:
        def __init__(self, raw: Any) -> None:
            self.raw = raw

        def __enter__(self) -> Faulty:
            return self

        def __exit__(self, *arguments: object) -> None:
            self.raw.close()

        def __getattr__(self, name: str) -> Any:
            raise OSError(code, os.strerror(code))

    def opened(self: Path, *arguments: Any, **more: Any) -> Any:
        if self.name != "b.txt":
            return pure(self, *arguments, **more)
        if when == "open":
            raise OSError(code, os.strerror(code), str(self))
        return Faulty(pure(self, *arguments, **more))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        expected = rf"1 file cannot be read:\n  {tmp_path}/b.txt: cannot be read .{os.strerror(code)}."
        with pytest.raises(DataError, match=expected):
            preprocess([tmp_path / "a.jsonl", tmp_path / "b.txt"], tmp_path / "o", tokenizer_path)
        assert refused([tmp_path / "a.jsonl", tmp_path / "b.txt"]).startswith("1 file cannot be read")
    summary = preprocess([tmp_path / "a.jsonl", tmp_path / "b.txt"], tmp_path / "o", tokenizer_path)
    assert summary.outputs[0].num_documents == 501


def test_a_file_that_vanishes_is_no_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    reader, losses = RecordReader([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]), Losses()
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"b.jsonl: cannot be read .No such file or directory."):
        list(losses.texts(reader))


KINDS: dict[str, Any] = {
    "string": pa.string(), "large_string": pa.large_string(), "binary": pa.binary(), "large_binary": pa.large_binary(),
    "string_view": pa.string_view(), "binary_view": pa.binary_view(), "fixed": pa.binary(4),
    "dictionary": pa.dictionary(pa.int32(), pa.string()), "JSON": pa.json_(pa.string()),
    "large dictionary": pa.dictionary(pa.int8(), pa.large_string()),
    "binary dictionary": pa.dictionary(pa.int16(), pa.binary()),
    "fixed binary dictionary": pa.dictionary(pa.int8(), pa.binary(4)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_type_of_parquet_is_read(tmp_path: Path, kind: str) -> None:
    texts = ["äbc", "1234", "äbc", "\0\0\0\0"] * 30
    held = KINDS[kind]
    inner = held.value_type if pa.types.is_dictionary(held) else held
    raw = [text.encode() for text in texts] if "binary" in str(inner) else texts
    values = pa.array(raw, inner)
    column = values.dictionary_encode().cast(held) if pa.types.is_dictionary(held) else values
    pq.write_table(pa.table({"text.a": texts, "text": column}), tmp_path / "a.parquet", row_group_size=50)
    assert read([tmp_path / "a.parquet"])[0] == texts


@pytest.mark.parametrize("column, why", [
    (pa.array([1]), "is not text (but int64)"), (pa.array([["a"]]), "is not text (but list<"),
    (pa.nulls(1), "is not text (but null)"), (pa.array([{"a": "b"}]), "is not text (but struct<"),
])  # fmt: skip
def test_other_types_of_parquet_are_named(tmp_path: Path, column: Any, why: str) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert why in refused([tmp_path / "a.parquet"])


def zstd(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(raw)


SKIPPABLE = b"\x5a\x2a\x4d\x18\x05\0\0\0abcde"


def test_every_frame_and_window_of_zstd_is_read(tmp_path: Path) -> None:
    streamed = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False)
    content = streamed.compress(GOOD * 3) + SKIPPABLE + zstd(b"") + zstd(GOOD * 2) + SKIPPABLE * 2 + zstd(GOOD)
    content += SKIPPABLE
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    assert read([tmp_path / "a.jsonl.zst"])[0] == ["one"] * 6
    for log in (28, 31):  # zstd --long=31; a frame of unknown size keeps the whole window in its header
        with (tmp_path / "b.jsonl.zst").open("wb") as file:
            arguments = {"window_log": log, "compression_level": 1, "write_content_size": False}
            parameters = zstandard.ZstdCompressionParameters(**arguments)
            compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
            file.write(compressor.compress(GOOD * 9) + compressor.flush())
        assert read([tmp_path / "b.jsonl.zst"])[0] == ["one"] * 9
    (tmp_path / "b.jsonl.zst").write_bytes(content + SKIPPABLE[:-2])
    assert "the zstd file is cut off" in refused([tmp_path / "b.jsonl.zst"])


def test_every_member_of_gzip_and_its_padding_are_read(tmp_path: Path) -> None:
    members = gzip.compress(GOOD * 2) + gzip.compress(b"") + gzip.compress(GOOD) + bytes(512)
    (tmp_path / "a.jsonl.gz").write_bytes(members + gzip.compress(GOOD) + bytes(3))
    assert read([tmp_path / "a.jsonl.gz"])[0] == ["one"] * 4


@pytest.mark.parametrize("quick", [True, False])
def test_every_json_string_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool) -> None:
    """NUL stays; half of a surrogate pair, which is no character, becomes U+FFFD, and that is said."""
    if not quick:
        monkeypatch.setattr(documents, "_orjson", None)
    lines = {
        r'{"text": "a\u0000b"}': "a\0b", r'{"text": "\ud83e\udd99"}': "🦙", r'{"text": "a\ud83e"}': "a\ufffd",
        r'{"text": "\udd99\ud83e."}': "\ufffd\ufffd.", r'{"text": "\ud83e\ud83e\udd99"}': "\ufffd🦙",
        r'{"text": "\"\\\/\b\f\n\r\t"}': '"\\/\b\f\n\r\t', '{"n": 1' + "0" * 5000 + ', "text": "x"}': "x",
        '{"t\\u0065xt": "y"}': "y", '{"text": "\x7f\u2028\ufeff"}': "\x7f\u2028\ufeff",
    }  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    texts, losses = read([tmp_path / "a.jsonl"])
    assert texts == [*lines.values()] and not losses.skipped
    changed = "half of a surrogate pair, which no text can hold, is U+FFFD now"
    assert losses.changed == {changed: 3} and losses.lines()[-1] == f"changed 3 records: {changed}"


def test_every_file_without_a_good_record_says_why(tmp_path: Path, tokenizer_path: Path) -> None:
    """However many bad records came before it in the same task; only the first of all are described one by one."""
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" * 30)
    (tmp_path / "b.jsonl").write_bytes(b"x\n" * 3)
    (tmp_path / "c.jsonl").write_bytes(GOOD * 9)
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    with pytest.raises(DataError) as caught:
        preprocess(files, tmp_path / "o", tokenizer_path)
    assert f"\n  {tmp_path}/a.jsonl: none of 30 records can be used: no key" in str(caught.value)
    assert f"\n  {tmp_path}/b.jsonl: none of 3 records can be used: not JSON (Expecting value" in str(caught.value)
    summary = preprocess(files, tmp_path / "o", tokenizer_path, skip_bad_files=True)
    assert len(summary.losses.examples) == 20 and summary.losses.skipped == {'no key "text"': 30, "not JSON": 3}


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet"])
def test_what_is_packed_under_another_name_is_called_so(kind: str, tmp_path: Path) -> None:
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.jsonl")
    else:
        pack = gzip.compress if kind == "gz" else zstandard.ZstdCompressor().compress
        (tmp_path / "a.jsonl").write_bytes(pack(GOOD * 9))
    with pytest.raises(DataError, match="none of . records? can be used: it is packed, or Parquet; its name must say"):
        read([tmp_path / "a.jsonl"])


def test_a_name_with_a_colon_is_named_whole(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    reader, losses = RecordReader([tmp_path / "a.parquet"], json_key="a: b"), Losses(skip_files=True)
    assert [*losses.texts(reader)] == []
    assert [*losses.faults.values()] == ['no column "a: b" (it has text; choose with --json-key)']
