"""A corpus for the first run: text that every Python installation carries, or the reader's own.

The default is the source code of the standard library (a document per module) and the texts of `help()` (a document
per topic): a few megabytes of coherent text without a download.  Of the reader's own text, long documents are cut at
paragraph or line ends, so that even one book has documents to hold out.
"""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megallama.config.errors import DataError
from megallama.data.blocks import write_whole
from megallama.text.documents import RecordReader, place
from megallama.text.inputs import Losses

FOLDERS = "site-packages|dist-packages|test|tests|idle_test|encodings|pydoc_data|__pycache__"
LEFT_OUT = re.compile(f"config-|(.*/)?(_sysconfigdata|({FOLDERS})/)")
MIN_BYTES = 100_000  # of the reader's own text
MIN_DOCUMENTS, MAX_PIECE_BYTES = 64, 16_384  # the sizes into which long documents are cut follow from these


@dataclass(frozen=True)
class Corpus:
    """What `build_corpus` wrote."""

    path: Path
    documents: int
    text_bytes: int
    skipped: tuple[str, ...]  # lines that tell what was left out, and why


def build_corpus(out: Path, max_bytes: int, text: Path | None = None, *, stdlib: Path | None = None) -> Corpus:
    """Write at most `max_bytes` as JSON lines {"text", "source"}: the default corpus, or `text` (file, folder).

    Each content stands there once. The same installation (or text) always gives the same bytes.
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
        reader = RecordReader(losses.find([text], skipped.append))
        if not reader.bytes_total:
            raise DataError(f"{text} is empty; give a file or folder with {MIN_BYTES:,} bytes of text or more")
        size = min(MAX_PIECE_BYTES, max(1024, reader.bytes_total // MIN_DOCUMENTS))
        documents = (
            (f"{place(record)} part {number}", piece)
            for record, body in losses.texts(reader)
            for number, piece in enumerate(pieces(body, size))
        )
    sources, total = dict[str, str](), 0  # by content
    for source, body in documents:
        if (grown := total + len(body.encode())) > max_bytes:
            break
        if body not in sources and body.strip():
            sources[body], total = source, grown
    losses.check()
    if text is not None and total < MIN_BYTES:
        note = f" ({len(skipped)} skipped, the first: {skipped[0]})" if skipped else ""
        little = f"{text} holds {total:,} bytes of usable text{note}, too little to train on"
        raise DataError(f"{little}; give {MIN_BYTES:,} bytes or more of UTF-8 text, as a file or a folder")
    lines = (json.dumps({"text": body, "source": sources[body]}, ensure_ascii=False) for body in sources)
    write_whole(out, "".join(line + "\n" for line in lines).encode())
    return Corpus(out, len(sources), total, (*skipped, *(losses.lines() if losses.skipped else [])))


def _modules(lib: Path, skipped: list[str]) -> Iterator[tuple[str, str]]:
    """The standard library's modules, ordered by a hash of their names: any part of it is a fair one."""
    names = [path.relative_to(lib).as_posix() for path in lib.rglob("*.py")]
    for name in sorted(names, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest()):
        if LEFT_OUT.match(name):
            continue
        try:
            yield name, (lib / name).read_text("utf-8")
        except (UnicodeDecodeError, OSError) as error:
            skipped.append(f"{name}: {'not UTF-8' if isinstance(error, UnicodeDecodeError) else error.strerror}")


def _topics() -> Iterator[tuple[str, str]]:
    with suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics

        yield from ((f"topic {name}", topics[name]) for name in sorted(topics))


def pieces(text: str, size: int) -> Iterator[str]:
    """Cut a text into pieces of `size` to twice as many characters: after a blank line, a line, or anywhere."""
    start = 0
    while (last := start + 2 * size) < len(text):
        blank, line = (text.find(end, start + size, last) for end in ("\n\n", "\n"))
        end = blank + 2 if blank >= 0 else line + 1 or last
        yield text[start:end]
        start = end
    yield text[start:]
