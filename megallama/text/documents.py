"""Reading documents out of files, streaming and in a fixed order, with every fault named by file and line.

JSON lines and plain text, each also as .gz or .zst, and Parquet.  A corpus is cut into units of work (`units`): a part
of a plain JSON lines file, some row groups of a Parquet file, or a whole file; `RecordReader` reads any of them, and
all units in order give the records of the files in order.  Reading is separate from parsing (`parse`, per record).
"""

from __future__ import annotations

import functools
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


class Record(NamedTuple):
    """One raw document: a line of JSON, a row of Parquet, or a whole text file (line 0); `fault` says why it is none.

    `whole`: the file cannot be read, or no further.  Lines count from 1 at byte `origin`, which is not 0 where a unit
    begins inside a file: `place` knows the true line.
    """

    file: str
    line: int
    raw: bytes
    fault: str = ""
    origin: int = 0
    whole: bool = False


class Unit(NamedTuple):
    """A piece of work: the lines that begin in bytes [start, stop) of a file; of Parquet row groups [start, stop)."""

    file: Path
    start: int = 0
    stop: int | None = None  # to the end

    @property
    def size(self) -> int:
        """Its bytes on disk."""
        whole = self.file.stat().st_size
        if not self.start and self.stop is None:
            return whole
        if suffix_of(self.file) == ".parquet":
            groups = _row_groups(self.file)
            return whole * sum(groups[self.start : self.stop]) // max(sum(groups), 1)
        return min(whole, self.stop or whole) - self.start


class BadRecord(Exception):
    """A record that holds no usable text: `kind` is what is wrong, `detail` the particulars of this one."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind} ({detail})" if detail else kind)
        self.kind, self.detail = kind, detail


class BadFile(BadRecord):
    """A file that cannot be read, or not beyond this place."""


class _Damaged(Exception):
    """A file that cannot be read on; the text is the fault of its last record."""


def place(record: Record) -> str:
    """FILE:LINE of a record, or FILE for a whole file; for a unit inside a file it counts the lines before it."""
    if not record.line:
        return record.file
    line, left = record.line, record.origin
    if left:
        with open(record.file, "rb") as raw:
            while left and (chunk := raw.read(min(CHUNK, left))):
                line, left = line + chunk.count(b"\n"), left - len(chunk)
    return f"{record.file}:{line}"


def _library(name: str, package: str, file: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"{file} needs the package {package} to be read; pip install {package}") from None


def units(files: Sequence[Path], unit_bytes: int) -> list[Unit]:
    """Cut files into units of about `unit_bytes` in the order of the files, to be read by different processes.

    Plain JSON lines are cut anywhere, Parquet at its row groups; compressed files and text files stay whole.
    """
    out = []
    for file in files:
        cuts = [0]
        if file.suffix.lower() in JSON_SUFFIXES:
            cuts = [*range(0, file.stat().st_size, unit_bytes)] or [0]
        elif suffix_of(file) == ".parquet":
            cuts, sizes = [], [unit_bytes]
            for number, size in enumerate(_row_groups(file)):
                if sum(sizes) >= unit_bytes:
                    cuts, sizes = [*cuts, number], []
                sizes.append(size)
        stops: list[int | None] = [*cuts[1:], None]
        out += [Unit(file, start, stop) for start, stop in zip(cuts or [0], stops, strict=False)]
    return out


def _parquet(file: Path) -> Any:
    """A Parquet file opened so that it is read by pages and not by row groups, which may be gigabytes."""
    parquet = _library("pyarrow.parquet", "pyarrow", file)
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
    """Decompresses zstd frames, one after the other."""

    def __init__(self, raw: BinaryIO, library: Any) -> None:
        self._raw, self._library = raw, library
        self._frame: Any = None
        self._rest, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            # little at a time: bytes that decompress to thousands of times their size must not fill the memory
            data = self._rest or self._raw.read(1024)
            if not data and self._frame:
                raise EOFError
            if not data:
                return 0
            frame = self._frame or self._library.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self._ready = memoryview(frame.decompress(data))
            except self._library.ZstdError as error:
                raise _Damaged(f"not valid zstd: {error}") from None
            self._frame, self._rest = (None, frame.unused_data) if frame.eof else (frame, b"")
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _decompressed(raw: BinaryIO, file: Path) -> BinaryIO:
    """The content of an open file."""
    kind = file.suffix.lower()
    if kind == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    return io.BufferedReader(_Zstd(raw, _library("zstandard", "zstandard", file)), 1 << 16) if kind == ".zst" else raw


def head_of(file: str) -> bytes:
    """The first 64 KiB of a file's content, or what can be read of them."""
    head = b""
    with suppress(OSError, EOFError, zlib.error, _Damaged), open(file, "rb") as raw:
        stream = _decompressed(raw, Path(file))
        while len(head) < CHUNK >> 4 and (more := stream.read(1024)):
            head += more
    return head


