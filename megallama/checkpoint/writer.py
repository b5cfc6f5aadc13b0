"""Writing one checkpoint: every rank its own bytes, and none of them counts until all of them are safe.

    1. rank 0 creates all files in their final size, in a folder of another name (a full disk shows)
    2. every rank writes the byte runs of its boxes, digests the blocks that are its alone, and fsyncs behind
    3. the blocks that several ranks wrote to are read back and digested, each rank its share
    4. rank 0 writes the manifest, fsyncs the folders, renames the one to step-N, fsyncs the parent

A phase that fails on one rank has failed on all (`on_all_ranks`): nothing is committed.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import compress, islice
from math import isfinite, prod
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from megallama.checkpoint import manifest
from megallama.checkpoint.disk import CheckpointError, opened, read_at, sync, write_at, write_durably
from megallama.checkpoint.folder import REPLACED, remove_checkpoint, unfinished
from megallama.checkpoint.manifest import DTYPES, FileSet, TensorPlace
from megallama.comm.group import Assembly, on_all_ranks
from megallama.layers.param import Shard, digest
from megallama.plan.box import Box, boxes_of_range, runs

CHUNK_ELEMENTS = 1 << 20  # handled while they are in the processor's cache
THREADS = 2  # that write; more would take cores from a training that goes on
FLUSH_BYTES = 256 << 20  # written between two requests to the disk
Digests = list[tuple[str, int, str]]  # file, block, digest
fallocate = ctypes.CDLL(None, use_errno=True).fallocate


class NotFiniteError(CheckpointError):
    """What was to be saved holds inf or nan; the message names the tensor and the rank."""

    status = 3


@dataclass(frozen=True)
class Content:
    """What a checkpoint is to contain, besides the state: equal on every rank."""

    final: Path
    sets: Mapping[str, FileSet]
    small: Mapping[str, bytes]  # whole files by name, e.g. model/config.json
    body: dict[str, Any]  # the manifest without its files
    block_bytes: int

    @property
    def temporary(self) -> Path:
        return unfinished(self.final)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Final size of every file, in a fixed order."""
        sizes = {name: size for one in self.sets.values() for name, size in one.sizes.items()}
        return dict(sorted((sizes | {name: len(data) for name, data in self.small.items()}).items()))

    def blocks(self) -> Iterator[tuple[str, int]]:
        """(file, index) of every block, in a fixed order."""
        for name, size in self.sizes.items():
            yield from ((name, i) for i in range(-(-size // self.block_bytes)))


class Flusher(ThreadPoolExecutor):
    """A thread that follows the writers with fsync, so that the disk works from the start."""

    def __init__(self, paths: Iterable[Path]) -> None:
        super().__init__(1)
        self.paths, self._written, self._counting = {*paths}, 0, Lock()  # `paths`: what is written
        self._flushes: list[Future[list[None]]] = []

    def wrote(self, count: int) -> None:
        """`count` more bytes were written; any thread."""
        with self._counting:
            self._written += count
            if self._written >= FLUSH_BYTES and all(flush.done() for flush in self._flushes):
                self._written = 0
                self.begin()

    def begin(self) -> None:
        self._flushes.append(self.submit(lambda: list(map(sync, sorted(self.paths)))))

    def finish(self) -> None:
        """Wait for all that was begun. Raises: what an fsync raised."""
        for flush in self._flushes:
            flush.result()


def write_checkpoint(content: Content, shards: Iterable[Shard], group: Assembly) -> None:
    """Write and commit one checkpoint; every rank of `group` calls it with the shards it owns.

    Raises, on every rank: as `on_all_ranks`; NotFiniteError. Then nothing was committed.
    """
    what = f"saving {content.final} failed, the checkpoints before it are untouched"
    first = group.rank == 0
    try:
        on_all_ranks(group, what, lambda: create_files(content) if first else None)
        with Flusher([content.temporary / name for name in content.sizes] if first else []) as flusher:
            # digests are megabytes: rank 0 has them, and says which are missing, a bit each
            written = on_all_ranks(group, what, lambda: _write_shards(content, shards, flusher), collect=True)
            bits = on_all_ranks(group, what, lambda: _shared_blocks(content, written) if first else None)[0]
            blocks = list(content.blocks())
            shared = compress(blocks, map(int, f"{int(bits, 16):0{len(blocks)}b}"))
            own = list(islice(shared, group.rank, None, group.size))
            rest = on_all_ranks(group, what, lambda: _digest_blocks(content, own, flusher), collect=True)
        found = [*(digests for _, digests in written), *rest] if first else []
        digests = {(name, index): digest for part in found for name, index, digest in part}
        on_all_ranks(group, what, lambda: _commit(content, digests) if first else None)
    except BaseException:
        if first:
            shutil.rmtree(content.temporary, ignore_errors=True)
        raise


def create_files(content: Content) -> None:
    """Make the temporary folder, files in final size, with headers and small files."""
    folder, sizes = content.temporary, content.sizes
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    headers = {name: header for one in content.sets.values() for name, header in one.headers.items()}
    with explained(content):
        if shutil.disk_usage(folder.parent).free < sum(sizes.values()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name, size in sizes.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
                _allocate(fd, size)
                write_at(fd, memoryview(headers.get(name) or content.small[name]), 0)


@contextmanager
def open_files(folder: Path) -> Iterator[Callable[[str], int]]:
    """Descriptors of a folder's files by name, opened when first asked for, closed together."""
    with ExitStack() as stack:
        yield cache(lambda name: stack.enter_context(opened(folder / name, os.O_RDWR)))


@contextmanager
def explained(content: Content) -> Iterator[None]:
    """Turn a full disk (quota, file size limit) into a CheckpointError with numbers."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        folder, need = content.final.parent, sum(content.sizes.values())
        raise CheckpointError(
            f"no space left in {folder}: a checkpoint needs {need} bytes, {shutil.disk_usage(folder).free} are free; "
            "make room, lower checkpoint.keep_last, or choose another folder (checkpoint.folder)"
        ) from error


def _allocate(fd: int, size: int) -> None:
    """Give the file its size, with its blocks reserved where the file system can.

    os.posix_fallocate would write to every 4 KiB of the file where it cannot (NFS before 4.2).
    """
    while size and fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        if (number := ctypes.get_errno()) in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return os.ftruncate(fd, size)
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _write_shards(content: Content, shards: Iterable[Shard], flusher: Flusher) -> tuple[int, Digests]:
    """Write this rank's byte runs; how many elements, digests of its own blocks."""
    written, outputs = 0, dict[str, _Output]()
    if isinstance(shards, list):  # in the files' order few blocks have two writers
        places = content.sets["model"].places
        shards = sorted(shards, key=lambda s: (places[s.box.key], s.box))
    with explained(content), open_files(content.temporary) as fd_of, ThreadPoolExecutor(THREADS) as pool:

        def write(place: TensorPlace, box: Box, tensor: Tensor, number: int | None) -> None:
            outputs[place.file].write_box(place, box, tensor)
            if number is not None and int(digest(tensor)) != number:
                raise CheckpointError(
                    f"{box.key} from {[*box.start]} on, for {place.file}, has other bits than when the save began: "
                    "memory of this machine changed; if that happens again take it out"
                )
            flusher.wrote(box.numel * place.item_bytes)

        for shard in shards:  # one after the other: its memory may be that of the next one
            assert shard.state["master"].numel() == shard.box.numel, shard.box
            tensors = shard.state | {"model": shard.state["master"]}
            into = [content.sets[kind].places[shard.box.key] for kind in tensors]
            for name in {place.file for place in into} - outputs.keys():
                outputs[name] = _Output(fd_of(name), content.sizes[name], content)
                flusher.paths.add(content.temporary / name)
            list(pool.map(write, into, [shard.box] * len(into), tensors.values(), map(shard.digests.get, tensors)))
            written += shard.box.numel
        flusher.begin()
    return written, [(name, i, digest) for name, out in outputs.items() for i, digest in out.digests.items()]


class _Output:
    """A file as this rank writes it, with digests of blocks written in order."""

    def __init__(self, fd: int, size: int, content: Content) -> None:
        self._fd, self._size, self._block_bytes = fd, size, content.block_bytes
        self._at = -1
        self._hasher, self._hash = manifest.hasher(content.body["digests"]), None
        self.digests: dict[int, str] = {}

    def write_box(self, place: TensorPlace, box: Box, tensor: Tensor) -> None:
        """Write `box`. Raises: NotFiniteError naming the first element that is inf or nan."""
        item = place.item_bytes
        for start in range(0, box.numel, CHUNK_ELEMENTS):
            stop = min(start + CHUNK_ELEMENTS, box.numel)
            values = tensor[start:stop].detach().to("cpu", DTYPES[place.dtype])
            if not all(map(isfinite, torch.aminmax(values))):  # no run could go on from this
                wrong = start + int(values.isfinite().logical_not().nonzero()[0])
                index = next(boxes_of_range(box, wrong, wrong + 1)).start
                raise NotFiniteError(f"{values[wrong - start].item()} in {box.key}{list(index)}, for {place.file}")
            data, at = as_bytes(values), 0
            for part in boxes_of_range(box, start, stop):
                for first, count in runs(part, place.shape):
                    self._write(data[at : at + count * item], place.offset + first * item)
                    at += count * item

    def _write(self, data: memoryview, offset: int) -> None:
        write_at(self._fd, data, offset)
        if offset != self._at:  # bytes between belong to others: a block begun is not ours alone
            self._hash, self._at = None, offset
        while data:
            index, inside = divmod(self._at, self._block_bytes)
            if inside == 0:
                self._hash = self._hasher()
            part = data[: self._block_bytes - inside]
            data, self._at = data[len(part) :], self._at + len(part)
            if self._hash is not None:
                self._hash.update(part)
                if self._at == min((index + 1) * self._block_bytes, self._size):
                    self.digests[index] = self._hash.hexdigest()[: manifest.DIGITS]


def as_bytes(tensor: Tensor) -> memoryview:
    """The elements in row-major order."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _shared_blocks(content: Content, results: Sequence[tuple[int, Digests]]) -> str:
    """Blocks without a digest as bits. Raises: CheckpointError if elements lack an owner."""
    written = sum(count for count, _ in results)
    want = sum(prod(place.shape) for place in content.sets["model"].places.values())
    if written != want:
        raise CheckpointError(f"the ranks hold {written} elements of state, the model has {want}")
    digested = {(name, index) for _, digests in results for name, index, _ in digests}
    return f"{int(''.join('10'[block in digested] for block in content.blocks()), 2):x}"


def _digest_blocks(content: Content, blocks: Sequence[tuple[str, int]], flusher: Flusher) -> Digests:
    """Digests of blocks of several ranks, read back while this rank's files become durable."""
    with open_files(content.temporary) as fd_of, ThreadPoolExecutor(THREADS) as pool:
        fds, by = {name: fd_of(name) for name, _ in blocks}, manifest.hasher(content.body["digests"])

        def part(first: int) -> Digests:
            buffer, found = memoryview(bytearray(content.block_bytes)), []
            for name, index in blocks[first::THREADS]:
                count = read_at(fds[name], buffer, index * content.block_bytes)
                found.append((name, index, manifest.digest(buffer[:count], by)))
            return found

        found = [digest for part_found in pool.map(part, range(THREADS)) for digest in part_found]
    flusher.finish()
    return found


def _commit(content: Content, digests: Mapping[tuple[str, int], str]) -> None:
    files: dict[str, Any] = {name: {"size": size, "blocks": []} for name, size in content.sizes.items()}
    for name, index in content.blocks():
        files[name]["blocks"].append(digests[name, index])
    for record in files.values():
        record["digest"] = manifest.digest("".join(record["blocks"]).encode())
    body = content.body | {"block_bytes": content.block_bytes, "files": files}
    write_durably(content.temporary / manifest.NAME, manifest.render(body))
    for folder in sorted({content.temporary, *((content.temporary / n).parent for n in files)}):
        sync(folder)
    if content.final.exists():  # done again after going back; `recover_folder` knows it
        if (before := content.final.with_suffix(REPLACED)).exists():
            remove_checkpoint(before)
        os.rename(content.final, before)
    os.rename(content.temporary, content.final)
    sync(content.final.parent)
