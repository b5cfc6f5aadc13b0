"""Files to documents: broken archives, bombs, encodings; whatever is not read is counted, and the rest is read."""

from __future__ import annotations

import gzip
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from megallama.config.errors import DataError
from megallama.curate.readers import cut, documents, find
from tests.curate.recipes import packed, response

PAGES = [response(n, f"<html><body><h1>Page {n}</h1><p>It says {n}.</p></body></html>".encode()) for n in range(6)]
LIMIT = 10_000


def read(path: Path, *keys: str) -> tuple[dict[str, str], dict[str, int]]:
    """The texts of a file by their ids, and what was not read."""
    bad = Counter[str]()
    found = {}
    for unit in cut(0, [str(path)], 1 << 20):
        for document, _ in documents(unit, "web", keys, LIMIT, lambda file, why: bad.update([why])):
            found[document.id] = document.text
    return found, dict(bad)


def damaged(at: int) -> bytes:
    """The pages, packed, the third with a byte that is wrong."""
    members = [packed(page) for page in PAGES]
    bytes_ = bytearray(members[2])
    bytes_[at] ^= 0x55
    return b"".join([*members[:2], bytes(bytes_), *members[3:]])


def torn() -> bytes:
    """A page of many packed bytes, which are wrong in the middle, among others."""
    middle = bytearray(packed(response(1, b"<p>" + random.Random(1).randbytes(9000))))
    middle[5000:5100] = bytes(100)
    return packed(PAGES[0]) + bytes(middle) + packed(PAGES[2])


