"""The manifest: what a checkpoint is, and the digest of every block of every file.

A folder is a checkpoint if and only if it has a manifest that verifies, for the manifest is written
last.  Files are digested in blocks (SHA-256, the first 128 bits), so damage is found in the moment
the bytes are read and can be named; a file's digest is the digest of its block digests; the manifest
carries its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megallama.checkpoint.errors import CheckpointError, DamagedError
from megallama.config.presets import PRESETS
from megallama.config.schema import ModelConfig
from megallama.plan.params import heads

NAME = "manifest.json"
FORMAT = 1
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class FileRecord:
    """Size and digests of one file, as saved."""

    size: int
    digest: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """A verified manifest."""

    body: dict[str, Any]
    files: dict[str, FileRecord]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.body["step"]

    @property
    def sequence(self) -> int:
        """Saves of this folder are numbered; the newest checkpoint is the last save, not the highest step."""
        return self.body["sequence"]

    @property
    def model(self) -> ModelConfig:
        """The architecture of the saved model."""
        return ModelConfig(**self.body["architecture"])

    @property
    def block_bytes(self) -> int:
        """Bytes of a block (the last one of a file may be shorter)."""
        return self.body["block_bytes"]

    def blocks(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(file, block index) of all files whose names begin with `prefix`, in order."""
        for name, record in self.files.items():
            if name.startswith(prefix):
                yield from ((name, i) for i in range(len(record.blocks)))


def digest(data: bytes | bytearray | memoryview) -> str:
    """The digest of a block."""
    return spelled(hashlib.sha256(data))


def spelled(hashed: hashlib._Hash) -> str:
    """How the manifest writes a SHA-256."""
    return hashed.hexdigest()[:32]


def block_count(size: int, block_bytes: int) -> int:
    """Blocks of a file of `size` bytes."""
    return -(-size // block_bytes)


def render(body: dict[str, Any]) -> bytes:
    """The bytes of manifest.json for `body`; the one spelling of it, so that any change shows."""
    plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return (json.dumps(body | {"digest": digest(plain.encode())}, sort_keys=True, indent=1) + "\n").encode()


def file_records(sizes: dict[str, int], blocks: dict[str, list[str]]) -> dict[str, Any]:
    """The manifest's "files" section."""
    return {
        name: {"size": size, "digest": digest("".join(blocks[name]).encode()), "blocks": blocks[name]}
        for name, size in sizes.items()
    }


def read_manifest(folder: Path, *, files: bool = True) -> Manifest:
    """Read and verify the manifest of a step folder; with `files`, also that all files are there in full size.

    Raises: DamagedError naming the file; CheckpointError for a format this program does not know.
    """
    path = folder / NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{folder} has no {NAME}: it is not a complete checkpoint") from None
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    try:
        body = json.loads(raw)
        body.pop("digest", None)
        intact = render(body) == raw
    except (ValueError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise DamagedError(f"{path} is damaged: it does not match its own digest")
    if body.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {body.get('format')}; this program reads format {FORMAT}: "
            f"use the version that wrote it ({body.get('versions', {}).get('megallama', 'unknown')})"
        )
    records = {n: FileRecord(r["size"], r["digest"], tuple(r["blocks"])) for n, r in body["files"].items()}
    if files:
        _check_sizes(folder, records)
    return Manifest(body, records)


def _check_sizes(folder: Path, records: dict[str, FileRecord]) -> None:
    for name, record in records.items():
        try:
            size = os.stat(folder / name).st_size
        except OSError as error:
            raise DamagedError(f"{folder / name} is missing: {error.strerror}") from None
        if size != record.size:
            raise DamagedError(f"{folder / name} has {size} bytes instead of {record.size}")


def architecture(model: ModelConfig) -> dict[str, Any]:
    """The settings that make two models incompatible, derived values filled in."""
    settings = model.model_dump(mode="json", exclude={"preset", "init_std"})
    _, settings["num_kv_heads"], settings["head_dim"] = heads(model)
    return settings


def kept(saved: ModelConfig, now: ModelConfig) -> dict[str, Any]:
    """Settings that only a preset gives, and gave otherwise when the run began: they stay those of the checkpoint."""
    unsaid = PRESETS.get(now.preset or "", {}).keys() - now.model_fields_set
    keys = [key for key in ("norm_eps", "rope_theta", "rope_scaling") if key in unsaid]  # no shape follows from these
    return {key: getattr(saved, key) for key in keys if getattr(saved, key) != getattr(now, key)}


def differences(saved: ModelConfig, now: ModelConfig) -> list[str]:
    """One line for each key that differs: "model.hidden_size: checkpoint 256, now 512"."""
    a, b = architecture(saved), architecture(now)
    return [f"model.{key}: checkpoint {a[key]}, now {b[key]}" for key in a if a[key] != b[key]]
