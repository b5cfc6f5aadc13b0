"""The manifest: what a checkpoint is, and the digest of every block of every file.

A folder is a checkpoint if and only if it has a manifest that verifies, for that is written last. Files are
digested in blocks (SHA-256, the first 128 bits), so damage is found when the bytes are read; a file's digest
is that of its block digests, and the manifest carries its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from megallama.checkpoint import disk
from megallama.checkpoint.disk import CheckpointError, DamagedError, MissingError
from megallama.config.presets import PRESETS
from megallama.config.schema import ModelConfig
from megallama.plan.params import heads

NAME = "manifest.json"
FORMAT = 1
BLOCK_BYTES = 4 << 20
DIGITS = 32  # of a SHA-256 in hexadecimal
MANIFEST_BYTES = 1 << 29  # the most that is read; one of 65B parameters has 9 million
MAX_LAYERS = 100_000  # no model has more


@dataclass(frozen=True)
class FileRecord:
    """Size and digests of one file, as saved."""

    size: NonNegativeInt
    digest: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """A verified manifest; its files are in the folder."""

    step: NonNegativeInt  # optimizer steps done
    sequence: int  # saves of a folder are numbered; the newest checkpoint is the last save, not the highest step
    lineage: Annotated[str, Field(validation_alias="line")]  # of the run
    counters: dict[str, Any]
    model: Annotated[ModelConfig, Field(validation_alias="architecture")]
    precision: Literal["fp64", "fp32", "fp16", "bf16"]
    shard_bytes: PositiveInt
    block_bytes: Annotated[int, Field(ge=1, le=1 << 28)]  # the last block of a file may be shorter
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


_MANIFEST = TypeAdapter(Manifest)


def digest(data: bytes | bytearray | memoryview) -> str:
    """The digest of a block."""
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def render(body: dict[str, Any]) -> bytes:
    """The bytes of manifest.json for `body`; the one spelling of it, so that any change shows."""
    plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return (json.dumps(body | {"digest": digest(plain.encode())}, sort_keys=True, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Read and verify the manifest of a step folder.

    Raises: MissingError; DamagedError if, read twice, it does not match its digest; UnreadableError;
    CheckpointError for another format, or values that are never written.
    """
    path, body = folder / NAME, None
    for _ in range(2):
        try:
            body = body or _verified(disk.read_file(path, MANIFEST_BYTES))
        except MissingError:
            raise MissingError(f"{folder} has no {NAME}: it is not a complete checkpoint") from None
    if body is None:
        raise DamagedError(f"{path} is damaged: it does not match its own digest")
    if body.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {body.get('format')}; this program reads format {FORMAT}: "
            f"use the version that wrote it ({body.get('versions', 'unknown')})"
        )
    try:
        saved = _MANIFEST.validate_python(body | {"body": body})
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
    """Raises: CheckpointError for more layers than so many tensors are: laying them out takes long."""
    if model.num_layers > max(tensors, 1000):
        raise CheckpointError(f"{path} describes a model of {model.num_layers} layers; it has fewer")


def architecture(model: ModelConfig) -> dict[str, Any]:
    """The settings that make two models incompatible, derived values filled in."""
    settings = model.model_dump(mode="json", exclude={"preset", "init_std"})
    _, settings["num_kv_heads"], settings["head_dim"] = heads(model)
    return settings


def kept(saved: ModelConfig, now: ModelConfig) -> dict[str, Any]:
    """What only a preset gives, and gave otherwise when the run began: a resumed run keeps it."""
    unsaid = PRESETS.get(now.preset or "", {}).keys() - now.model_fields_set
    keys = [key for key in ("norm_eps", "rope_theta", "rope_scaling") if key in unsaid]  # no shape follows from these
    return {key: getattr(saved, key) for key in keys if getattr(saved, key) != getattr(now, key)}


def differences(saved: ModelConfig, now: ModelConfig) -> list[str]:
    """One line for each key that differs: "model.hidden_size: checkpoint 256, now 512"."""
    a, b = architecture(saved), architecture(now)
    return [f"model.{key}: checkpoint {a[key]}, now {b[key]}" for key in a if a[key] != b[key]]
