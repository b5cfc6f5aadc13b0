"""Training state for the tests: one reference state, cut into the shards that any layout gives its ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallama.checkpoint.manager import CheckpointManager
from megallama.checkpoint.manifest import STATE as KINDS
from megallama.comm.group import Group, Solo
from megallama.config.schema import BatchConfig, CheckpointConfig, Config, ModelConfig, PrecisionConfig
from megallama.layers.param import Shard
from megallama.plan.box import Box
from megallama.plan.params import ParamBuilder, build_layout, global_shapes
from megallama.plan.topology import Topology
from tests.threads import run_threads

MODEL = ModelConfig(
    hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, ffn_hidden_size=56, vocab_size=131
)
State = dict[str, dict[str, Tensor]]


def make_config(model: ModelConfig = MODEL, dtype: str = "bf16", **checkpoint: Any) -> Config:
    settings = {"async_save": False, "keep_last": 2} | checkpoint
    return Config(
        model=model,
        precision=PrecisionConfig(dtype=dtype),
        batch=BatchConfig(seq_length=64),
        checkpoint=CheckpointConfig(**settings),
    )


def make_state(model: ModelConfig = MODEL, dtype: torch.dtype = torch.float32, seed: int = 1) -> State:
    """kind -> name -> random tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: {n: torch.randn(s, generator=generator, dtype=dtype) for n, s in global_shapes(model).items()}
        for kind in KINDS
    }


def split_layers(num_layers: int, stages: int) -> list[list[int]]:
    """Uneven on purpose where it does not divide."""
    return [[i for i in range(num_layers) if i * stages // num_layers == s] for s in range(stages)]


def boxes(model: ModelConfig, grid: Topology, chunks: int, rank: int, owned: bool, bucket: int = 3000) -> list[Box]:
    """The boxes of one rank's optimizer shards, as the plan gives them."""
    at = grid.coords(rank)
    stages = split_layers(model.num_layers, grid.pp * chunks)
    builder = ParamBuilder(model, grid.tp, at["tp"], sequence_parallel=True)
    out: list[Box] = []
    for number, layers in enumerate(stages):
        if number % grid.pp != at["pp"]:
            continue
        specs = builder.stage(layers, first=number == 0, last=number == len(stages) - 1)
        plan = build_layout(specs, grid.dp, bucket)
        for piece in plan.buckets:
            for segment in plan.segments(*piece.shard(grid.dp, at["dp"])):
                if segment.part.owner or not owned:
                    out += segment.boxes()
    return out


def take(state: State, found: Sequence[Box]) -> list[Shard]:
    """Shards holding the elements of `state`."""

    def cut(tensors: dict[str, Tensor], box: Box) -> Tensor:
        return tensors[box.key][tuple(map(slice, box.start, box.stop))].reshape(-1).clone()

    return [Shard(box, {kind: cut(tensors, box) for kind, tensors in state.items()}) for box in found]


def empty(found: Sequence[Box], dtype: torch.dtype = torch.float32) -> list[Shard]:
    """Shards full of NaN, to be loaded into."""
    return [Shard(b, {k: torch.full((b.numel,), float("nan"), dtype=dtype) for k in KINDS}) for b in found]


def assert_holds(shards: Sequence[Shard], state: State) -> None:
    """Every shard is bitwise the reference's elements."""
    assert shards
    for shard, want in zip(shards, take(state, [s.box for s in shards]), strict=True):
        for kind, tensor in shard.state.items():
            assert torch.equal(tensor, want.state[kind].to(tensor.dtype)), (shard.box, kind)


def on_grid(grid: Topology, fn: Callable[[Group], Any]) -> list[Any]:
    return run_threads(grid.world_size, fn)


def make_manager(folder: Path, config: Config, group: Group | None = None, **more: Any) -> CheckpointManager:
    group = group or Solo()
    tokenizer, log = more.pop("tokenizer", None), more.pop("log", lambda text: None)
    if not more.pop("told_of_digests", False):  # whether a library is installed is no matter of most tests
        told, log = log, lambda text: None if text.startswith("digests are SHA-256: ") else told(text)
    settings = {"shard_bytes": 60_000, "block_bytes": 4096, "lease_seconds": 0.6} | more
    return CheckpointManager(config, folder, group, tokenizer, log, **settings)


def save_on(
    folder: Path, config: Config, state: State, grid: Topology, chunks: int = 1, step: int = 1, **more: Any
) -> None:
    """Save `state` as the ranks of a layout would."""

    def rank(group: Group) -> None:
        manager = make_manager(folder, config, group, **more)
        manager.save(step, take(state, boxes(config.model, grid, chunks, group.rank, owned=True)), {"step": step})
        manager.finish()

    on_grid(grid, rank)


def solo_shards(state: State) -> list[Shard]:
    return take(state, [Box.whole(n, tuple(t.shape)) for n, t in state["master"].items()])


def empty_solo(model: ModelConfig = MODEL, dtype: torch.dtype = torch.float32) -> list[Shard]:
    return empty([Box.whole(n, s) for n, s in global_shapes(model).items()], dtype)


def file_hashes(step: Path) -> dict[str, str]:
    """Name -> SHA-256 of the model and optimizer files."""
    files = sorted([*(step / "model").iterdir(), *(step / "optimizer").iterdir()])
    return {str(f.relative_to(step)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def elements(model: ModelConfig) -> int:
    return sum(prod(s) for s in global_shapes(model).values())
