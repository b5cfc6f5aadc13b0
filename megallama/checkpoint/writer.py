"""Writing one checkpoint: every rank its own bytes, and none of them counts until all of them are safe.

    1. rank 0 creates step-N.tmp with all files in their final size (a full disk shows here)
    2. every rank writes the byte runs of the boxes it owns
    3. every rank makes its writes durable (fsync) and digests its share of the blocks
    4. rank 0 writes the manifest, fsyncs the folders, renames step-N.tmp to step-N, fsyncs the parent

After each phase the ranks agree (see `errors.agree`); if any failed, nothing is committed and the
temporary folder is removed.  No rank ever holds another rank's data.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallama.checkpoint import manifest
from megallama.checkpoint.errors import CheckpointError, agree
from megallama.checkpoint.layout import DTYPES, FileSet, Place
from megallama.comm.group import Group
from megallama.layers.shard import StateShard
from megallama.plan.box import Box, boxes_of_range, runs

CHUNK_ELEMENTS = 4 << 20  # elements converted at a time


@dataclass(frozen=True)
class Content:
    """What a checkpoint is to contain, besides the state: equal on every rank."""

    final: Path
    sets: Mapping[str, FileSet]
    small: Mapping[str, bytes]  # whole files by name, e.g. model/config.json
    body: dict[str, Any]  # the manifest without its digests
    block_bytes: int

    @property
    def temporary(self) -> Path:
        """Where it is written before it is complete."""
        return self.final.with_name(self.final.name + ".tmp")

    def sizes(self) -> dict[str, int]:
        """Final size of every file, in a fixed order."""
        sizes = {f.name: f.size for s in self.sets.values() for f in s.files}
        return dict(sorted((sizes | {name: len(data) for name, data in self.small.items()}).items()))


def write_checkpoint(content: Content, shards: Sequence[StateShard], group: Group) -> None:
    """Write and commit one checkpoint; every rank of `group` calls it with the shards it owns.

    Raises: CheckpointError on every rank, naming the rank that failed and why; then nothing was
    committed and the temporary folder is gone.
    """
    what = f"saving {content.final} failed, the checkpoints before it are untouched"
    first = group.rank == 0
    try:
        agree(group, what, lambda: create_files(content) if first else None)
        written = agree(group, what, lambda: _write_shards(content, shards))
        agree(group, what, lambda: _check_complete(content, sum(written)))
        names = _touched(content, shards) if not first else list(content.sizes())
        digests = agree(group, what, lambda: _secure(content, names, group))
        agree(group, what, lambda: _commit(content, [d for part in digests for d in part]) if first else None)
    except BaseException:
        if first:
            shutil.rmtree(content.temporary, ignore_errors=True)
        raise


def create_files(content: Content) -> None:
    """Make the temporary folder and all files in final size, with headers and small files written."""
    folder, sizes = content.temporary, content.sizes()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    if (free := _free_bytes(folder.parent)) < sum(sizes.values()):
        raise _no_space(content, free)
    headers = {f.name: f.header for s in content.sets.values() for f in s.files}
    for name, size in sizes.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with _opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd, explained(content):
            _allocate(fd, size)
            write_at(fd, memoryview(headers.get(name) or content.small[name]), 0)


def _no_space(content: Content, free: int) -> CheckpointError:
    return CheckpointError(
        f"no space left in {content.final.parent}: a checkpoint needs {sum(content.sizes().values())} bytes, "
        f"{free} are free; make room, lower checkpoint.keep_last, or choose another folder (checkpoint.folder)"
    )


@contextmanager
def explained(content: Content) -> Iterator[None]:
    """Turn a full disk (or quota, or file size limit) into an error with numbers."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise _no_space(content, _free_bytes(content.final.parent)) from error


def _free_bytes(folder: Path) -> int:
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def _allocate(fd: int, size: int) -> None:
    """Give the file its size, with its blocks reserved where the file system can."""
    try:
        if size:
            os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)


def _write_shards(content: Content, shards: Sequence[StateShard]) -> int:
    """Write this rank's byte runs, each shard asked for once; returns the number of elements."""
    written = 0
    with OpenFiles(content.temporary) as files, explained(content):
        for shard in shards:
            assert shard.master.numel() == shard.box.numel, shard.box
            for kind, tensor in shard.state().items():
                _write_box(files, content.sets[kind].places[shard.box.key], shard.box, tensor)
            _write_box(files, content.sets["model"].places[shard.box.key], shard.box, shard.master)
            written += shard.box.numel
    return written


