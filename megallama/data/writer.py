"""Writing tokenized corpora, in bounded memory: the .bin/.idx pair, its .sums and PREFIX.json.

`data.indexed` and `data.blocks` have the formats; a training run reads them and imports nothing of this.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from megallama.config.errors import DataError, say
from megallama.data import blocks
from megallama.data.blocks import BLOCK, File
from megallama.data.indexed import CHUNK, CODES, HEADER, MAGIC, strip_suffix


def dtype_for(vocab_size: int) -> np.dtype:
    """The token type of a corpus: uint16 below 65,500 token ids (Megatron's own limit), else int32."""
    return CODES[8] if vocab_size < 65500 else CODES[4]


def write_metadata(prefix: str, metadata: Mapping[str, Any]) -> None:
    """Write PREFIX.json, whole or not at all. Raises: DataError."""
    write_whole(Path(prefix + ".json"), json.dumps(metadata, indent=2).encode() + b"\n")


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time writes an output: hold its lock, a file beside it that is gone afterwards.

    Raises: DataError if another has it.
    """
    whole = path.absolute()
    lock, new = whole.parent / f".{whole.name}.lock", [folder for folder in whole.parents if not folder.exists()]
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                why = "it is one process that does this, not each of srun's or mpirun's"
                raise DataError(f"another process is writing {path} now; wait for it ({why})") from None
            except OSError:  # of a file system without locks
                pass
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    finally:
        for folder in new:  # what nothing was written into goes again
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Name the file in an error of writing, which the system does not. Raises: DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; nothing there was replaced") from error


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


class SumsWriter:
    """Writes the checksums of a pair: the bytes of .bin pass by, .idx is read at the end."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "wb", buffering=1 << 16)  # noqa: SIM115
        self.file.write(bytes(blocks.HEADER.size))
        self._rest, self._table = b"", 0

    def add(self, data: bytes, *, last: bool = False) -> None:
        """The next bytes of .bin; `last`: they end it."""
        data = self._rest + data
        end = len(data) if last else len(data) // BLOCK * BLOCK
        view = memoryview(data)[:end]
        entries = np.array([crc32(view[at : at + BLOCK]) for at in range(0, end, BLOCK)], "<u4").tobytes()
        self.file.write(entries)
        self._table, self._rest = crc32(entries, self._table), data[end:]

    def finish(self, data: File, idx: File) -> None:
        """End .bin, add all of .idx, and write the header."""
        self.add(b"", last=True)
        for at in range(0, idx.size, BLOCK):
            self.add(idx.read(at, min(BLOCK, idx.size - at)))
        self.add(b"", last=True)
        self.file.seek(0)
        self.file.write(blocks.HEADER.pack(blocks.MAGIC, data.size, idx.size, self._table))
        self.file.flush()


class IndexedWriter(AbstractContextManager["IndexedWriter"]):
    """Writes a .bin/.idx pair and its .sums as a stream, in constant memory.

    The end of the `with` block gives them their names, an exception removes them (PREFIX.bin.tmp and so on).
    Raises: DataError if they cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix, self.dtype = strip_suffix(prefix), np.dtype(dtype)
        if self.prefix.endswith(("/", "/.", "/..")) or self.prefix in ("", ".", ".."):
            raise DataError(f"{self.prefix!r} is a folder and no name of a pair; write for example {self.prefix}/text")
        self.num_documents = self.num_tokens = 0
        self._code = next(code for code, kind in CODES.items() if kind == self.dtype)
        with ExitStack() as stack, naming(self.prefix + ".bin and .idx"):
            stack.enter_context(alone(Path(self.prefix)))
            self._sums = SumsWriter(self.prefix + ".sums.tmp")
            names = (f"{self.prefix}{suffix}.tmp" for suffix in (".bin", ".idx"))
            self._bin, self._idx = (open(name, "w+b", buffering=CHUNK) for name in names)
            self._alone = stack.pop_all()
        self._files = (self._sums.file, self._bin, self._idx)
        self._idx.write(bytes(HEADER.size))

    def add(self, tokens: np.ndarray, lengths: np.ndarray | None = None) -> None:
        """Append a document `tokens` [T], or several of `lengths` [n]. Raises: DataError for an id too large."""
        lengths = np.array([len(tokens)]) if lengths is None else lengths
        assert int(lengths.sum()) == len(tokens), (lengths.sum(), len(tokens))
        if len(tokens) and tokens.dtype != self.dtype:
            low, high, top = int(tokens.min()), int(tokens.max()), int(np.iinfo(self.dtype).max)
            if low < 0 or high > top:
                what = f"token id {low if low < 0 else high} does not fit {self.dtype.name} (0..{top})"
                raise DataError(f"{self.prefix}: {what}; write it as int32")
        data = tokens.astype(self.dtype, copy=False).tobytes()
        with naming(self.prefix + ".bin and .idx"):
            self._bin.write(data)
            self._sums.add(data)
            self._idx.write(lengths.astype("<i4").tobytes())
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)

    def finish(self) -> None:
        """Bring everything to the disk; what is left for the block's end is to rename."""
        if self._bin.closed:
            return
        with naming(self.prefix + ".bin and .idx"):
            self._write_index()
            self._bin.flush()
            self._idx.flush()
            self._sums.finish(File(self._bin.name), File(self._idx.name))
            for file in self._files:
                os.fsync(file.fileno())
                file.close()

    def _write_index(self) -> None:
        count, offset = self.num_documents, 0
        for first in range(0, count, CHUNK):
            self._idx.seek(HEADER.size + 4 * first)
            lengths = np.frombuffer(self._idx.read(4 * min(CHUNK, count - first)), "<i4").astype(np.int64)
            ends = offset + np.cumsum(lengths) * self.dtype.itemsize
            self._idx.seek(HEADER.size + 4 * count + 8 * first)
            self._idx.write(np.append(offset, ends[:-1]).astype("<i8").tobytes())
            offset = int(ends[-1])
        self._idx.seek(HEADER.size + 12 * count)
        for first in range(0, count + 1, CHUNK):
            self._idx.write(np.arange(first, min(first + CHUNK, count + 1), dtype="<i8").tobytes())
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, 1, self._code, count, count + 1))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
                if Path(self.prefix + ".bin").exists():
                    say(f"{self.prefix}.bin was there, and is replaced")
                for suffix in (".json", ".idx", ".sums"):  # what is old must never stand beside new tokens
                    Path(self.prefix + suffix).unlink(missing_ok=True)
                for suffix in (".bin", ".sums", ".idx"):  # the index last: a pair with an index is whole
                    os.replace(f"{self.prefix}{suffix}.tmp", self.prefix + suffix)
        finally:
            for file in self._files:
                with suppress(OSError):  # a full disk refuses again what is still buffered
                    file.close()
                Path(file.name).unlink(missing_ok=True)
            self._alone.close()
