"""Reading documents out of files as streams, in a fixed order, every fault named by file and line.

JSON lines and plain text, each also as .gz or .zst, and Parquet.  `units` cuts files into pieces of work;
`RecordReader` reads files or units: in order the same records.  `parse` takes records apart.
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

from megallama.config.errors import DataError

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (*".txt .text .md .rst .tex .py .c .h .cpp .hpp .java .js .ts .go .rs .sh".split(),)
SUFFIXES = (*JSON_SUFFIXES, *TEXT_SUFFIXES, ".parquet")
KINDS = (
    f"JSON lines end in {' '.join(JSON_SUFFIXES)}, plain text in {' '.join(TEXT_SUFFIXES)}, both also with .gz or "
    ".zst; Parquet in .parquet"
)
EMPTY = "empty text"
HALVES = "half of a surrogate pair, which no text can hold, is U+FFFD now"
TEXT_TYPE = re.compile("(large_)?(string|binary)(_view)?$|fixed_size_binary")  # of Parquet
MAX_DOCUMENT_BYTES = 16 << 20
CHUNK = 1 << 20
BOM = b"\xef\xbb\xbf"
_orjson: Any = None
with suppress(ImportError):
    _orjson = importlib.import_module("orjson")


@functools.lru_cache(1024)  # asked once per record
def suffix_of(path: str | Path) -> str:
    """The suffix that says what a file holds, without that of its compression."""
    name = Path(path).name.lower()
    return Path(name.removesuffix(".gz").removesuffix(".zst")).suffix


class Record(NamedTuple):
    """A raw document: a line of JSON, a row of Parquet, a text file (line 0); `fault`: of a `BadRecord`.

    `whole`: the file cannot be read on.  Lines count from 1 at byte `origin`: `place` knows the true line.
    """

    file: str
    line: int
    raw: bytes
    fault: tuple[str, ...] = ()
    origin: int = 0
    whole: bool = False


class Unit(NamedTuple):
    """The lines that begin in bytes [start, stop) of a file; of Parquet, row groups."""

    file: Path
    start: int
    stop: int | None  # None: to the end
    size: int  # bytes on disk


class BadRecord(Exception):
    """A record or file without usable text: what is wrong, and perhaps particulars."""

    def __init__(self, *fault: str) -> None:
        super().__init__(f"{fault[0]} ({fault[1]})" if fault[1:] else fault[0])
        self.fault = fault


def place(record: Record) -> str:
    """FILE:LINE of a record, or FILE of a text file; counts the lines before its unit."""
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
    """Cut JSON lines anywhere, Parquet at row groups, about `unit_bytes` each; all else stays whole."""
    out = []
    for file in files:
        whole, cuts, groups, held = file.stat().st_size, [0], list[int](), 0
        if file.suffix.lower() in JSON_SUFFIXES:
            cuts = [*range(0, whole, unit_bytes)] or cuts
        elif suffix_of(file) == ".parquet":
            with suppress(BadRecord), _parquet(file) as opened:  # reading it will report the damage
                meta = opened.metadata
                groups = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
            for number, size in enumerate(groups):
                if held >= unit_bytes:
                    cuts, held = [*cuts, number], 0
                held += size
        total = sum(groups)
        for start, stop in zip(cuts, [*cuts[1:], None], strict=True):
            size = whole * sum(groups[start:stop]) // total if total else (stop or whole) - start
            out.append(Unit(file, start, stop, size))
    return out


def _parquet(file: Path) -> Any:
    """An open file that is read by pages and not by row groups, which may be gigabytes."""
    parquet = _library("pyarrow.parquet", file)
    try:
        return parquet.ParquetFile(file, pre_buffer=False, buffer_size=CHUNK)
    except Exception as error:  # arrow has errors of many kinds here, all of them about this file
        if isinstance(error, OSError) and error.errno:
            raise BadRecord("cannot be read", os.strerror(error.errno)) from None
        raise BadRecord("not valid Parquet", str(error)) from None


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
        # a little: it may decompress to thousands of times its size
        while data := data or raw.read(1024):
            frame = frame or library.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                yield memoryview(frame.decompress(data))
            except library.ZstdError as error:
                raise BadRecord("not valid zstd", str(error)) from None
            frame, data = (None, frame.unused_data) if frame.eof else (frame, b"")
        if frame:
            raise EOFError


def _decompressed(raw: BinaryIO, file: Path) -> BinaryIO:
    """The content of an open file."""
    kind = file.suffix.lower()
    if kind == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    return io.BufferedReader(_Zstd(raw, _library("zstandard", file)), 1 << 16) if kind == ".zst" else raw


class RecordReader:
    """The records of files or units, in order; `bytes_done` of `bytes_total` on disk are read."""

    def __init__(
        self, files: Sequence[Path | Unit], max_bytes: int = MAX_DOCUMENT_BYTES, json_key: str = "text"
    ) -> None:
        self.units = [file if isinstance(file, Unit) else Unit(file, 0, None, file.stat().st_size) for file in files]
        self.max_bytes, self.json_key = max_bytes, json_key
        self.bytes_total, self.bytes_done = sum(unit.size for unit in self.units), 0

    def __iter__(self) -> Iterator[Record]:
        for unit in self.units:
            line, fault, before = 0, tuple[str, ...](), self.bytes_done
            try:
                for record, read in self._read(unit):
                    line = record.line
                    self.bytes_done = before + min(read, unit.size)
                    yield record
            except EOFError:
                fault = (f"the {'gzip' if unit.file.suffix.lower() == '.gz' else 'zstd'} file is cut off",)
            except (gzip.BadGzipFile, zlib.error) as error:
                fault = ("not valid gzip", str(error))
            except BadRecord as error:
                fault = error.fault
            except OSError as error:
                fault = ("cannot be read", str(error.strerror))
            if fault:
                yield Record(str(unit.file), line + 1, b"", fault, whole=True)
            self.bytes_done = before + unit.size

    def _read(self, unit: Unit) -> Iterator[tuple[Record, int]]:
        """The records of a unit, each with the bytes of it on disk that are read then."""
        kind = suffix_of(unit.file)
        if kind == ".parquet":
            yield from self._rows(unit)
            return
        with unit.file.open("rb", 1 << 17) as raw:
            records = self._lines if kind in JSON_SUFFIXES else self._whole
            for record in records(_decompressed(raw, unit.file), unit):
                yield record, raw.tell() - unit.start

    def _lines(self, stream: BinaryIO, unit: Unit) -> Iterator[Record]:
        """The lines that begin in the unit; blank ones only count."""
        number, limit, position = 0, self.max_bytes + 1, unit.start
        stop = float("inf") if unit.stop is None else unit.stop
        if position:  # the line that byte start - 1 is in began before: it is another unit's
            stream.seek(position - 1)
            position += self._skip(stream)[0] - 1
        origin = position
        while position < stop and (line := stream.readline(limit)):
            number, position, fault = number + 1, position + len(line), tuple[str, ...]()
            if len(line) == limit and line[-1] != 10:
                rest, end = self._skip(stream)
                position += rest
                line, fault = b"", self._too_long(limit + rest - end)
            if fault or line.strip():
                line = line.rstrip(b"\r\n")
                line = line if origin or number > 1 else line.removeprefix(BOM)
                yield Record(str(unit.file), number, line, fault, origin)

    def _skip(self, stream: BinaryIO) -> tuple[int, int]:
        """Skip the rest of a line of any length: its bytes, and how many end it."""
        size, rest = 0, b""
        while not rest.endswith(b"\n") and (rest := stream.readline(CHUNK)):
            size += len(rest)
        return size, len(rest) - len(rest.rstrip(b"\r\n"))

    def _whole(self, stream: BinaryIO, unit: Unit) -> Iterator[Record]:
        text = stream.read(self.max_bytes + 1)
        fault = self._too_long(len(text) + sum(map(len, iter(lambda: stream.read(CHUNK), b""))))
        yield Record(str(unit.file), 0, b"" if fault else text.removeprefix(BOM), fault)

    def _rows(self, unit: Unit) -> Iterator[tuple[Record, int]]:
        """The rows of the column `json_key` in the unit, about CHUNK bytes at a time."""
        name, key, arrow = str(unit.file), self.json_key, _library("pyarrow", unit.file)
        with _parquet(unit.file) as file:
            meta, schema = file.metadata, file.schema_arrow
            if schema.names.count(key) != 1:
                many, names = "more than one" if key in schema.names else "no", ", ".join(schema.names[:5])
                raise BadRecord(f'{many} column "{key}"', f"it has {names}; choose with --json-key")
            kind = schema.field(key).type
            plain = kind.value_type if arrow.types.is_dictionary(kind) else getattr(kind, "storage_type", kind)
            if not TEXT_TYPE.match(str(plain)):
                raise BadRecord(f'column "{key}" is not text', f"but {kind}")
            rows = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
            before, total, read = sum(rows[: unit.start]), sum(rows[unit.start : unit.stop]), 0
            line = before
            for group in range(len(rows))[unit.start : unit.stop]:  # a damaged one takes no other with it
                end, size = line + rows[group], max(meta.row_group(group).total_byte_size, 1)
                batch_size = max(1, min(4096, CHUNK * rows[group] // size))
                try:
                    for batch in file.iter_batches(batch_size, [group], [key], use_threads=False):
                        for raw in batch.column(key).cast(arrow.large_binary()).to_pylist():
                            line, fault = line + 1, self._too_long(len(raw or b""))
                            if raw is None:
                                fault = (f'"{key}" is null',)
                            read = unit.size * (line - before) // total
                            yield Record(name, line, raw if raw and not fault else b"", fault), read
                except (arrow.ArrowException, OSError) as error:
                    fault = ("not valid Parquet", f"{end - line} rows cannot be read, {error}")
                    yield Record(name, line + 1, b"", fault, whole=True), read
                line = end

    def _too_long(self, size: int) -> tuple[str, ...]:
        return ("too long", f"{size} bytes, the limit is {self.max_bytes}") if size > self.max_bytes else ()


def parse(record: Record, json_key: str = "text") -> tuple[str, int, str]:
    """The text, its size in UTF-8 bytes, and what was changed in it. Raises: BadRecord."""
    if record.fault:
        raise BadRecord(*record.fault)
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


def seems(file: str) -> str:
    """What a file seems to be instead of JSON lines or UTF-8; "" where nothing is seen."""
    head = b""
    with suppress(OSError, EOFError, zlib.error, BadRecord), open(file, "rb") as raw:
        head = cast(io.BufferedReader, _decompressed(raw, Path(file))).read1(CHUNK >> 4)
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1")):
        return "it is packed, or Parquet; its name must say so: .gz, .zst, .parquet"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
        return "it is UTF-16 or UTF-32; convert it to UTF-8: iconv -f UTF-16 -t UTF-8"
    text = head.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n")
    first = text.partition("\n")[0]
    if suffix_of(file) not in JSON_SUFFIXES or not first:
        return ""
    if first[0] == "[":
        return "it is a JSON array, not one object per line; convert it: jq -c '.[]'"
    if first[0] == "{":
        with suppress(ValueError, RecursionError):
            return "" if json.loads(first) else ""
        return "its JSON objects go over several lines, not one per line; convert it: jq -c ." if "\n" in text else ""
    return "it seems to be a table (CSV), not JSON lines" if first.count(",") + first.count("\t") else ""
