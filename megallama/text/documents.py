"""Reading documents out of files as streams, in a fixed order, every fault named by file and line.

JSON lines and plain text, each also as .gz or .zst, and Parquet.  `units` cuts a corpus into pieces of work, which
`RecordReader` reads: all of them in order give the records of the files in order.  `parse` takes records apart.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from megallama.data.errors import DataError
from megallama.text.files import JSON_SUFFIXES, suffix_of

EMPTY = "empty text"
HALVES = "half of a surrogate pair, which no text can hold, is U+FFFD now"
TEXT_TYPE = re.compile("(large_)?(string|binary)(_view)?$|fixed_size_binary")  # of Parquet
MAX_DOCUMENT_BYTES = 16 << 20
CHUNK = 1 << 20
_orjson: Any = None
with suppress(ImportError):
    _orjson = importlib.import_module("orjson")


class Record(NamedTuple):
    """One raw document: a line of JSON, a row of Parquet, or a text file (line 0); `fault`: why it is none.

    `whole`: the file cannot be read, or no further.  Lines count from 1 at byte `origin`, that of the unit: `place`
    knows the true line.
    """

    file: str
    line: int
    raw: bytes
    fault: str = ""
    origin: int = 0
    whole: bool = False


class Unit(NamedTuple):
    """The lines that begin in bytes [start, stop) of a file; of Parquet, row groups [start, stop)."""

    file: Path
    start: int
    stop: int | None  # None: to the end
    size: int  # bytes on disk


class BadRecord(Exception):
    """A record that holds no usable text: what is wrong, and the particulars of this one."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind} ({detail})" if detail else kind)
        self.kind = kind


class _Damaged(Exception):
    """A file that cannot be read on; the text is the fault of its last record."""


def place(record: Record) -> str:
    """FILE:LINE of a record, or FILE for a text file; counts the lines before a unit inside a file."""
    if not record.line:
        return record.file
    line, left = record.line, record.origin
    if left:
        with open(record.file, "rb") as raw:
            while left and (chunk := raw.read(min(CHUNK, left))):
                line, left = line + chunk.count(b"\n"), left - len(chunk)
    return f"{record.file}:{line}"


