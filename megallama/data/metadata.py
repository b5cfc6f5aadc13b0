"""PREFIX.json, what preprocessing recorded about a .bin/.idx pair: counts, the tokenizer, the pair's fingerprint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megallama.data.errors import DataError


def read_metadata(prefix: str) -> dict[str, Any]:
    """What preprocessing recorded in PREFIX.json; {} where there is no such file (a corpus of another tool)."""
    path = Path(prefix + ".json")
    if not path.is_file():
        return {}
    try:
        metadata = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); preprocess the text again, or delete this file") from error
    if not isinstance(metadata, dict):
        raise DataError(f"{path} is damaged (it holds no object); preprocess the text again, or delete this file")
    for key in ("documents", "tokens", "bytes", "vocab_size"):
        if key in metadata and (type(metadata[key]) is not int or metadata[key] < 0):
            raise DataError(f"{path} is damaged ({key} is {metadata[key]!r}); preprocess the text again, or delete it")
    return metadata


def write_metadata(prefix: str, metadata: Mapping[str, Any]) -> None:
    """Write PREFIX.json, as `write_whole` does."""
    write_whole(Path(prefix + ".json"), json.dumps(metadata, indent=2).encode() + b"\n")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all. Raises: DataError where the disk does not take it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror}; make room and start again") from error
