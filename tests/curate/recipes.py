"""Recipes, raw texts and archives for the tests of curation."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from megallama.curate.recipe import Recipe
from megallama.curate.stage import Document

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "curate"


def recipe(folder: Path, stages: list[dict[str, Any]], **more: Any) -> Recipe:
    """One source, `web`, of everything in a folder."""
    source = {"name": "web", "inputs": (str(folder),), "stages": tuple(stages), "keys": ("id",)}
    return Recipe.model_validate({"sources": (source,), "unit_mb": 0.001} | more)


def write_rows(path: Path, texts: list[str]) -> None:
    """JSON lines with ids: the name of the file and a number."""
    rows = (json.dumps({"text": text, "id": f"{path.stem}-{n}"}) + "\n" for n, text in enumerate(texts))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(rows))


def read_rows(output: Path, source: str = "web") -> list[dict[str, Any]]:
    """The documents of a finished run, in order."""
    shards = sorted((output / source).glob("*.jsonl"))
    return [json.loads(line) for shard in shards for line in shard.read_text("utf-8").splitlines()]


def judged(stages: tuple[Any, ...], text: str, **meta: str) -> tuple[str, str]:
    """Take a text through stages that need no other: why it goes, and what it has become."""
    document = Document(text, "x", "web", {}, meta)
    for stage in stages:
        if reason := stage.start()(document):
            return reason, document.text
    return "", document.text


def response(number: int, body: bytes, http: str = "200 OK", fields: str = "Content-Type: text/html") -> bytes:
    """A WARC record of a page."""
    content = f"HTTP/1.1 {http}\r\n{fields}\r\n\r\n".encode() + body
    about = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://x/{number}\r\n"
    about += f"WARC-Record-ID: <urn:uuid:{number}>\r\nContent-Type: application/http; msgtype=response\r\n"
    return f"{about}Content-Length: {len(content)}\r\n\r\n".encode() + content + b"\r\n\r\n"


def packed(*records: bytes) -> bytes:
    """Records as crawls pack them, each a gzip member."""
    return b"".join(gzip.compress(record, mtime=0) for record in records)
