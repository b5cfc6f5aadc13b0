"""Files, of ours and from anywhere: what is damage, and what only stands in the way.

A shared file system fails for a while: files are opened twice before they are damaged; errors get `PATIENCE_SECONDS`.
"""

import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path
from typing import Any, TypeVar

from megallama.config.errors import MegallamaError

PATIENCE_SECONDS = 30.0
JSON_BYTES = 25_000_000  # the most that is read of a configuration, an index or a header
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV)
HEAD = 1 << 20  # bytes of a copy before its data: 8 for a text's length, its SHA-256, the text
_TEXT = 8 + 32

T = TypeVar("T")


class CheckpointError(MegallamaError):
    """A checkpoint that cannot be written or used."""


class DamagedError(CheckpointError):
    """Bytes are not what was saved; the message names the file, and the block."""

    decisive = True  # damage that one rank sees is what a load ends with


class MissingError(DamagedError):
    """A file is not there; that is damage only if no rank sees it."""


class UnreadableError(CheckpointError):
    """A file cannot be read now, so nothing is known about its contents."""

    shared = True


def patiently(work: Callable[[Path], T], path: Path) -> T:
    """work(path), again while errors may pass. Raises: MissingError; UnreadableError."""
    since, pause = time.monotonic(), 0.05
    while True:
        try:
            return work(path)
        except OSError as error:
            tried, why = time.monotonic() - since, error.strerror or error
            if error.errno in _ABSENT:
                raise MissingError(f"{path} cannot be opened: {why}") from None
            if isinstance(error, PermissionError):
                why = f"{why} for user id {os.geteuid()}; use chmod or chown"
            if isinstance(error, PermissionError) or tried >= PATIENCE_SECONDS:
                raise UnreadableError(f"{path} cannot be read, tried for {tried:.0f} s: {why}") from error
            time.sleep(pause)
            pause = min(2 * pause, 2.0)


def exists(path: Path) -> bool:
    """Whether the name is there, whatever it is. Raises: UnreadableError."""
    try:
        return patiently(os.lstat, path) is not None
    except MissingError:
        return False


def names(folder: Path) -> list[str]:
    """The names in a folder, in order; none without it. Raises: as `patiently`."""
    return sorted(patiently(os.listdir, folder)) if exists(folder) else []


def open_file(path: Path, size: int | None = None) -> tuple[int, int]:
    """(descriptor, size). Raises: DamagedError if it is no regular file, or not of `size`."""
    for _ in range(2):
        fd, found = patiently(_open, path)
        if size is None or found == size:
            return fd, found
        os.close(fd)
    raise DamagedError(f"{path} has {found} bytes instead of {size}")


def _open(path: Path) -> tuple[int, int]:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise DamagedError(f"{path} is not a regular file")
    return fd, found.st_size


def read_at(fd: int, out: memoryview, offset: int) -> int:
    """Fill `out` with the bytes from `offset` on; how many there were. Raises: OSError."""
    filled = 0
    while filled < len(out) and (count := os.preadv(fd, [out[filled:]], offset + filled)):
        filled += count
    return filled


def read_again(path: Path, out: memoryview, offset: int) -> int:
    """`read_at` of the file opened again, past this machine's cache. Raises: as `patiently`."""

    def work(path: Path) -> int:
        with opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
            os.posix_fadvise(fd, offset, len(out), os.POSIX_FADV_DONTNEED)
            return read_at(fd, out, offset)

    return patiently(work, path)


def read_file(path: Path, most: int = JSON_BYTES) -> bytes:
    """A whole file. Raises: DamagedError for more than `most` bytes; as `patiently`."""
    fd, size = open_file(path)
    os.close(fd)
    if size > most:
        raise DamagedError(f"{path} has {size:,} bytes; a file of this kind has at most {most:,}")
    data = bytearray(size)
    return bytes(data[: read_again(path, memoryview(data), 0)])


def parse_object(data: bytes) -> dict[str, Any]:
    """The object in JSON. Raises: ValueError."""
    try:
        if isinstance(found := json.loads(data), dict):
            return found
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    raise ValueError("it holds no JSON object")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: CheckpointError."""
    try:
        return parse_object(read_file(path))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor that is closed afterwards. Raises: OSError."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file and fsync it."""
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        write_at(fd, memoryview(data), 0)
        os.fsync(fd)


def sync(path: Path) -> None:
    """Make a file or folder durable."""
    with opened(path, os.O_RDONLY) as fd:
        os.fsync(fd)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data`."""
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def read_head(memory: memoryview | mmap) -> dict[str, Any]:
    """What a copy in memory says of itself; nothing where that is damaged or not whole."""
    size = int.from_bytes(memory[:8], "little")
    text = bytes(memory[_TEXT : _TEXT + size]) if 0 < size <= HEAD - _TEXT else b""
    if not text or hashlib.sha256(text).digest() != bytes(memory[8:_TEXT]):
        return {}
    return dict(json.loads(text))


def write_head(memory: memoryview | mmap, said: dict[str, Any]) -> None:
    """Say it of data that are there; what is too long is not said, and the copy is none."""
    text = json.dumps(said).encode()
    if len(text) <= HEAD - _TEXT:
        memory[8 : _TEXT + len(text)] = hashlib.sha256(text).digest() + text
        memory[:8] = len(text).to_bytes(8, "little")