class RecordReader:
    """Iterates over the records of files, or of units of them, in order.

    It has read `bytes_done` of `bytes_total` (on disk). `json_key` is the column of Parquet files; JSON lines are taken
    apart by `parse`.
    """

    def __init__(
        self,
        files: Sequence[Path | Unit],
        max_bytes: int = MAX_DOCUMENT_BYTES,
        json_key: str = "text",
    ) -> None:
        self.units = [file if isinstance(file, Unit) else Unit(file) for file in files]
        self.max_bytes, self.json_key = max_bytes, json_key
        self._sizes = [unit.size for unit in self.units]
        self.bytes_total, self.bytes_done = sum(self._sizes), 0

    def __iter__(self) -> Iterator[Record]:
        finished = 0
        for unit, size in zip(self.units, self._sizes, strict=True):
            line, name = 0, str(unit.file)
            kind = {".gz": "gzip", ".zst": "zstd"}.get(unit.file.suffix.lower(), "")
            try:
                for record, done in self._read(unit, size, kind):
                    line = record.line
                    self.bytes_done = finished + min(done, size)
                    yield record
            except EOFError:
                yield Record(name, line + 1, b"", f"the {kind} file is cut off", whole=True)
            except (gzip.BadGzipFile, zlib.error) as error:
                yield Record(name, line + 1, b"", f"not valid gzip: {error}", whole=True)
            except _Damaged as error:
                yield Record(name, line + 1, b"", str(error), whole=True)
            except OSError as error:
                yield Record(name, line + 1, b"", f"cannot be read: {error.strerror}", whole=True)
            finished += size
            self.bytes_done = finished

    def _read(self, unit: Unit, size: int, kind: str) -> Iterator[tuple[Record, int]]:
        """The records of a unit, each with the bytes on disk read so far."""
        if suffix_of(unit.file) == ".parquet":
            yield from self._rows(unit, size)
            return
        with unit.file.open("rb", 1 << 17) as raw:
            stream = _decompressed(raw, unit.file)
            if suffix_of(unit.file) not in JSON_SUFFIXES:
                yield self._whole(stream, str(unit.file)), raw.tell()
            else:
                for record, position in self._lines(stream, unit):
                    yield record, raw.tell() if kind else position - unit.start

    def _lines(self, stream: BinaryIO, unit: Unit) -> Iterator[tuple[Record, int]]:
        """The lines that begin in the unit, each with the byte after it; blank ones count but are no records."""
        name, number, limit, position = str(unit.file), 0, self.max_bytes + 1, unit.start
        stop = float("inf") if unit.stop is None else unit.stop
        if position:  # the line that byte start - 1 is in began before: it is another unit's
            stream.seek(position - 1)
            position += self._skip(stream)[0] - 1
        origin = position
        while position < stop and (raw := stream.readline(limit)):
            number, position = number + 1, position + len(raw)
            if len(raw) == limit and raw[-1] != 10:
                rest, end = self._skip(stream)
                position += rest
                yield (
                    Record(name, number, b"", self._too_long(limit + rest - end), origin),
                    position,
                )
                continue
            line = raw.rstrip(b"\r\n")
            if line and not line.isspace():
                first = number == 1 and not origin
                yield (
                    Record(
                        name,
                        number,
                        line.removeprefix(b"\xef\xbb\xbf") if first else line,
                        "",
                        origin,
                    ),
                    position,
                )

    def _skip(self, stream: BinaryIO) -> tuple[int, int]:
        """Read to the end of a line of any length in bounded memory: its bytes, and how many of them end it."""
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

    def _rows(self, unit: Unit, disk: int) -> Iterator[tuple[Record, int]]:
        """The rows of the column `json_key` in the unit's row groups, about CHUNK bytes of them at a time."""
        name, key = str(unit.file), self.json_key
        with _parquet(unit.file) as file:
            schema = file.schema_arrow
            meta = file.metadata
            arrow = _library("pyarrow", "pyarrow", unit.file)
            groups = range(unit.start, meta.num_row_groups if unit.stop is None else unit.stop)
            if schema.names.count(key) != 1:
                many = "more than one" if key in schema.names else "no"
                raise _Damaged(f'{many} column "{key}": it has {", ".join(schema.names[:5])}; choose with --json-key')
            kind = schema.field(key).type
            plain = kind.value_type if arrow.types.is_dictionary(kind) else getattr(kind, "storage_type", kind)
            if not TEXT_TYPE.match(str(plain)):
                raise _Damaged(f'column "{key}" is not text: but {kind}')
            line = sum(meta.row_group(i).num_rows for i in range(unit.start))
            total, done = sum(meta.row_group(i).num_rows for i in groups), 0
            for group in groups:  # one by one: a damaged one takes no other with it
                rows = meta.row_group(group).num_rows
                size = meta.row_group(group).total_byte_size
                before = done
                batch_size = max(1, min(4096, CHUNK * rows // max(size, 1)))
                try:
                    for batch in file.iter_batches(batch_size, [group], [key], use_threads=False):
                        for raw in batch.column(key).cast(arrow.large_binary()).to_pylist():
                            done += 1
                            fault = f'"{key}" is null' if raw is None else ""
                            if raw is not None and len(raw) > self.max_bytes:
                                raw, fault = b"", self._too_long(len(raw))
                            yield Record(name, line + done, raw or b"", fault), disk * done // total
                except (arrow.ArrowException, OSError) as error:
                    fault = f"not valid Parquet: {before + rows - done} rows cannot be read, {error}"
                    yield (
                        Record(name, line + done + 1, b"", fault, whole=True),
                        disk * done // total,
                    )
                done = before + rows

    def _too_long(self, size: int) -> str:
        return f"too long: {size} bytes, the limit is {self.max_bytes}"


def parse(record: Record, json_key: str = "text") -> tuple[str, int, str]:
    """The text of a record, its size in UTF-8 bytes, and what was changed in it. Raises: BadRecord with the reason."""
    if record.fault:
        raise (BadFile if record.whole else BadRecord)(*record.fault.split(": ", 1))
    suffix, changed = suffix_of(record.file), ""
    if suffix in JSON_SUFFIXES and (text := _quickly(record.raw, json_key)):
        return text, len(text) if text.isascii() else len(text.encode("utf-8")), ""
    try:
        text = record.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f"byte 0x{record.raw[error.start]:02x} at byte {error.start}") from None
    if suffix not in JSON_SUFFIXES:
        if "\0" in text and suffix != ".parquet":
            raise BadRecord(
                "a NUL character in plain text",
                f"at character {text.index(chr(0))}; is it a binary file?",
            )
        size = len(record.raw)
    else:
        text, halves = re.subn("[\ud800-\udfff]", "\ufffd", _text_of_json(text, json_key))
        size, changed = len(text.encode("utf-8")), HALVES if halves else ""
    if not text:
        raise BadRecord(EMPTY)
    return text, size, changed


@functools.cache
def _orjson() -> Any:
    with suppress(ImportError):
        return importlib.import_module("orjson")
    return None


def _quickly(line: bytes, key: str) -> str:
    """The text of a line by orjson, where it is installed and sees nothing wrong; else "", and json is to say why."""
    with suppress(ValueError):
        value = _orjson().loads(line) if _orjson() else None
        if isinstance(value, dict) and isinstance(text := value.get(key), str):
            return text
    return ""


def _text_of_json(line: str, key: str) -> str:
    try:
        value = json.loads(line, parse_int=lambda digits: int(digits[:4000]))  # longer ones raise
    except json.JSONDecodeError as error:
        raise BadRecord("not JSON", f"{error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("not JSON", str(error)) from None
    if not isinstance(value, dict):
        raise BadRecord(
            "not a JSON object",
            f'but a {type(value).__name__}; every line must be an object like {{"{key}": "..."}}',
        )
    if key not in value:
        raise BadRecord(
            f'no key "{key}"',
            f"it has {', '.join(map(repr, list(value)[:5])) or 'none'}; choose with --json-key",
        )
    if not isinstance(value[key], str):
        raise BadRecord(f'"{key}" is not a string', f"but a {type(value[key]).__name__}")
    return value[key]
