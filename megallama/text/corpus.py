"""A corpus for the first run: text that every Python installation carries, or the reader's own.

The default is the source code of the standard library (a document per module) and the texts of `help()` (a document
per topic): a few megabytes of coherent text without a download.  Of the reader's own text, long documents are cut at
paragraph or line ends, so that even one book has documents to hold out.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megallama.data.errors import DataError
from megallama.text.documents import RecordReader, place
from megallama.text.losses import Losses

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
MIN_BYTES = 100_000  # of the reader's own text
MIN_DOCUMENTS, MAX_PIECE_BYTES = 64, 16_384  # the sizes into which long documents are cut follow from these


@dataclass(frozen=True)
class Corpus:
    """What `build_corpus` wrote."""

    path: Path
    documents: int
    text_bytes: int
    cut: bool  # max_bytes was reached and the rest left out
    skipped: tuple[str, ...]  # lines that tell what was left out, and why


def build_corpus(
    out: Path, max_bytes: int, text: Path | None = None, *, json_key: str = "text", stdlib: Path | None = None
) -> Corpus:
    """Write at most `max_bytes` as JSON lines {"text", "source"}: the default corpus, or `text` (file, folder).

    The same installation (or text) always gives the same bytes.
    Raises: DataError if the text is missing, empty, unreadable or too small to train on.
    """
    skipped, losses = list[str](), Losses()
    if text is None:
        lib = stdlib or Path(sysconfig.get_paths()["stdlib"])
        documents: Iterable[tuple[str, str]] = [*_topics(), *_modules(lib, skipped)]
        if not documents:
            what = f"{lib} holds no Python sources (a trimmed installation?)"
            raise DataError(f"{what}; give your own text with TEXT=path")
    else:
        if not text.exists():
            raise DataError(f"{text} does not exist; TEXT takes a text file, a .jsonl file or a folder of them")
        reader = RecordReader(losses.find([text], skipped.append), json_key=json_key)
        if not reader.bytes_total:
            raise DataError(f"{text} is empty; give a file or folder with {MIN_BYTES:,} bytes of text or more")
        documents = _own(reader, losses)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    try:
        count, total, cut = _write(temporary, documents, max_bytes)
        losses.check()
        if text is not None and total < MIN_BYTES:
            note = f" ({len(skipped)} skipped, the first: {skipped[0]})" if skipped else ""
            little = f"{text} holds {total:,} bytes of usable text{note}, too little to train on"
            raise DataError(f"{little}; give {MIN_BYTES:,} bytes or more of UTF-8 text, as a file or a folder")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return Corpus(out, count, total, cut, (*skipped, *(losses.lines() if losses.skipped else [])))


def _write(path: Path, documents: Iterable[tuple[str, str]], max_bytes: int) -> tuple[int, int, bool]:
    """Write documents, each content once, until one does not fit: number, bytes, whether any is left."""
    seen, total = set[bytes](), 0
    with path.open("w", encoding="utf-8") as file:
        for source, body in documents:
            raw = body.encode("utf-8")
            if total + len(raw) > max_bytes:
                return len(seen), total, True
            digest = hashlib.blake2b(raw, digest_size=16).digest()
            if digest not in seen and body.strip():
                seen.add(digest)
                total += len(raw)
                file.write(json.dumps({"text": body, "source": source}, ensure_ascii=False) + "\n")
    return len(seen), total, False


def _modules(lib: Path, skipped: list[str]) -> Iterator[tuple[str, str]]:
    """The standard library's modules, ordered by a hash of their names: any part of it is a fair one."""
    names = []
    for path in (path.relative_to(lib) for path in lib.rglob("*.py")):
        generated = path.name.startswith("_sysconfigdata") or path.parts[0].startswith("config-")
        if not LEFT_OUT.intersection(path.parts) and not generated:
            names.append(path.as_posix())
    for name in sorted(names, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest()):
        try:
            yield name, (lib / name).read_text("utf-8")
        except (UnicodeDecodeError, OSError) as error:
            skipped.append(f"{name}: {'not UTF-8' if isinstance(error, UnicodeDecodeError) else error.strerror}")


def _topics() -> Iterator[tuple[str, str]]:
    with suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics

        yield from ((f"topic {name}", topics[name]) for name in sorted(topics))


def _own(reader: RecordReader, losses: Losses) -> Iterator[tuple[str, str]]:
    """The documents of the reader's text, cut to pieces that make at least MIN_DOCUMENTS."""
    size = min(MAX_PIECE_BYTES, max(1024, reader.bytes_total // MIN_DOCUMENTS))
    for record, body in losses.texts(reader):
        where = place(record)
        yield from ((f"{where} part {number}", piece) for number, piece in enumerate(pieces(body, size)))


def pieces(text: str, size: int) -> Iterator[str]:
    """Cut a text into pieces of `size` to twice as many characters: after a blank line, a line, or anywhere."""
    start = 0
    while (last := start + 2 * size) < len(text):
        blank, line = (text.find(end, start + size, last) for end in ("\n\n", "\n"))
        end = blank + 2 if blank >= 0 else line + 1 or last
        yield text[start:end]
        start = end
    yield text[start:]
