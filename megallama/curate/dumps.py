"""The dumps of Wikipedia (pages-articles.xml) and of StackExchange (Posts.xml), read as streams."""

from __future__ import annotations

import bz2
import gzip
import html
import re
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import groupby
from typing import Any
from xml.etree import ElementTree

Row = tuple[str, str, dict[str, str], int]  # id, text, what else is known, bytes read
BLOCKS = re.compile(r"</?(?:p|br|div|li|ul|ol|pre|h[1-6]|blockquote|hr)\b[^<>]*>", re.I)


def _elements(file: str, name: str, bad: Callable[[str], None]) -> Iterator[tuple[Any, int]]:
    """The elements of this name, each with the bytes of the file that are read; they are emptied afterwards."""
    with open(file, "rb") as raw:
        opened: Any = bz2.BZ2File(raw) if file.endswith(".bz2") else raw
        opened = gzip.GzipFile(fileobj=raw) if file.endswith(".gz") else opened
        root: Any = None
        try:
            for event, element in ElementTree.iterparse(opened, ("start", "end")):
                root = element if root is None else root
                if event == "end" and element.tag.rpartition("}")[2] == name:
                    yield element, raw.tell()
                    root.clear()
        except (ElementTree.ParseError, EOFError, gzip.BadGzipFile, zlib.error, LookupError, ValueError) as error:
            bad(f"cannot be read on: not valid XML ({error})")  # the last two: in another encoding than it says


def wikipedia(file: str, max_bytes: int, bad: Callable[[str], None]) -> Iterator[Row]:
    """The articles of a dump, as wikitext under their titles."""
    for page, read in _elements(file, "page", bad):
        values = {child.tag.rpartition("}")[2]: child.text or "" for child in [*page.iter()][::-1]}
        text = values.get("text", "")
        if "redirect" in values or values.get("ns", "0") != "0":
            bad("no article but a redirect or a page of another kind")
        elif len(text) > max_bytes or not text.strip():
            bad("too long" if text.strip() else "empty text")
        else:
            yield values.get("id", ""), f"{values.get('title', '')}\n\n{text}", {}, read


def stackexchange(file: str, max_bytes: int, bad: Callable[[str], None]) -> Iterator[Row]:
    """Each question with its answers, the best first; sorted on disk, as answers stand anywhere behind."""
    with closing(sqlite3.connect("")) as store:  # a temporary file
        store.execute("CREATE TABLE post (question INTEGER, kind INTEGER, score INTEGER, id INTEGER, text TEXT)")
        read = 0
        for row, now in _elements(file, "row", bad):
            read, kind = now, row.get("PostTypeId")
            body = html.unescape(re.sub("<[^<>]*>", "", BLOCKS.sub("\n", row.get("Body", ""))))
            text = re.sub(r"\n{3,}", "\n\n", f"{row.get('Title', '')}\n\n{body}").strip()
            try:
                post, score = int(row.get("Id", "")), int(row.get("Score", "0"))
                question = post if kind == "1" else int(row.get("ParentId", ""))
                values = question, {"1": 1, "2": 2}[kind], score, post, text
                store.execute("INSERT INTO post VALUES (?, ?, ?, ?, ?)", values)
            except (KeyError, ValueError, OverflowError):  # a number may have more than 64 bits
                bad("neither question nor answer")
        posts = store.execute("SELECT * FROM post ORDER BY question, kind, -score, id")
        for question, rows in groupby(posts, key=lambda row: row[0]):
            thread = [*rows]
            text = "\n\n".join(row[4] for row in thread)
            if thread[0][1] != 1:
                bad("answers without their question")
            elif len(text) > max_bytes:
                bad("too long")
            else:
                yield f"{file}#{question}", text, {"score": str(thread[0][2])}, read
