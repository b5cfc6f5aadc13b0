"""The mean of checkpoints of one model, written as a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from megallama.checkpoint import disk, manifest
from megallama.checkpoint.disk import CheckpointError, DamagedError
from megallama.checkpoint.folder import find_checkpoint
from megallama.checkpoint.manager import CheckpointManager
from megallama.checkpoint.manifest import STATE
from megallama.checkpoint.reader import open_state, verify_blocks
from megallama.comm.group import Solo
from megallama.config.schema import Config
from megallama.layers.param import Shard
from megallama.plan.box import Box


def average(given: Sequence[Path], output: Path, log: Callable[[str], None]) -> None:
    """Write output/step-N: the last of `given`, with the means of weights and moments, made tensor by tensor in fp64.

    Raises: CheckpointError for checkpoints of different models, or an `output` that exists; DamagedError.
    """
    paths = [find_checkpoint(path, log) for path in given]
    saved = [manifest.read_manifest(path) for path in paths]
    problems = [f"{output} exists; name a new folder, or delete it first"] * output.exists()
    for path, one in zip(paths, saved, strict=True):
        problems += [f"{path}: {text}" for text in manifest.differences(one.model, saved[-1].model)]
    if problems:
        raise CheckpointError("\n  ".join(problems))
    pairs = [*zip(paths, saved, strict=True)]
    path, one = pairs[-1]
    names = [name for name in one.files if name.startswith("model/") and "safetensors" not in name]
    if damaged := verify_blocks(path, one, [block for name in names for block in one.blocks(name)]):
        raise DamagedError("; ".join(damaged))
    small = {name.removeprefix("model/"): disk.read_file(path / name, one.files[name].size) for name in names}
    with ExitStack() as stack:
        found = {kind: [stack.enter_context(open_state(*pair, kind)) for pair in pairs] for kind in STATE}

        def mean(kind: str, name: str) -> Tensor:
            first, *others = (files.tensor(name) for files in found[kind])
            total = sum(others, first.to(torch.float64, copy=True))
            return (total / len(paths)).to(first.dtype).reshape(-1)

        shapes = {name: place.shape for name, place in found["master"][-1].places.items()}
        shards = (Shard(Box.whole(n, shape), {kind: mean(kind, n) for kind in STATE}) for n, shape in shapes.items())
        config = Config.model_validate(one.config).changed(checkpoint={"async_save": False})
        manager = CheckpointManager(config, output, Solo(), None, log, small=small)
        manager.save(one.step, shards, one.counters)
