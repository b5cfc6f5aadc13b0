"""Reading boxes of tensors out of anybody's safetensors files, verifying what is read."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import cache
from itertools import groupby, pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallama.checkpoint import disk, manifest
from megallama.checkpoint.disk import CheckpointError, DamagedError
from megallama.checkpoint.folder import step_folder
from megallama.checkpoint.manifest import DTYPES, STATE, TensorPlace, layout
from megallama.config.schema import ModelConfig
from megallama.layers.param import Shard
from megallama.plan.box import Box
from megallama.plan.params import global_shapes

SPAN_BYTES = 8 << 20  # bytes of a file turned into a tensor at a time
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_NOT_A_PARAMETER = ".rotary_emb.inv_freq"  # a buffer in old Hugging Face folders


class BlockFile:
    """A file read in blocks by one thread; what `saved` lists is verified before its use."""

    def __init__(self, folder: Path, name: str, saved: manifest.Manifest | None = None) -> None:
        self.path = folder / name
        self._record = record = saved.files[name] if saved else None
        if saved:
            self._block_bytes, self._hasher = saved.block_bytes, manifest.hasher(saved.digests, self.path)
        self._fd, self.size = disk.open_file(self.path, record.size if record else None)
        self._held = -1  # one buffer for all blocks: fresh pages cost more than the reading
        self._buffer = memoryview(bytearray(min(saved.block_bytes, self.size) if saved else 0))

    def close(self) -> None:
        os.close(self._fd)

    def block(self, index: int) -> memoryview:
        """A block, until the next is asked for. Raises: DamagedError (file, block)."""
        assert self._record is not None
        start = index * self._block_bytes
        data = self._buffer[: self.size - start]
        if index == self._held:
            return data
        self._held, digest = -1, self._record.blocks[index]
        self._fill(data, start)
        if manifest.digest(data, self._hasher) != digest:
            disk.read_again(self.path, data, start)
            if manifest.digest(data, self._hasher) != digest:
                where = f"{self.path} is damaged in block {index} (bytes {start} to {start + len(data) - 1})"
                raise DamagedError(f"{where}: its digest is not the one in {manifest.NAME}")
        self._held = index
        return data

    def _fill(self, data: memoryview, start: int) -> None:
        """Read; where that fails, from the freshly opened file, whose word counts."""
        with suppress(OSError):
            if disk.read_at(self._fd, data, start) == len(data):
                return
        self._check(start, len(data), start + disk.read_again(self.path, data, start))

    def read(self, start: int, count: int) -> bytearray:
        self._check(start, count, self.size)  # a damaged header may ask for what no file holds
        out = bytearray(count)
        self.read_into(start, memoryview(out))
        return out

    def read_into(self, start: int, out: memoryview) -> None:
        self._check(start, len(out), self.size)
        if self._record is None:
            self._fill(out, start)
            return
        while out:
            index, inside = divmod(start, self._block_bytes)
            data = self.block(index)[inside : inside + len(out)]
            out[: len(data)] = data
            out, start = out[len(data) :], start + len(data)

    def _check(self, start: int, count: int, size: int) -> None:
        if start < 0 or start + count > size:
            raise DamagedError(f"{self.path} ends at byte {size}, before byte {start + count}")


def spans(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Rows in ranges of about `SPAN_BYTES`."""
    step = max(1, SPAN_BYTES // max(1, row_bytes))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


class TensorFiles(ExitStack):
    """Tensors by name, of a set of files; these are opened when first needed."""

    def __init__(self, places: Mapping[str, TensorPlace], opener: Callable[[str], BlockFile]) -> None:
        super().__init__()
        self.places = places
        self._file = cache(lambda name: self.enter_context(closing(opener(name))))

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A whole tensor, in the stored format unless `dtype` is given."""
        place = self.places[name]
        out = torch.empty(place.shape, dtype=dtype or DTYPES[place.dtype])
        self.read_into(Box.whole(name, place.shape), out.view(-1))
        return out

    def read_into(self, box: Box, out: Tensor) -> None:
        """Fill `out` (1-D, any dtype and device) with `box`, row-major."""
        place = self.places[box.key]
        file, width, item = self._file(place.file), place.shape[-1], place.item_bytes
        rows, cols = prod(box.shape[:-1]), box.shape[-1]
        start = place.offset + item * ((box.start[0] * width if len(place.shape) == 2 else 0) + box.start[-1])
        for a, b in spans(rows, width * item):
            n, part = b - a, out[a * cols : b * cols]
            if cols == width and part.dtype == DTYPES[place.dtype] and part.device.type == "cpu":
                file.read_into(start, part.view(torch.uint8).numpy().data)
            else:  # what lies between the rows is read too: that is one long read
                data = torch.frombuffer(file.read(start, ((n - 1) * width + cols) * item), dtype=DTYPES[place.dtype])
                part.view(n, cols).copy_(data.as_strided((n, cols), (width, 1)))
            start += n * width * item

    def read_rows(self, key: str, row: int, out: Tensor) -> None:
        """Fill the contiguous `out` [n, ...], of the stored format, with rows from `row` on."""
        place = self.places[key]
        start = place.offset + row * prod(place.shape[1:]) * place.item_bytes
        self._file(place.file).read_into(start, out.view(-1).view(torch.uint8).numpy().data)


def _read_header(label: str, file: BlockFile) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file. Raises: DamagedError."""
    length = int.from_bytes(file.read(0, 8), "little")
    if length > disk.JSON_BYTES and 8 + length <= file.size:
        raise DamagedError(f"{file.path} has a header of {length:,} bytes; at most {disk.JSON_BYTES:,} are read")
    places = {}
    try:
        entries = disk.parse_object(bytes(file.read(8, length)))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
            if len(shape) > 8 or not all(type(n) is int and n >= 0 for n in (start, stop, *shape)):
                raise DamagedError(f"{file.path}: tensor {name} has a shape or a place that cannot be")
            places[name] = place = TensorPlace(label, 8 + length + start, shape, entry["dtype"])
            fits = entry["dtype"] not in DTYPES or stop - start == prod(shape) * place.item_bytes
            if not fits or 8 + length + stop > file.size:
                raise DamagedError(f"{file.path}: tensor {name} does not fit the file: bytes {start} to {stop}")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{file.path} has no valid safetensors header: {error!r}") from error
    known = sorted((p.offset, prod(p.shape) * p.item_bytes, n) for n, p in places.items() if p.dtype in DTYPES)
    for (at, count, one), (begin, _, other) in pairwise(known):
        if at + count > begin:
            raise DamagedError(f"{file.path}: the tensors {one} and {other} overlap")
    return places


def open_state(folder: Path, saved: manifest.Manifest, kind: str) -> TensorFiles:
    """The "model" weights or one of the state kinds of a step folder, verified while reading.

    Places follow from the architecture. Raises: CheckpointError for other files; later DamagedError, also by headers.
    """
    want = layout(saved.model, saved.precision, saved.shard_bytes)[kind]
    for name, size in want.sizes.items():
        if name not in saved.files or saved.files[name].size != size:
            raise CheckpointError(f"{folder / manifest.NAME} does not list {name} with {size} bytes")

    def opener(name: str) -> BlockFile:
        file = BlockFile(folder, name, saved)
        if file.read(0, len(want.headers[name])) != want.headers[name]:
            file.close()
            raise DamagedError(f"{folder / name} has the header of another file")
        return file

    return TensorFiles(want.places, opener)


def open_folder(folder: Path) -> TensorFiles:
    """The weights of a Hugging Face folder, our step or model/. Raises: CheckpointError."""
    if (step := step_folder(folder)) is not None:
        return open_state(step, manifest.read_manifest(step), "model")
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if disk.exists(index):
        found = disk.read_json(index).get("weight_map")
        named: list[Any] = [*found.values()] if isinstance(found, dict) else [None]
        for name in named:
            if not isinstance(name, str) or "/" in name or "\0" in name or name in ("", ".", ".."):
                raise CheckpointError(f"{index} names {name!r}; it must name files of its own folder")
        names = sorted(set(named))
    elif not disk.exists(folder / names[0]):
        raise CheckpointError(
            f"{folder} holds neither {manifest.NAME} nor model.safetensors(.index.json); give a step folder or a "
            "Hugging Face folder with safetensors (save_pretrained(folder) writes them)"
        )
    return open_files(folder, names)


def open_files(folder: Path, names: Sequence[str]) -> TensorFiles:
    """The tensors of some safetensors files. Raises: DamagedError; CheckpointError."""
    places: dict[str, TensorPlace] = {}
    for name in names:
        with closing(BlockFile(folder, name)) as file:
            found = _read_header(name, file)
        if twice := sorted(found.keys() & places.keys()):
            raise CheckpointError(f"{folder}: {places[twice[0]].file} and {name} both hold {twice[0]}; remove one")
        places |= found
    return TensorFiles(places, lambda name: BlockFile(folder, name))


def fill(files: TensorFiles, kind: str, shards: Sequence[Shard]) -> None:
    """Read state `kind` of all shards, in the order of the files."""
    for shard in sorted(shards, key=lambda s: (files.places[s.box.key], s.box)):
        files.read_into(shard.box, shard.state[kind])


def load_state(folder: Path, saved: manifest.Manifest, shards: Sequence[Shard]) -> None:
    """Fill masters and moments of all shards from a step folder, each kind by a thread."""

    def load(kind: str) -> None:
        with open_state(folder, saved, kind) as files:
            fill(files, kind, shards)

    with ThreadPoolExecutor(len(STATE)) as pool:
        list(pool.map(load, STATE))


def head_of(where: Path, files: TensorFiles, model: ModelConfig, head: str = "auto") -> tuple[ModelConfig, list[str]]:
    """`model` as its tensors have it, and a note; head="tied" leaves out its own head."""
    if not model.tie_embeddings or HEAD not in files.places or equal_rows(files, EMBEDDING, files, HEAD):
        return model, []
    return own_head(f"{where}: {HEAD}", model, head)


def own_head(what: str, model: ModelConfig, head: str) -> tuple[ModelConfig, list[str]]:
    """What becomes of the model if its head is not the embedding, and what to say of it."""
    note = f"{what} is not the embedding, though config.json says tie_word_embeddings=true; it is"
    if head == "tied":
        return model, [f"{note} left out"]
    return model.model_copy(update={"tie_embeddings": False}), [f"{note} kept, as a head of its own"]


def equal_rows(a: TensorFiles, key: str, b: TensorFiles, other: str, rows: int | None = None) -> bool:
    """Whether two tensors, or their first rows, are the same to the bit."""
    one, two = a.places[key], b.places[other]
    if (one.shape, one.dtype) != (two.shape, two.dtype) or one.dtype not in DTYPES or not all(one.shape or [0]):
        return False
    rows = one.shape[0] if rows is None else rows
    for start, stop in spans(rows, prod(one.shape[1:]) * one.item_bytes):
        x, y = (torch.empty(stop - start, *one.shape[1:], dtype=DTYPES[one.dtype]) for _ in "ab")
        a.read_rows(key, start, x)
        b.read_rows(other, start, y)
        if not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            return False
    return True


def check_tensors(where: Path, files: TensorFiles, model: ModelConfig) -> None:
    """Raises: CheckpointError listing what `tensor_problems` finds."""
    manifest.check_layers(where, model, len(files.places))
    want = global_shapes(model)
    extra = {HEAD} if model.tie_embeddings else set()  # see `head_of`
    found = {n: p for n, p in files.places.items() if n not in extra and not n.endswith(_NOT_A_PARAMETER)}
    problems = tensor_problems(want, found)
    if HEAD in want and HEAD not in found:
        problems.append("(a model without lm_head.weight has model.tie_embeddings=true)")
    refuse(where, problems)


def tensor_problems(want: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorPlace]) -> list[str]:
    """A line for every tensor missing, unknown or of another shape or number format."""
    problems = [f"missing: {n} {list(shape)}" for n, shape in want.items() if n not in found]
    problems += [f"unknown: {n} {list(p.shape)}" for n, p in found.items() if n not in want]
    for n, shape in want.items():
        if n in found and found[n].shape != shape:
            problems.append(f"{n} has shape {list(found[n].shape)}, the model needs {list(shape)}")
    problems += [f"{n} has dtype {p.dtype}, not of {[*DTYPES]}" for n, p in found.items() if p.dtype not in DTYPES]
    return problems


def refuse(where: Path, problems: Sequence[str]) -> None:
    """Raises: CheckpointError with `problems`, if there are any."""
    if problems:
        shown = [*problems[:20]] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise CheckpointError(f"the tensors in {where} are not those of the model:\n  " + "\n  ".join(shown))


def verify_blocks(folder: Path, saved: manifest.Manifest, blocks: Sequence[tuple[str, int]]) -> list[str]:
    """What is wrong with each block that is damaged. Raises: UnreadableError."""

    def problems(blocks: Sequence[tuple[str, int]]) -> list[str]:
        found = []
        for name, group in groupby(blocks, key=lambda block: block[0]):
            try:
                with closing(BlockFile(folder, name, saved)) as file:
                    for _, index in group:
                        try:
                            file.block(index)
                        except DamagedError as error:
                            found.append(str(error))
            except DamagedError as error:
                found.append(str(error))
            except KeyError:
                found.append(f"{folder / manifest.NAME} does not list {name}")
        return found

    half = len(blocks) // 2
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(problems, (blocks[:half], blocks[half:]))
    return list(dict.fromkeys(one + other))  # both may open one file
