"""The parts of one rank, built from the plan: buffers, stages, optimizer, pipeline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megallama.comm.flight_record import FlightRecord
from megallama.comm.group import Group, Groups
from megallama.config.errors import MegallamaError
from megallama.config.schema import Config
from megallama.kernels.candidate import Target
from megallama.kernels.select import Kernels, select_kernels
from megallama.layers.context import ContextParallel
from megallama.layers.linear import TensorParallel
from megallama.layers.param import FlatBuffers
from megallama.model.llama import Stage, fill
from megallama.optim.update import AdamW, Update
from megallama.pipeline.runtime import PipelineRuntime, StageCall, StageWork
from megallama.plan.exchange import Share, share
from megallama.plan.memory import stage_layout
from megallama.plan.params import global_shapes, init_std
from megallama.plan.plan import Plan

Wrap = Callable[[int, Stage], StageCall]  # number, stage -> what is called in its place
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Worker:
    """Everything that one rank trains with."""

    plan: Plan
    groups: Groups
    device: torch.device
    stages: dict[int, Stage]  # global stage number -> stage
    buffers: dict[int, FlatBuffers]
    optimizer: Update
    runtime: PipelineRuntime
    share: Share  # of every sample
    read: Callable[[Tensor], list[Any]] = Tensor.tolist  # of a small tensor; waits for the device

    @property
    def counts_loss(self) -> bool:
        """Whether its loss enters the sum over ranks: one per token, on the last stage."""
        return len(self.plan.stages) - 1 in self.stages and self.groups.tp.rank == 0


def kernels_of(config: Config, device: torch.device, named: Mapping[str, str] | None = None) -> Kernels:
    """What this configuration uses on `device`; `named` ones, by operation, come first."""
    fewer, compiled = config.parallel.cp > 1 and share(config, 0).gathers, config.run.compile is True
    dtype, documents = DTYPES[config.precision.dtype], config.data.document_mask
    target = Target(device, dtype, documents, fewer, compiled, config.model.hidden_size)
    return select_kernels(target, fp8=config.precision.fp8, without=config.run.without_kernels, named=named)


def same_kernels(group: Group, kernels: Kernels) -> None:
    """Raises: MegallamaError, on every rank, if those of another one differ."""
    selected = group.gather_values([(c.operation, c.selected) for c in kernels.choices])
    for rank, pairs in enumerate(selected):
        for (operation, own), (_, other) in zip(selected[0], pairs, strict=True):
            if own != other:
                raise MegallamaError(
                    f"{operation}: rank 0 took {own}, rank {rank} {other}; its log says why. Make the installations "
                    f'alike, or write run.without_kernels=["{operation}: {own}"]'
                )


def assemble(
    plan: Plan, groups: Groups, device: torch.device, kernels: Kernels, wrap: Wrap | None = None,
    record: FlightRecord | None = None, trains: bool = True, kept: Worker | None = None,
) -> Worker:  # fmt: skip
    """Build rank `groups.rank`; weights are zero until `initialize` or a checkpoint fills them.

    Without `trains` it holds weights alone, and only its stages' forward may be called.
    kept: one with the same weights and optimizer, which are taken over as they are.
    """
    config, dtype = plan.config, DTYPES[plan.config.precision.dtype]
    sharded = config.parallel.sequence_parallel and groups.tp.size > 1
    tp = TensorParallel(
        groups.tp, sharded, overlap=config.overlap.tensor_parallel, keep=config.memory.recompute == "none",
        chunks=config.overlap.tensor_parallel_chunks,
    )  # fmt: skip
    part = share(config, groups.cp.rank)
    context = ContextParallel(groups.cp, part, config.memory.cp_keep_kv, config.overlap.context_parallel_heads)
    stages, buffers = {}, kept.buffers if kept else {}
    for number in plan.schedule.stages_of(groups.pp.rank):
        first, last = number == 0, number == len(plan.stages) - 1
        if not kept:
            layout = stage_layout(config, plan.stages, number, groups.dp_cp.size, groups.tp.rank)
            buffers[number] = FlatBuffers(layout, dtype, device, kernels, trains)
        numbers = plan.stages[number]
        stages[number] = Stage(config, buffers[number], numbers, first, last, tp, kernels, context, record)
    rule = AdamW(config.optimizer, kernels.adamw, moments=("exp_avg", "exp_avg_sq") if trains else ())
    optimizer = kept.optimizer if kept else None
    optimizer = optimizer or Update([*buffers.values()], groups, config.overlap, rule, kernels.sum_of_squares)
    work = {
        number: StageWork(wrap(number, stage) if wrap else stage, buffers[number].queue, sync.last_microbatch)
        for (number, stage), sync in zip(stages.items(), optimizer.syncs, strict=True)
    }
    hidden = torch.empty(0, config.model.hidden_size, dtype=dtype, device=device)
    shares, longest = groups.tp.size if sharded else 1, config.batch.seq_length // part.size
    runtime = PipelineRuntime(work, groups.pp, hidden, record, shares=shares, longest=longest)
    return Worker(plan, groups, device, stages, buffers, optimizer, runtime, part)


def initialize(worker: Worker, seed: int) -> None:
    """Write initial weights, which depend on seed and model, never on the layout."""
    model = worker.plan.config.model
    shapes = global_shapes(model)
    for shard in worker.optimizer.shards(owned_only=False):
        key, master = shard.box.key, shard.state["master"]
        fill(master.view(shard.box.shape), shard.box, shapes[key], seed, init_std(model, key))
    worker.optimizer.loaded(steps=0)
