"""What a checkpoint is: where every byte lies, and the manifest with the digests.

    model/       model-0000i-of-0000N.safetensors       weights in the training format, + index.json
    optimizer/   master-, exp_avg-, exp_avg_sq-0000i-of-0000N.safetensors     the same names and shapes
    manifest.json

Places follow from the model alone, so ranks of any layout write the same bytes. The files are safetensors
files (8 bytes header length, a JSON header, row-major little-endian data), digested in blocks (XXH3, or SHA-256:
128 bits); a file's digest, of its block digests, and the manifest's own are SHA-256. It is written last.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError

from megallama.checkpoint import disk
from megallama.checkpoint.disk import CheckpointError, DamagedError, MissingError
from megallama.config.presets import PRESETS
from megallama.config.schema import ModelConfig
from megallama.plan.params import global_shapes, heads

NAME = "manifest.json"
SHA256, XXH3 = "sha256", "xxh3_128"
FORMATS = {SHA256: 1, XXH3: 2}  # who knows the first alone would take others for damage
HASHERS: dict[str, Callable[..., Any]] = {SHA256: hashlib.sha256}
with suppress(ImportError):  # ten times as fast
    HASHERS[XXH3] = import_module("xxhash").xxh3_128
BLOCK_BYTES = 4 << 20
DIGITS = 32  # of a digest in hexadecimal
MANIFEST_BYTES = 1 << 29  # the most that is read; one of 65B parameters has 9 million
MAX_LAYERS = 100_000  # no model has more
SHARD_BYTES = 5_000_000_000  # a tensor that would grow a file beyond this begins a new one
STATE = ("master", "exp_avg", "exp_avg_sq")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHTS = {"fp64": "F64", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True, order=True)
class TensorPlace:
    """Where a tensor lies: its elements begin at byte `offset` of the file."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class FileSet:
    """The files that hold every tensor once, by their names within the checkpoint."""

    headers: Mapping[str, bytes]  # the first bytes of each file
    sizes: Mapping[str, int]
    places: Mapping[str, TensorPlace]

    def index(self) -> bytes:
        """The content of Hugging Face's model.safetensors.index.json."""
        total = sum(prod(p.shape) * p.item_bytes for p in self.places.values())
        where = {name: p.file.rpartition("/")[2] for name, p in self.places.items()}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
        return (text + "\n").encode()


def layout(model: ModelConfig, precision: str, shard_bytes: int = SHARD_BYTES) -> dict[str, FileSet]:
    """The file sets by kind: "model" in precision.dtype, and `STATE` in fp32 (fp64 with fp64)."""
    shapes, state = global_shapes(model), "F64" if precision == "fp64" else "F32"
    sets = {"model": file_set("model/model", shapes, WEIGHTS[precision], shard_bytes)}
    return sets | {kind: file_set(f"optimizer/{kind}", shapes, state, shard_bytes) for kind in STATE}


def file_set(stem: str, shapes: Mapping[str, tuple[int, ...]], dtype: str, shard_bytes: int) -> FileSet:
    """Lay tensors out in the given order over files of about `shard_bytes`."""
    groups, filled = list[dict[str, tuple[int, ...]]](), 0
    for name, shape in shapes.items():
        nbytes = prod(shape) * DTYPES[dtype].itemsize
        if not groups or filled + nbytes > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += nbytes
    names = (f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1))
    return lay_out(dict(zip(names, groups, strict=True)), dtype)


def lay_out(files: Mapping[str, Mapping[str, tuple[int, ...]]], dtype: str) -> FileSet:
    """Lay the tensors of each file out in the given order, with a header of safetensors."""
    headers, sizes, places = dict[str, bytes](), dict[str, int](), dict[str, TensorPlace]()
    for file, shapes in files.items():
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, shape in shapes.items():
            start, at = at, at + prod(shape) * DTYPES[dtype].itemsize
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, at]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data is aligned to 8 bytes
        headers[file] = header = len(text).to_bytes(8, "little") + text
        sizes[file] = len(header) + at
        for name, shape in shapes.items():
            places[name] = TensorPlace(file, len(header) + entries[name]["data_offsets"][0], tuple(shape), dtype)
    return FileSet(headers, sizes, places)


class FileRecord(BaseModel, frozen=True):
    """Size and digests of one file, as saved."""

    size: NonNegativeInt
    digest: str
    blocks: tuple[str, ...]