def _write_box(files: OpenFiles, place: Place, box: Box, tensor: Tensor) -> None:
    fd, item = files.open(place.file), place.item_bytes
    for start in range(0, box.numel, CHUNK_ELEMENTS):
        stop = min(start + CHUNK_ELEMENTS, box.numel)
        data = as_bytes(tensor[start:stop].detach().to("cpu", DTYPES[place.dtype]))
        at = 0
        for part in boxes_of_range(box, start, stop):
            for first, count in runs(part, place.shape):
                write_at(fd, data[at : at + count * item], place.offset + first * item)
                at += count * item


def as_bytes(tensor: Tensor) -> memoryview:
    """The elements in row-major order."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _check_complete(content: Content, written: int) -> None:
    """Every element has exactly one owner, or the files would have holes."""
    want = sum(prod(place.shape) for place in content.sets["model"].places.values())
    if written != want:
        raise CheckpointError(f"the ranks hold {written} elements of state, the model has {want}")


def _touched(content: Content, shards: Sequence[StateShard]) -> list[str]:
    keys = {shard.box.key for shard in shards}
    return sorted({s.places[key].file for s in content.sets.values() for key in keys})


def _secure(content: Content, names: Sequence[str], group: Group) -> list[str]:
    """Make this rank's files durable, and meanwhile digest its share of all blocks (read back from the cache)."""
    with ThreadPoolExecutor(1) as pool:
        durable = pool.map(lambda name: sync(content.temporary / name), names)
        digests = _digest_share(content, group)
        list(durable)  # raises what an fsync raised
    return digests


def _digest_share(content: Content, group: Group) -> list[str]:
    block = content.block_bytes
    blocks = [(n, i) for n, size in content.sizes().items() for i in range(manifest.block_count(size, block))]
    a, b = (len(blocks) * r // group.size for r in (group.rank, group.rank + 1))
    with OpenFiles(content.temporary) as files:
        return [manifest.digest(os.pread(files.open(name), block, i * block)) for name, i in blocks[a:b]]


def _commit(content: Content, digests: list[str]) -> None:
    """Write the manifest and give the folder its name."""
    sizes, left = content.sizes(), iter(digests)
    blocks = {n: [next(left) for _ in range(manifest.block_count(s, content.block_bytes))] for n, s in sizes.items()}
    body = content.body | {"block_bytes": content.block_bytes, "files": manifest.file_records(sizes, blocks)}
    write_durably(content.temporary / manifest.NAME, manifest.render(body))
    for folder in sorted({content.temporary, *((content.temporary / n).parent for n in sizes)}):
        sync(folder)
    if content.final.exists():  # a step that was done again after going back; `recover_folder` knows ".old"
        os.rename(content.final, content.final.with_name(content.final.name + ".old"))
    os.rename(content.temporary, content.final)
    sync(content.final.parent)


def point_latest(final: Path) -> None:
    """Write the hint file `latest`; the truth is the newest folder whose manifest verifies."""
    temporary = final.with_name("latest.tmp")
    write_durably(temporary, (final.name + "\n").encode())
    os.rename(temporary, final.with_name("latest"))


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint so that no moment shows half of it under its name."""
    trash = folder.with_name(folder.name + ".tmp")
    os.rename(folder, trash)
    shutil.rmtree(trash)


def recover_folder(folder: Path) -> list[str]:
    """Clean up after a crash: remove unfinished saves, finish an interrupted replacement. Returns what was done."""
    done = []
    for path in sorted(folder.glob("step-*.old")):
        final = path.with_suffix("")
        if final.exists():
            remove_checkpoint(path)
        else:
            os.rename(path, final)
            done.append(f"restored {final.name}, whose replacement was not finished")
    for path in sorted([*folder.glob("step-*.tmp"), *folder.glob("latest.tmp")]):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        done.append(f"removed {path.name}, which was not finished")
    return done


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file and fsync it."""
    with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        write_at(fd, memoryview(data), 0)
        os.fsync(fd)


def sync(path: Path) -> None:
    """Make a file or folder durable."""
    with _opened(path, os.O_RDONLY) as fd:
        os.fsync(fd)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data`."""
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


class OpenFiles:
    """File descriptors of a folder by name, opened when first asked for, closed together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fds: dict[str, int] = {}

    def open(self, name: str) -> int:
        """The descriptor of a file, open for reading and writing."""
        if name not in self._fds:
            self._fds[name] = os.open(self._folder / name, os.O_RDWR | os.O_CLOEXEC)
        return self._fds[name]

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])
