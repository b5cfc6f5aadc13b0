"""From files to documents: which files, cut into units of work, and what each holds.

WARC and WET; dumps of Wikipedia and StackExchange; JSON lines, Parquet and plain text as `megallama.text` reads them.
Whatever cannot be read is counted by file and reason, and reading goes on behind it.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megallama.config.errors import DataError
from megallama.curate.dumps import Row, stackexchange, wikipedia
from megallama.curate.stage import Document, need
from megallama.text import documents as texts
from megallama.text.documents import BadRecord

WARC = (".warc", ".wet", ".warc.gz", ".wet.gz")
XML = (".xml", ".xml.gz", ".xml.bz2")
MEDIA = ("text/html", "application/xhtml+xml", "text/plain")
STARTS = {True: re.compile(rb"\x1f\x8b\x08"), False: re.compile(rb"(?<=\n)WARC/1\.")}  # of records, by packed
Bad = Callable[[str, str], None]
Strings = tuple[str, ...]


class Unit(NamedTuple):
    """Pieces of files that are read together, and become one shard."""

    source: int
    pieces: tuple[texts.Unit, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


def kind_of(file: str) -> str:
    """How a file is read: "warc", "posts", "wiki", "text"; "" if it is not."""
    name = Path(file).name.lower()
    if name.endswith(WARC + XML):
        return "warc" if name.endswith(WARC) else "posts" if name.startswith("posts.") else "wiki"
    return "text" if texts.suffix_of(file) in texts.SUFFIXES else ""


def find(inputs: Strings, bad: Bad) -> list[str]:
    """The files that inputs mean, each once, in order; those of a folder sorted. Raises: DataError."""
    found = dict[str, None]()
    for name in inputs:
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise DataError(f"{name} does not exist; give a file, a folder or a pattern such as 'crawl/*.warc.gz'")
        for match in map(Path, matches):
            for file in sorted(_below(match, bad)) if match.is_dir() else [match]:
                hidden = any(part.startswith((".", "__pycache__")) for part in file.relative_to(match).parts)
                if file.is_file() and kind_of(str(file)) and not hidden:
                    found[str(file)] = None
                else:
                    bad(str(match), f"not read: {'hidden' if hidden else file.suffix or 'no suffix'}")
    if not found:
        raise DataError(f"{', '.join(inputs)}: no WARC, WET, JSON lines, Parquet, XML dumps or text among them")
    return [*found]


def _below(folder: Path, bad: Bad) -> Iterator[Path]:
    """All files below a folder, also where links to folders lead; each folder once."""
    seen = set[str]()
    unread: Callable[[OSError], None] = lambda e: bad(str(e.filename), f"cannot be read ({e.strerror})")  # noqa: E731
    for root, folders, names in os.walk(folder, onerror=unread, followlinks=True):
        folders[:] = [] if (real := os.path.realpath(root)) in seen else sorted(folders)
        yield from (Path(root, name) for name in names if real not in seen)
        seen.add(real)


def cut(source: int, files: list[str], unit_bytes: int) -> list[Unit]:
    """Units of about `unit_bytes`: a part of a large file, or many small ones; a packed file stays whole."""
    units, held, size = list[Unit](), list[texts.Unit](), 0
    for file in files:
        for piece in texts.units([Path(file)], unit_bytes):
            if held and size + piece.size > unit_bytes:
                units.append(Unit(source, tuple(held)))
                held, size = [], 0
            held.append(piece)
            size += piece.size
    return [*units, Unit(source, tuple(held))] if held else units


def documents(unit: Unit, source: str, keys: Strings, max_bytes: int, bad: Bad) -> Iterator[tuple[Document, int]]:
    """The documents of a unit, each with the bytes on disk that are read by then."""
    before = 0
    for part in unit.pieces:
        file, why = str(part.file), functools.partial(bad, str(part.file))
        reader = {"warc": _pages, "posts": stackexchange, "wiki": wikipedia}.get(kind_of(file))
        rows = reader(file, max_bytes, why) if reader else _texts(part, keys, max_bytes, why)
        try:
            for name, text, meta, read in rows:
                yield Document(text, name, source, {}, meta | {"path": file}), before + min(read, part.size)
        except OSError as error:
            bad(file, f"cannot be read ({error.strerror or error})")
        before += part.size


def _texts(unit: texts.Unit, keys: Strings, max_bytes: int, bad: Callable[[str], None]) -> Iterator[Row]:
    reader = texts.RecordReader([unit], max_bytes)
    for record in reader:
        try:
            text, _, changed = texts.parse(record)
        except BadRecord as error:
            bad("cannot be read on: " * record.whole + error.fault[0])
            continue
        if changed:
            bad(changed)
        name, meta = record.file + (f":{record.line}" if record.line else ""), dict[str, str]()
        name += f" from byte {record.origin}" if record.origin else ""
        if keys and texts.suffix_of(unit.file) in texts.JSON_SUFFIXES:
            with suppress(ValueError, RecursionError):
                row = json.loads(record.raw, parse_int=lambda digits: int(digits[:4000]))
                meta = {key: str(row[key]) for key in keys if isinstance(row.get(key), (str, int, float))}
        yield meta.pop("id", name), text, meta, reader.bytes_done


def _pages(file: str, max_bytes: int, bad: Callable[[str], None]) -> Iterator[Row]:
    """The pages of a WARC or WET; where a record is broken, the next is looked for."""
    warc = need("fastwarc.warc", "WARC")
    with open(file, "rb") as raw:
        packed, start, number, lost = raw.read(3) == b"\x1f\x8b\x08", 0, 0, False
        while start >= 0:
            raw.seek(start)
            at, fault = start, "a broken record"  # unless a record comes: then it stands further on, and is met again
            try:
                for record in warc.ArchiveIterator(raw, auto_decode="all"):
                    if lost:
                        bad("bytes that are no record")
                    at, number, lost, fault = start + record.stream_pos, number + 1, False, "a broken record"
                    body = record.reader.read(max_bytes + 1)
                    length, fault = record.content_length, ""
                    if len(body) < min(length, max_bytes) and not (record.http_headers or {}).get("Content-Encoding"):
                        fault = "a record is cut off"
                        break
                    try:
                        text = page_text(record, body, max_bytes)
                    except BadRecord as error:
                        bad(str(error))
                        continue
                    name = (record.record_id or "").strip("<>").removeprefix("urn:uuid:") or f"{file}:{number}"
                    yield name, text, {"url": record.headers.get("WARC-Target-URI", "")}, raw.tell()
                else:
                    return
            except (OSError, ValueError):
                lost = not fault
            if fault:
                bad(fault)
            start = _next_start(raw, at + 1, STARTS[packed])


def _next_start(raw: BinaryIO, at: int, pattern: re.Pattern[bytes]) -> int:
    """Where the next record begins, from `at` on; -1 if none does."""
    raw.seek(at - 1)
    held, before = b"", at - 1
    while chunk := raw.read(1 << 20):
        held += chunk
        if found := pattern.search(held, 1):
            return before + found.start()
        before, held = before + len(held) - 8, held[-8:]
    return -1


def page_text(record: Any, body: bytes, max_bytes: int) -> str:
    """The text of a record's content. Raises: BadRecord, with why there is none."""
    kind, http = record.headers.get("WARC-Type", "a record without a type"), record.http_headers
    if kind not in ("response", "conversion"):
        raise BadRecord(f"no page but {kind}")
    if len(body) > max_bytes:
        raise BadRecord("too long")
    if kind == "response":
        if http is None or http.status_code != 200:
            raise BadRecord(f"HTTP status {http.status_code if http else 'missing'}")
        if (media := record.http_content_type or MEDIA[0]) not in MEDIA:
            raise BadRecord("no text but another type", media)
        if media != MEDIA[-1]:
            return html_text(body, record.http_charset)
    text = body.decode("utf-8", "replace")
    if text.count("\ufffd") * 100 > len(text) or not text.strip():
        raise BadRecord("not UTF-8" if text.strip() else texts.EMPTY)
    return text


def html_text(body: bytes, charset: str | None = None) -> str:
    """What a reader sees of HTML. Raises: BadRecord where there is none, or in an encoding that is not known."""
    encoding = need("resiliparse.parse.encoding", "HTML")
    try:
        page = encoding.bytes_to_str(body, charset or encoding.detect_encoding(body, from_html_meta=True))
    except (LookupError, UnicodeError):
        page = encoding.bytes_to_str(body, encoding.detect_encoding(body, from_html_meta=True))
    if page.count("\ufffd") * 100 > len(page):
        raise BadRecord("a page in another encoding than it says")
    if not (text := need("resiliparse.extract.html2text", "HTML").extract_plain_text(page).strip()):
        raise BadRecord(texts.EMPTY)
    return text