class Manifest(BaseModel, frozen=True):
    """A verified manifest."""

    step: NonNegativeInt  # optimizer steps done
    sequence: int  # number of the save in its folder
    lineage: Annotated[str, Field(validation_alias="line")]  # of the run
    counters: dict[str, Any]
    model: Annotated[ModelConfig, Field(validation_alias="architecture")]
    precision: Literal["fp64", "fp32", "fp16", "bf16"]
    shard_bytes: PositiveInt
    block_bytes: Annotated[int, Field(ge=1, le=1 << 28)]  # a file's last may be shorter
    digests: str = SHA256  # where it names none
    tokenizer: str | None
    config: dict[str, Any]
    saved_at: str
    saved_by_ranks: int
    versions: dict[str, str]
    files: dict[Annotated[str, Field(pattern=r"^(model|optimizer)/[A-Za-z0-9_][A-Za-z0-9_.-]*$")], FileRecord]
    body: dict[str, Any]  # all of it, as it is written

    def blocks(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(file, block index) of all files whose names begin with `prefix`, in order."""
        for name, record in self.files.items():
            if name.startswith(prefix):
                yield from ((name, i) for i in range(len(record.blocks)))


def hasher(name: str, what: object = "what is saved") -> Callable[..., Any]:
    """What makes objects as hashlib's. Raises: CheckpointError where it is not here."""
    if name not in HASHERS:
        need = "pip install xxhash" if name == XXH3 else "use the version that wrote it"
        raise CheckpointError(f"{what} is digested with {name}, which this program cannot make here: {need}")
    return HASHERS[name]


def digest(data: bytes | bytearray | memoryview, by: Callable[..., Any] = hashlib.sha256) -> str:
    """The digest of a block, by what `hasher` gives."""
    return by(data).hexdigest()[:DIGITS]


def render(body: dict[str, Any]) -> bytes:
    """The bytes of manifest.json for `body`: one spelling, so any change shows."""
    plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return (json.dumps(body | {"digest": digest(plain.encode())}, sort_keys=True, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Read and verify the manifest of a step folder.

    Raises: MissingError; UnreadableError; DamagedError if, read twice, its digest is wrong; else CheckpointError.
    """
    path, body = folder / NAME, None
    for _ in range(2):
        try:
            body = body or _verified(disk.read_file(path, MANIFEST_BYTES))
        except MissingError:
            raise MissingError(f"{folder} has no {NAME}: it is not a complete checkpoint") from None
    if body is None:
        raise DamagedError(f"{path} is damaged: it does not match its own digest")
    if body.get("format") not in FORMATS.values():
        raise CheckpointError(
            f"{folder} has checkpoint format {body.get('format')}; this program reads formats 1 and 2: "
            f"use the version that wrote it ({body.get('versions', 'unknown')})"
        )
    try:
        saved = Manifest.model_validate(body | {"body": body})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path} is not one that this program writes: {where}: {first['msg']}") from None
    for name, record in saved.files.items():
        if len(record.blocks) != -(-record.size // saved.block_bytes):
            raise CheckpointError(f"{path} is not one that this program writes: the blocks of {name} are not its size")
    check_layers(path, saved.model)
    return saved


def _verified(raw: bytes) -> dict[str, Any] | None:
    """What a manifest says; None if it does not match its own digest."""
    try:
        body = disk.parse_object(raw)
        body.pop("digest", None)
        return body if render(body) == raw else None
    except (ValueError, RecursionError):
        return None


def check_layers(path: Path, model: ModelConfig, tensors: int = MAX_LAYERS) -> None:
    """Raises: CheckpointError for more layers than tensors: laying them out takes long."""
    if model.num_layers > max(tensors, 1000):
        raise CheckpointError(f"{path} describes a model of {model.num_layers} layers; it has fewer")


def architecture(model: ModelConfig) -> dict[str, Any]:
    """The settings that make two models incompatible, derived values filled in."""
    settings = model.model_dump(mode="json", exclude={"preset", "init_std"})
    _, settings["num_kv_heads"], settings["head_dim"] = heads(model)
    return settings


def kept(saved: ModelConfig, now: ModelConfig) -> dict[str, Any]:
    """What only a preset gives, and gave otherwise when the run began, which keeps it."""
    unsaid = PRESETS.get(now.preset or "", {}).keys() - now.model_fields_set
    keys = [key for key in ("norm_eps", "rope_theta", "rope_scaling") if key in unsaid]  # of no shape
    return {key: getattr(saved, key) for key in keys if getattr(saved, key) != getattr(now, key)}


def differences(saved: ModelConfig, now: ModelConfig) -> list[str]:
    """One line for each key that differs: "model.hidden_size: checkpoint 256, now 512"."""
    a, b = architecture(saved), architecture(now)
    return [f"model.{key}: checkpoint {a[key]}, now {b[key]}" for key in a if a[key] != b[key]]
