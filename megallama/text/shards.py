"""Finished pieces of a preprocessing run on disk, from which a run that was killed goes on.

PREFIX.parts/DIGEST/ holds, for every process of every start of the same command,

    NAME.tokens      token ids of the process's finished tasks, and perhaps of one unfinished one
    NAME.documents   int32 [n, 2] of the same documents: tokens, bytes of text
    NAME.journal     a line of JSON per finished task (`TextShard`), written last

DIGEST is of everything the tokens follow from: shards of another input or option never mix in.
Each file has one writer and only grows.  Checksums show what a power failure left incomplete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np

from megallama.config.errors import DataError
from megallama.text.documents import EMPTY, BadRecord, Record, parse

SPAN = 1 << 21  # bytes of tokens read at a time
ROWS = 4096  # documents read at a time
MAX_EXAMPLES = 20  # bad records described one by one; all are counted


@dataclass
class TextShard:
    """What became of one task: where its documents lie, and the records it skipped."""

    job: int  # the task's number
    name: str = ""
    token_bytes_at: int = 0
    document_bytes_at: int = 0
    documents: int = 0
    token_bytes: int = 0
    checksums: list[int] = field(default_factory=lambda: [0, 0])  # crc32 of its tokens, of its documents
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[str, int, int, str]] = field(default_factory=list)  # file, line, origin, reason
    counts: dict[str, list[int]] = field(default_factory=dict)  # file -> its good, bad and empty records
    changed: Counter[str] = field(default_factory=Counter)  # what was changed in good records
    faults: dict[str, str] = field(default_factory=dict)  # files that cannot be read

    def text(self, record: Record, json_key: str) -> tuple[str, int] | None:
        """The text of a record and its size in bytes; None for a bad one, which is noted."""
        counts = self.counts.setdefault(record.file, [0, 0, 0])
        try:
            text, size, changed = parse(record, json_key)
        except BadRecord as error:
            if record.whole:
                self.faults.setdefault(record.file, str(error))
                return None
            if len(self.examples) < MAX_EXAMPLES or not any(counts[1:]):  # every file has one, its reason
                self.examples.append((record.file, record.line, record.origin, str(error)))
            self.skipped[error.fault[0]] += 1
            counts[1 + (error.fault[0] == EMPTY)] += 1
            return None
        counts[0] += 1
        self.changed.update([changed] if changed else [])
        return text, size


class ShardWriter:
    """The three files of a process. `sync`: other nodes read them after every task."""

    def __init__(self, folder: Path, name: str, *, sync: bool) -> None:
        self.name, self._sync = name, sync
        kinds = ("tokens", "documents", "journal")
        self._files = [open(folder / f"{name}.{kind}", "xb", buffering=1 << 18) for kind in kinds]

    def begin(self, task: int) -> TextShard:
        """Start the shard of a task; what an abandoned one wrote stays and is never read."""
        self.shard = TextShard(task, self.name, self._files[0].tell(), self._files[1].tell())
        return self.shard

    def add(self, tokens: np.ndarray, rows: np.ndarray) -> None:
        """Append documents: tokens [T] back to back, rows int32 [n, 2] (tokens, bytes of text)."""
        for i, array in enumerate((tokens, rows)):
            data = array.tobytes()
            self._files[i].write(data)
            self.shard.checksums[i] = crc32(data, self.shard.checksums[i])
        self.shard.documents += len(rows)
        self.shard.token_bytes += tokens.nbytes

    def end(self) -> TextShard:
        """Finish the shard: only with its line in the journal does it exist."""
        line = json.dumps(vars(self.shard)).encode() + b"\n"
        for file, rest in zip(self._files, (b"", b"", line), strict=True):
            file.write(rest)
            file.flush()
            if self._sync:
                os.fsync(file.fileno())
        return self.shard


class WorkFolder(AbstractContextManager["WorkFolder"]):
    """PREFIX.parts while a run uses it: locked, so that no second run writes the same output.

    `origin`: everything the tokens follow from.  The end of the `with` block removes the folder; an error
    does so only before any shard was finished.
    """

    def __init__(self, out: str, origin: Mapping[str, Any]) -> None:
        self._root, self.path = Path(out + ".parts"), folder_of(out, origin)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # any other is of a file system without locks
            if isinstance(error, BlockingIOError):
                os.close(self._lock)
                raise DataError(f"another process is writing {out} now; wait for it, or use another --output") from None
        self._journals = sorted(self.path.glob("*.journal"))
        self.start = 1 + max((int(path.stem.split("-")[0]) for path in self._journals), default=-1)

    def finished(self) -> dict[int, TextShard]:
        """Shards of earlier starts by task, but for those that lacked what may be readable now."""
        found = {}
        for path in self._journals:
            files = [path.with_suffix(suffix) for suffix in (".tokens", ".documents")]
            sizes = [file.stat().st_size if file.exists() else 0 for file in files]
            for line in path.read_bytes().split(b"\n")[:-1]:
                with suppress(ValueError, TypeError):  # after a power failure a line may be anything
                    shard = TextShard(**json.loads(line))
                    ends = (shard.token_bytes_at + shard.token_bytes, shard.document_bytes_at + 8 * shard.documents)
                    whole = all(end <= size for end, size in zip(ends, sizes, strict=True))
                    if whole and not shard.faults and (shard.counts or not shard.skipped):
                        found[shard.job] = shard
        return found

    def read(self, shard: TextShard, dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Its documents, about SPAN bytes at a time: tokens [T], rows [n, 2]. Raises: DataError."""
        sums = [0, 0]

        def take(file: BinaryIO, kind: np.dtype, count: int, which: int) -> np.ndarray:
            data = file.read(count * kind.itemsize)
            sums[which] = crc32(data, sums[which])
            if len(data) != count * kind.itemsize:
                raise DataError(f"{self.path}/{shard.name} is cut off; delete {self._root} and start again")
            return np.frombuffer(data, kind)

        name = self.path / shard.name
        with open(f"{name}.tokens", "rb") as tokens, open(f"{name}.documents", "rb") as documents:
            tokens.seek(shard.token_bytes_at)
            documents.seek(shard.document_bytes_at)
            for first in range(0, shard.documents, ROWS):
                rows = take(documents, np.dtype("<i4"), 2 * min(ROWS, shard.documents - first), 1).reshape(-1, 2)
                ends = np.cumsum(rows[:, 0], dtype=np.int64) * dtype.itemsize
                for piece in np.split(rows, np.flatnonzero(np.diff(ends // SPAN)) + 1):
                    yield take(tokens, dtype, int(piece[:, 0].sum(dtype=np.int64)), 0), piece
        if sums != shard.checksums:
            raise DataError(f"{self.path}/{shard.name} is damaged; delete {self._root} and start again")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not begun(self._root):
            shutil.rmtree(self._root, ignore_errors=True)
        os.close(self._lock)


def begun(folder: Path) -> bool:
    """Whether an earlier start finished a shard that lies anywhere below a folder."""
    return any(path.stat().st_size for path in folder.rglob("*.journal"))


def folder_of(prefix: str, origin: Mapping[str, Any]) -> Path:
    """Where the shards of this output lie that are made from this origin."""
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
    return Path(prefix + ".parts") / digest[:16]