LONG = PAGES[2].replace(b"Content-Length: ", b"Content-Length: 9")
ARCHIVES = {  # content, numbers of the pages that are read, what is counted
    "whole": (packed(*PAGES), "012345", {}),
    "not packed": (b"".join(PAGES), "012345", {}),
    "one member": (gzip.compress(b"".join(PAGES)), "012345", {}),
    "damaged": (damaged(60), "01345", {"a broken record": 1}),
    "damaged sum": (damaged(-6), "01345", {"a broken record": 1}),
    "torn": (torn(), "02", {"a broken record": 1}),
    "cut off": (packed(*PAGES)[:-30], "01234", {"a record is cut off": 1}),
    "between": (packed(*PAGES[:2]) + b"garbage" * 9 + packed(*PAGES[2:]), "012345", {"bytes that are no record": 1}),
    "long length": (packed(*PAGES[:2], LONG, *PAGES[3:]), "01345", {"a record is cut off": 1}),
    "long length, plain": (b"".join([*PAGES[:2], LONG, *PAGES[3:]]), "01345", {"a record is cut off": 1}),
    "no WARC": (packed(*PAGES[:2], b"WORC/1.0\r\n\r\n", *PAGES[3:]), "01345", {"a broken record": 1}),
    "huge": (packed(PAGES[0], response(1, b"<p>" + b"a" * 50_000_000), PAGES[2]), "02", {"too long": 1}),
    "junk": (b"junk\0" * 100, "", {"a broken record": 1}),
    "empty": (b"", "", {}),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(name: str, tmp_path: Path) -> None:
    pytest.importorskip("fastwarc", reason="the extra `curate` is not installed")
    content, numbers, counted = ARCHIVES[name]
    (tmp_path / "a.warc.gz").write_bytes(content)
    found, bad = read(tmp_path / "a.warc.gz")
    assert found == {n: f"Page {n}\n\nIt says {n}." for n in numbers}
    assert bad == counted


BOMB = response(1, gzip.compress(b"<p>hi" * 4_000_000), fields="Content-Type: text/html\r\nContent-Encoding: gzip")
LATIN = "<p>d\u00e9j\u00e0 vu, na\u00efvet\u00e9 et caf\u00e9".encode("latin-1")
RECORDS = {
    "packed page": (response(1, gzip.compress(b"<p>hi"), fields="Content-Encoding: gzip"), "hi", ""),
    "bomb": (BOMB, None, "too long"),
    "not found": (response(1, b"<p>no", "404 Not Found"), None, "HTTP status 404"),
    "picture": (response(1, b"\x89PNG", fields="Content-Type: image/png"), None,
                "no text but another type (image/png)"),
    "declared": (response(1, LATIN, fields="Content-Type: text/html; charset=iso-8859-1"),
                 "d\u00e9j\u00e0 vu, na\u00efvet\u00e9 et caf\u00e9", ""),
    "unknown": (response(1, b"<p>hello", fields="Content-Type: text/html; charset=klingon"), "hello", ""),
    "empty": (response(1, b"<html><script>x()</script></html>"), None, "empty text"),
    "WET": (b"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
            b"Content-Length: 5\r\n\r\nplain\r\n\r\n", "plain", ""),
    "request": (b"WARC/1.0\r\nWARC-Type: request\r\nContent-Length: 4\r\n\r\nGET \r\n\r\n", None,
                "no page but request"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_records(name: str, tmp_path: Path) -> None:
    pytest.importorskip("fastwarc", reason="the extra `curate` is not installed")
    pytest.importorskip("resiliparse", reason="the extra `curate` is not installed")
    record, text, why = RECORDS[name]
    (tmp_path / "a.warc.gz").write_bytes(packed(record, PAGES[0]))
    found, bad = read(tmp_path / "a.warc.gz")
    assert found.pop("0").startswith("Page 0") and found == ({} if text is None else {"1": text})
    assert [*bad][:1] == ([why] if why else [])


def test_lines_have_their_own_ids_or_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "id": 7}\n\n{"text": "two", "id": [1]}\nno\n{"text": "' + "x" * 10_001 + '"}\n')
    assert read(path, "id") == ({"7": "one", f"{path}:3": "two"}, {"not JSON": 1, "too long": 1})
    assert read(path)[0] == {f"{path}:1": "one", f"{path}:3": "two"}


def test_files_are_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.wet.gz", "d/c.txt", ".hidden.txt", "x.png", "y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    bad = Counter[str]()
    found = find((str(tmp_path / "b.jsonl"), str(tmp_path)), lambda file, why: bad.update([why]))
    assert [file.removeprefix(f"{tmp_path}/") for file in found] == ["b.jsonl", "a.wet.gz", "d/c.txt"]
    assert bad == {"not read: .png": 2, "not read: hidden": 1}
    with pytest.raises(DataError, match="does not exist; give a file, a folder or a pattern"):
        find((str(tmp_path / "no*"),), lambda file, why: None)
    with pytest.raises(DataError, match="no WARC, WET, JSON lines"):
        find((str(tmp_path / "x.png"),), lambda file, why: None)


def test_links_to_folders_are_followed_and_what_cannot_be_opened_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("in/a.jsonl", "more/b.jsonl", "in/shut/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "loop").symlink_to(tmp_path / "in")
    scan, bad = os.scandir, Counter[tuple[str, str]]()

    def shut(path: str) -> object:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", shut)
    found = find((str(tmp_path / "in"),), lambda file, why: bad.update([(file, why)]))
    assert found == [str(tmp_path / "in" / name) for name in ("a.jsonl", "link/b.jsonl")]
    assert bad == {(str(tmp_path / "in" / "shut"), "cannot be read (Permission denied)"): 1}


def test_odd_values_beside_a_text_cost_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    deep, long = "[" * 990 + "]" * 990, "9" * 5000
    path.write_text(f'{{"text": "one", "id": "a", "x": {long}}}\n{{"text": "two", "id": "b", "x": {deep}}}\n')
    found, bad = read(path, "id")
    assert [*found.values()] == ["one", "two"] and found["a"] == "one" and bad == {}


def test_without_the_extra_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fastwarc.warc", None)
    (tmp_path / "a.warc").write_bytes(PAGES[0])
    with pytest.raises(DataError, match=r"WARC needs the module fastwarc.warc; pip install 'megallama\[curate\]'"):
        read(tmp_path / "a.warc")
