"""What is in a checkpoint, whether every byte is whole, how it differs from another."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import torch

from megallama.checkpoint import manifest, reader
from megallama.checkpoint.folder import find_checkpoint, step_folder
from megallama.checkpoint.manifest import STATE
from megallama.config.errors import counted, say
from megallama.convert.source import Source, foreign_kind, open_source
from megallama.plan.box import Box
from megallama.plan.params import num_parameters

CHUNK_ELEMENTS = 8 << 20


def inspect_checkpoint(path: Path, other: Path | None, *, verified: bool) -> int:
    """Describe, verify, compare; 0, or 1 for what is damaged or different. Raises: MegallamaError."""
    folder = find_checkpoint(path, say)
    saved = manifest.read_manifest(folder)
    describe(folder, saved)
    status = verify(folder, saved) if verified else 0
    if other is not None:
        status = max(status, compare(folder, saved, find_checkpoint(other, say)))
    return status


def describe(folder: Path, saved: manifest.Manifest) -> None:
    """Print what the manifest says."""
    body = saved.body
    versions = ", ".join(f"{k} {v}" for k, v in body["versions"].items())
    ranks = counted(body["saved_by_ranks"], "rank")
    print(f"{folder}: step {saved.step}, save {saved.sequence}, {body['saved_at']}, {ranks}")
    print(f"  versions  {versions}; format {body['format']}")
    print(f"  model     {num_parameters(saved.model):,} parameters, saved in {body['precision']}")
    for key, value in body["architecture"].items():
        print(f"            {key} = {value}")
    print(f"  counters  {json.dumps(body['counters'])}")
    for part in ("model/", *(f"optimizer/{kind}-" for kind in STATE)):
        sizes = [record.size for name, record in saved.files.items() if name.startswith(part)]
        print(f"  {part.rstrip('-'):<21} {counted(len(sizes), 'file'):>9} {sum(sizes):>18,} bytes")


def verify(folder: Path, saved: manifest.Manifest) -> int:
    """Check every block; prints each damaged one. Returns 1 if any is."""
    damaged: list[str] = []  # files, one for each problem
    for kind in ("model", *STATE):
        reader.open_state(folder, saved, kind).close()  # the files are those of the architecture
    blocks = list(saved.blocks())
    for name in saved.files:
        problems = reader.verify_blocks(folder, saved, [b for b in blocks if b[0] == name])
        lines = [f"DAMAGED: {problem}" for problem in problems] or [f"  verified  {name}"]
        print("\n".join(lines), flush=True)
        damaged += [name] * len(problems)
    print(f"{counted(len(blocks), 'block', ',')}, {counted(len(damaged), 'problem')}")
    if damaged and all(name.startswith("model/") for name in damaged):
        print("the training state is whole: a run resumes from it, and its next save writes model/ again")
    return 1 if damaged else 0


def compare(folder: Path, saved: manifest.Manifest, other: Path) -> int:
    """Compare weights, and state if both have it, tensor by tensor. Returns 1 if anything differs."""
    theirs = manifest.read_manifest(other) if step_folder(other) == other else None
    foreign = open_source if foreign_kind(other) else reader.open_folder
    different, total = list[str](), 0
    for kind in ("model", *(STATE if theirs else ())):
        with (
            reader.open_state(folder, saved, kind) as a,
            reader.open_state(other, theirs, kind) if theirs else foreign(other) as b,
        ):
            for name in sorted(a.places.keys() | b.places.keys()):
                total += 1
                if problem := _difference(a, b, name):
                    different.append(f"{kind} {name}")
                    print(f"  {kind} {name}: {problem}")
    print(f"{len(different)} of {counted(total, 'tensor')} differ", *different[:1], sep=", the first is ")
    return 1 if different else 0


def _difference(a: reader.TensorFiles, b: reader.TensorFiles | Source, name: str) -> str | None:
    if name not in a.places or name not in b.places:
        return f"only in the {'first' if name in a.places else 'second'}"
    if a.places[name].shape != b.places[name].shape:
        return f"shape {list(a.places[name].shape)} and {list(b.places[name].shape)}"
    shape, count, largest = a.places[name].shape, 0, 0.0
    rows = max(1, CHUNK_ELEMENTS // prod(shape[1:]))
    for start in range(0, shape[0], rows):
        box = Box.whole(name, shape).rows(start, min(start + rows, shape[0]))
        x, y = (torch.empty(box.numel, dtype=torch.float64) for _ in "ab")
        a.read_into(box, x)
        b.read_into(box, y)
        differs = (x != y) & ~(x.isnan() & y.isnan())
        count += int(differs.sum())
        largest = max(largest, float((x - y).abs()[differs].nan_to_num(float("inf")).max()) if differs.any() else 0.0)
    size = counted(prod(shape), "element")
    return f"{count} of {size} differ, by at most {largest:.6g}" if count else None
