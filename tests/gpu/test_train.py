"""Training on a GPU: nothing waits within micro-batches, memory stays, batches arrive whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megallama.comm.group import Solo, build_groups
from megallama.config.schema import Config
from megallama.data.loader import Loader
from megallama.data.samples import Samples
from megallama.kernels.candidate import Target
from megallama.kernels.select import select_kernels
from megallama.plan.plan import make_plan
from megallama.train.assemble import DTYPES, Worker, assemble, initialize
from megallama.train.step import train_step
from tests.small import micro_batches, small_config, tokens, train

MODEL = {"hidden_size": 128, "num_heads": 4, "ffn_hidden_size": 256, "num_layers": 2, "vocab_size": 128}


def config() -> Config:
    base: dict[str, Any] = {"model": MODEL, "precision": {"dtype": "bf16"}}
    base["batch"] = {"seq_length": 64, "micro_batch_size": 2, "global_batch_size": 6}
    return small_config(**base)


def on_gpu(setting: Config, device: torch.device) -> Worker:
    plan = make_plan(setting, 1)
    groups = build_groups(plan.topology, 0, setting.model.num_kv_heads or 1, lambda name, parts: Solo(name))
    rank = assemble(plan, groups, device, select_kernels(Target(device, DTYPES[setting.precision.dtype])))
    initialize(rank, setting.train.seed)
    return rank


def test_no_micro_batch_waits_for_the_device(cuda: torch.device) -> None:
    rank = on_gpu(config(), cuda)
    train(rank, tokens(rank.plan.config, 5))  # what is set up on first use may wait
    batches = micro_batches(rank, tokens(rank.plan.config, 1)[0])
    run = rank.runtime.run

    def watched(*args: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    rank.runtime.run = watched  # type: ignore[method-assign]
    assert train_step(rank, rank.plan.schedule_for(len(batches)), batches, 1e-3).applied


def test_batches_of_a_loader_arrive_whole(cuda: torch.device) -> None:
    """Its thread asks CUDA for memory and events while a step runs."""
    rank = on_gpu(config(), cuda)

    def read(ids: Sequence[int]) -> Samples:
        return Samples(np.array([np.arange(i, i + 65) % 128 for i in ids]))

    def ids_of_step(step: int) -> list[list[int]]:
        return [[6 * step + 2 * m, 6 * step + 2 * m + 1] for m in range(3)]

    with Loader(read, ids_of_step, stop_step=20, prefetch=4, device=cuda) as loader:
        for step, batches in enumerate(loader):
            assert train_step(rank, rank.plan.schedule_for(3), batches, 1e-3).applied
            assert batches[2].tokens[1].tolist() == [(6 * step + 5 + j) % 128 for j in range(64)]


def test_memory_is_flat_over_a_thousand_steps(cuda: torch.device) -> None:
    rank = on_gpu(config(), cuda)
    batches = micro_batches(rank, tokens(rank.plan.config, 1)[0])
    schedule, seen = rank.plan.schedule_for(len(batches)), []
    names = ("allocated_bytes.all.current", "reserved_bytes.all.current", "active.all.current", "num_alloc_retries")
    for step in range(1, 1001):
        train_step(rank, schedule, batches, 1e-4)
        if step in (100, 500, 1000):
            stats = torch.cuda.memory_stats(cuda)
            seen.append([stats[name] for name in names])
    assert seen[0] == seen[1] == seen[2]
