"""Reading documents out of files: JSON lines and plain text, gzipped or not, with every fault named by file and line.

Reading (`read_records`, streaming, in a fixed order) is separate from parsing (`parse`, per record), so that parsing
can happen in worker processes and still report faults in the order of the input.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from megallama.data.errors import DataError

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (
    ".txt",
    ".text",
    ".md",
    ".rst",
    ".tex",
    ".py",
    ".c",
    ".h",
    ".cpp",
    ".hpp",
    ".java",
    ".js",
    ".ts",
    ".go",
    ".rs",
    ".sh",
)
MAX_DOCUMENT_BYTES = 64 << 20


class Record(NamedTuple):
    """One raw document: a line of JSON, or a whole text file (line 0); `fault` says why it could not even be read."""

    file: str
    line: int
    raw: bytes
    fault: str = ""


class BadRecord(Exception):
    """A record that holds no usable text: `kind` is what is wrong, `detail` the particulars of this one."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind} ({detail})" if detail else kind)
        self.kind, self.detail = kind, detail


def _suffix(path: str | Path) -> str:
    name = Path(path).name.lower()
    return Path(name.removesuffix(".gz")).suffix


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files meant by a list of files, folders (searched recursively) and glob patterns, in a fixed order.

    Raises: DataError for a name that matches nothing, or a file of unknown kind.
    """
    files: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if _belongs(p, path)]
            if not found:
                raise DataError(
                    f"{path} holds no text: expected files ending in {' '.join(JSON_SUFFIXES + TEXT_SUFFIXES)}, also "
                    "with .gz"
                )
        elif path.is_file():
            found = [path]
        else:
            found = [Path(p) for p in sorted(glob.glob(str(given), recursive=True)) if os.path.isfile(p)]
            if not found:
                raise DataError(f"{given} does not exist; give a file, a folder or a pattern such as 'corpus/*.jsonl'")
        for file in found:
            if _suffix(file) not in JSON_SUFFIXES + TEXT_SUFFIXES:
                raise DataError(
                    f"{file} is of an unknown kind {_suffix(file)!r}; JSON lines end in {' '.join(JSON_SUFFIXES)}, "
                    f"plain text in {' '.join(TEXT_SUFFIXES)}, both also with .gz"
                )
        files += found
    if not files:
        raise DataError("no input files were given; name files, folders or patterns")
    return files


def _belongs(path: Path, folder: Path) -> bool:
    """Whether a file found in a folder is text of the corpus: a known kind, not hidden, no record of our own output."""
    hidden = any(part.startswith((".", "__pycache__")) for part in path.relative_to(folder).parts)
    ours = path.suffix == ".json" and path.with_suffix(".idx").exists()
    return not hidden and not ours and _suffix(path) in JSON_SUFFIXES + TEXT_SUFFIXES and path.is_file()


class RecordReader:
    """Iterates over the records of files in order; it has read `bytes_done` of `bytes_total` (sizes on disk)."""

    def __init__(self, files: Sequence[Path], max_bytes: int = MAX_DOCUMENT_BYTES) -> None:
        self.files, self.max_bytes = files, max_bytes
        self.bytes_total = sum(file.stat().st_size for file in files)
        self.bytes_done = 0

    def __iter__(self) -> Iterator[Record]:
        finished = 0
        for path in self.files:
            with path.open("rb") as raw:
                zipped = path.suffix.lower() == ".gz"
                stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if zipped else raw
                line = 0
                try:
                    read = self._lines if _suffix(path) in JSON_SUFFIXES else self._whole
                    for record in read(stream, str(path)):
                        line = record.line
                        self.bytes_done = finished + raw.tell()
                        yield record
                except EOFError:
                    yield Record(str(path), line + 1, b"", "the gzip file is cut off")
                except (gzip.BadGzipFile, zlib.error) as error:
                    yield Record(str(path), line + 1, b"", f"not valid gzip: {error}")
            finished += path.stat().st_size
            self.bytes_done = finished

    def _lines(self, stream: BinaryIO, name: str) -> Iterator[Record]:
        number, limit = 0, self.max_bytes + 1
        while raw := stream.readline(limit):
            number += 1
            if len(raw) == limit and not raw.endswith(b"\n"):
                size = len(raw)
                while (rest := stream.readline(limit)) and not rest.endswith(b"\n"):
                    size += len(rest)
                yield Record(name, number, b"", self._too_long(size + len(rest.rstrip(b"\r\n"))))
            elif raw.strip():
                line = raw.rstrip(b"\r\n")
                yield Record(name, number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)

    def _whole(self, stream: BinaryIO, name: str) -> Iterator[Record]:
        raw = stream.read(self.max_bytes + 1)
        if len(raw) > self.max_bytes:
            size = len(raw)
            while rest := stream.read(1 << 20):
                size += len(rest)
            yield Record(name, 0, b"", self._too_long(size))
        else:
            yield Record(name, 0, raw.removeprefix(b"\xef\xbb\xbf"))

    def _too_long(self, size: int) -> str:
        return f"too long: {size} bytes, the limit is {self.max_bytes}"


def parse(record: Record, json_key: str = "text") -> tuple[str, int]:
    """The text of a record and its size in UTF-8 bytes. Raises: BadRecord with the reason."""
    if record.fault:
        raise BadRecord(*record.fault.split(": ", 1))
    try:
        text = record.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f"byte 0x{record.raw[error.start]:02x} at byte {error.start}") from None
    if _suffix(record.file) not in JSON_SUFFIXES:
        if "\0" in text:
            raise BadRecord("a NUL character in plain text", f"at character {text.index(chr(0))}; is it a binary file?")
        size = len(record.raw)
    else:
        text = _text_of_json(text, json_key)
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise BadRecord(
                "half a surrogate pair", f"\\u{ord(text[error.start]):04x} at character {error.start}"
            ) from None
    if not text:
        raise BadRecord("empty text")
    return text, size


def _text_of_json(line: str, key: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRecord("not JSON", f"{error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("not JSON", str(error)) from None
    if not isinstance(value, dict):
        raise BadRecord(
            "not a JSON object", f'but a {type(value).__name__}; every line must be an object like {{"{key}": "..."}}'
        )
    if key not in value:
        raise BadRecord(
            f'no key "{key}"', f"it has {', '.join(map(repr, list(value)[:5])) or 'none'}; choose with --json-key"
        )
    if not isinstance(value[key], str):
        raise BadRecord(f'"{key}" is not a string', f"but a {type(value[key]).__name__}")
    return value[key]