def _library(name: str, file: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise DataError(f"{file} needs the package {package} to be read; pip install {package}") from None


def units(files: Sequence[Path], unit_bytes: int) -> list[Unit]:
    """Cut files into units of about `unit_bytes`, in the order of the files.

    Plain JSON lines are cut anywhere, Parquet at row groups; compressed files and text files stay whole.
    """
    out = []
    for file in files:
        whole, cuts, groups = file.stat().st_size, [0], list[int]()
        if file.suffix.lower() in JSON_SUFFIXES:
            cuts = [*range(0, whole, unit_bytes)] or cuts
        elif suffix_of(file) == ".parquet":
            groups, held = _row_groups(file), 0
            for number, size in enumerate(groups):
                if held >= unit_bytes:
                    cuts, held = [*cuts, number], 0
                held += size
        for start, stop in zip(cuts, [*cuts[1:], None], strict=True):
            share = whole * sum(groups[start:stop]) // max(sum(groups), 1) if groups else (stop or whole) - start
            out.append(Unit(file, start, stop, share if len(cuts) > 1 else whole))
    return out


def _parquet(file: Path) -> Any:
    """An open file that is read by pages and not by row groups, which may be gigabytes."""
    parquet = _library("pyarrow.parquet", file)
    try:
        return parquet.ParquetFile(file, pre_buffer=False, buffer_size=CHUNK)
    except Exception as error:  # arrow has errors of many kinds here, all of them about this file
        if isinstance(error, OSError) and error.errno:
            raise _Damaged(f"cannot be read: {os.strerror(error.errno)}") from None
        raise _Damaged(f"not valid Parquet: {error}") from None


def _row_groups(file: Path) -> list[int]:
    """The bytes of each row group; none where the file is damaged, which reading it will report."""
    try:
        with _parquet(file) as opened:
            meta = opened.metadata
            return [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
    except _Damaged:
        return []


class _Zstd(io.RawIOBase):
    """Decompresses zstd frames; the library's own reader takes a file that is cut off for whole."""

    def __init__(self, raw: BinaryIO, library: Any) -> None:
        self._pieces, self._ready = self._decompress(raw, library), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._ready:
            self._ready = next(filter(None, self._pieces), self._ready)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decompress(self, raw: BinaryIO, library: Any) -> Iterator[memoryview]:
        frame, data = None, b""
        # little at a time: what decompresses to thousands of times its size must not fill the memory
        while data := data or raw.read(1024):
            frame = frame or library.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                yield memoryview(frame.decompress(data))
            except library.ZstdError as error:
                raise _Damaged(f"not valid zstd: {error}") from None
            frame, data = (None, frame.unused_data) if frame.eof else (frame, b"")
        if frame:
            raise EOFError


def _decompressed(raw: BinaryIO, file: Path) -> BinaryIO:
    """The content of an open file."""
    kind = file.suffix.lower()
    if kind == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    return io.BufferedReader(_Zstd(raw, _library("zstandard", file)), 1 << 16) if kind == ".zst" else raw


def head_of(file: str) -> bytes:
    """The first 64 KiB of a file's content, or what can be read of them."""
    head = b""
    with suppress(OSError, EOFError, zlib.error, _Damaged), open(file, "rb") as raw:
        stream = _decompressed(raw, Path(file))
        while len(head) < CHUNK >> 4 and (more := stream.read(1024)):
            head += more
    return head


class RecordReader:
    """The records of files, or of units of them, in order.

    `bytes_done` of `bytes_total` on disk are read. `json_key`: the column of Parquet files.
    """

    def __init__(
        self, files: Sequence[Path | Unit], max_bytes: int = MAX_DOCUMENT_BYTES, json_key: str = "text"
    ) -> None:
        self.units = [file if isinstance(file, Unit) else Unit(file, 0, None, file.stat().st_size) for file in files]
        self.max_bytes, self.json_key = max_bytes, json_key
        self.bytes_total, self.bytes_done = sum(unit.size for unit in self.units), 0
        self._read_of_unit = 0  # bytes on disk

    def __iter__(self) -> Iterator[Record]:
        finished = 0
        for unit in self.units:
            line, fault = 0, ""
            try:
                for record in self._read(unit):
                    line = record.line
                    self.bytes_done = finished + min(self._read_of_unit, unit.size)
                    yield record
            except EOFError:
                fault = f"the {'gzip' if unit.file.suffix.lower() == '.gz' else 'zstd'} file is cut off"
            except (gzip.BadGzipFile, zlib.error) as error:
                fault = f"not valid gzip: {error}"
            except _Damaged as error:
                fault = str(error)
            except OSError as error:
                fault = f"cannot be read: {error.strerror}"
            if fault:
                yield Record(str(unit.file), line + 1, b"", fault, whole=True)
            finished += unit.size
            self.bytes_done = finished

    def _read(self, unit: Unit) -> Iterator[Record]:
        if suffix_of(unit.file) == ".parquet":
            yield from self._rows(unit)
            return
        with unit.file.open("rb", 1 << 17) as raw:
            stream = _decompressed(raw, unit.file)
            if suffix_of(unit.file) not in JSON_SUFFIXES:
                record = self._whole(stream, str(unit.file))
                self._read_of_unit = raw.tell()
                yield record
                return
            for record, position in self._lines(stream, unit):
                self._read_of_unit = position - unit.start if stream is raw else raw.tell()
                yield record

    def _lines(self, stream: BinaryIO, unit: Unit) -> Iterator[tuple[Record, int]]:
        """The lines that begin in the unit, each with the byte after it; blank ones only count."""
        name, number, limit, position = str(unit.file), 0, self.max_bytes + 1, unit.start
        stop = float("inf") if unit.stop is None else unit.stop
        if position:  # the line that byte start - 1 is in began before: it is another unit's
            stream.seek(position - 1)
            position += self._skip(stream)[0] - 1
        origin = position
        while position < stop and (raw := stream.readline(limit)):
            number, position, fault = number + 1, position + len(raw), ""
            if len(raw) == limit and raw[-1] != 10:
                rest, end = self._skip(stream)
                position += rest
                raw, fault = b"", self._too_long(limit + rest - end)
            if fault or raw.strip():
                line = raw.rstrip(b"\r\n")
                line = line if origin or number > 1 else line.removeprefix(b"\xef\xbb\xbf")
                yield Record(name, number, line, fault, origin), position

    def _skip(self, stream: BinaryIO) -> tuple[int, int]:
        """Skip the rest of a line of any length in bounded memory: its bytes, and how many end it."""
        size, rest = 0, b""
        while not rest.endswith(b"\n") and (rest := stream.readline(CHUNK)):
            size += len(rest)
        return size, len(rest) - len(rest.rstrip(b"\r\n"))

    def _whole(self, stream: BinaryIO, name: str) -> Record:
        raw = stream.read(self.max_bytes + 1)
        size = len(raw)
        if size <= self.max_bytes:
            return Record(name, 0, raw.removeprefix(b"\xef\xbb\xbf"))
        while rest := stream.read(CHUNK):
            size += len(rest)
        return Record(name, 0, b"", self._too_long(size))

    def _rows(self, unit: Unit) -> Iterator[Record]:
        """The rows of the column `json_key` in the unit's row groups, about CHUNK bytes at a time."""
        name, key, arrow = str(unit.file), self.json_key, _library("pyarrow", unit.file)
        with _parquet(unit.file) as file:
            meta, schema = file.metadata, file.schema_arrow
            if schema.names.count(key) != 1:
                many = "more than one" if key in schema.names else "no"
                raise _Damaged(f'{many} column "{key}": it has {", ".join(schema.names[:5])}; choose with --json-key')
            kind = schema.field(key).type
            plain = kind.value_type if arrow.types.is_dictionary(kind) else getattr(kind, "storage_type", kind)
            if not TEXT_TYPE.match(str(plain)):
                raise _Damaged(f'column "{key}" is not text: but {kind}')
            rows = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
            before, total = sum(rows[: unit.start]), sum(rows[unit.start : unit.stop])
            line = before
            for group in range(len(rows))[unit.start : unit.stop]:  # a damaged one takes no other with it
                end, size = line + rows[group], max(meta.row_group(group).total_byte_size, 1)
                batch_size = max(1, min(4096, CHUNK * rows[group] // size))
                try:
                    for batch in file.iter_batches(batch_size, [group], [key], use_threads=False):
                        for raw in batch.column(key).cast(arrow.large_binary()).to_pylist():
                            line, fault = line + 1, f'"{key}" is null' if raw is None else ""
                            if raw is not None and len(raw) > self.max_bytes:
                                raw, fault = b"", self._too_long(len(raw))
                            self._read_of_unit = unit.size * (line - before) // total
                            yield Record(name, line, raw or b"", fault)
                except (arrow.ArrowException, OSError) as error:
                    fault = f"not valid Parquet: {end - line} rows cannot be read, {error}"
                    yield Record(name, line + 1, b"", fault, whole=True)
                line = end

    def _too_long(self, size: int) -> str:
        return f"too long: {size} bytes, the limit is {self.max_bytes}"


def parse(record: Record, json_key: str = "text") -> tuple[str, int, str]:
    """The text of a record, its size in UTF-8 bytes, and what was changed in it. Raises: BadRecord."""
    if record.fault:
        raise BadRecord(*record.fault.split(": ", 1))
    suffix, changed = suffix_of(record.file), ""
    if suffix in JSON_SUFFIXES and _orjson:  # what it sees anything wrong with, json is to explain
        with suppress(ValueError):
            value = _orjson.loads(record.raw)
            if isinstance(value, dict) and isinstance(text := value.get(json_key), str) and text:
                return text, len(text.encode()), ""
    try:
        text = record.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f"byte 0x{record.raw[error.start]:02x} at byte {error.start}") from None
    if suffix in JSON_SUFFIXES:
        text, halves = re.subn("[\ud800-\udfff]", "\ufffd", _text_of_json(text, json_key))
        changed = HALVES if halves else ""
    elif "\0" in text and suffix != ".parquet":
        raise BadRecord("a NUL character in plain text", f"at character {text.index(chr(0))}; is it a binary file?")
    if not text:
        raise BadRecord(EMPTY)
    return text, len(text.encode("utf-8")), changed


def _text_of_json(line: str, key: str) -> str:
    try:
        value = json.loads(line, parse_int=lambda digits: int(digits[:4000]))  # longer ones raise
    except json.JSONDecodeError as error:
        raise BadRecord("not JSON", f"{error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("not JSON", str(error)) from None
    if not isinstance(value, dict):
        expected = f'every line must be an object like {{"{key}": "..."}}'
        raise BadRecord("not a JSON object", f"but a {type(value).__name__}; {expected}")
    if key not in value:
        keys = ", ".join(map(repr, list(value)[:5])) or "none"
        raise BadRecord(f'no key "{key}"', f"it has {keys}; choose with --json-key")
    if not isinstance(value[key], str):
        raise BadRecord(f'"{key}" is not a string', f"but a {type(value[key]).__name__}")
    return value[key]
