"""Where every byte of a checkpoint lies, as a function of the model alone.

    model/       model-0000i-of-0000N.safetensors       weights in the training format, + index.json
    optimizer/   master-, exp_avg-, exp_avg_sq-0000i-of-0000N.safetensors     the same names and shapes

No rank count, tensor- or pipeline-parallel size enters, so ranks of any layout write the same bytes, and a rank
that knows which boxes it owns knows where they belong. The files are safetensors files (8 bytes header length,
a JSON header, row-major little-endian data).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from megallama.config.schema import ModelConfig
from megallama.plan.params import global_shapes

SHARD_BYTES = 5_000_000_000  # a new file is begun before a tensor that would grow one beyond this
STATE = ("master", "exp_avg", "exp_avg_sq")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHTS = {"fp64": "F64", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: its elements begin at byte `offset` of the file."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class FileSet:
    """The files that together hold every tensor once, by their names within the checkpoint."""

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
    """The file sets by kind: "model", saved in precision.dtype, and those of `STATE`, in fp32 (fp64 with fp64)."""
    shapes, state = global_shapes(model), "F64" if precision == "fp64" else "F32"
    sets = {"model": file_set("model/model", shapes, WEIGHTS[precision], shard_bytes)}
    return sets | {kind: file_set(f"optimizer/{kind}", shapes, state, shard_bytes) for kind in STATE}


def file_set(stem: str, shapes: Mapping[str, tuple[int, ...]], dtype: str, shard_bytes: int) -> FileSet:
    """Lay tensors out in the given order over files of about `shard_bytes`."""
    item = DTYPES[dtype].itemsize
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        nbytes = prod(shape) * item
        if groups[-1] and filled + nbytes > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += nbytes
    headers, sizes, places = dict[str, bytes](), dict[str, int](), dict[str, TensorPlace]()
    for i, group in enumerate(groups, 1):
        one = one_file(f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", group, dtype)
        headers |= one.headers
        sizes |= one.sizes
        places |= one.places
    return FileSet(headers, sizes, places)


def one_file(file: str, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> FileSet:
    """Lay tensors out in the given order in one file, with a header of safetensors."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, at = {}, 0
    for name, shape in shapes.items():
        starts[name], end = at, at + prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data is aligned to 8 bytes
    header = len(text).to_bytes(8, "little") + text
    places = {name: TensorPlace(file, len(header) + starts[name], tuple(shapes[name]), dtype) for name in starts}
    return FileSet({file: header}, {file: len(header) + at}, places)
