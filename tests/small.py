"""Small models, configurations and batches for tests, and the parts of one rank built from them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch

from megallama.comm.group import Groups, Solo, build_groups
from megallama.config.load import resolve
from megallama.config.schema import Config
from megallama.kernels.attention import Documents
from megallama.kernels.candidate import Target
from megallama.kernels.select import select_kernels
from megallama.layers.batch import MicroBatch
from megallama.model.llama import Stage
from megallama.plan.plan import Plan, make_plan
from megallama.train.assemble import DTYPES, Worker, assemble, initialize
from megallama.train.step import StepConsensus, train_step
from tests.threads import run_threads

CPU = torch.device("cpu")
MODEL = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "ffn_hidden_size": 48, "vocab_size": 61}
BATCH = {"seq_length": 16, "micro_batch_size": 1, "global_batch_size": 8}


def small_config(**sections: dict[str, Any]) -> Config:
    """A tiny float64 model with synthetic data; each keyword updates a section."""
    base: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "batch": BATCH,
        "precision": {"dtype": "fp64"},
        "memory": {"loss_chunk_tokens": 10, "loss_chunk_mb": 0},
        "overlap": {"bucket_mb": 0.01},
        "optimizer": {"lr": 1e-3},
        "lr_schedule": {"kind": "constant", "warmup_steps": 0},
        "data": {"synthetic": True},
        "train": {"steps": 20, "seed": 7},
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}
    return resolve(Config.model_validate(merged))


def solo_rank(config: Config) -> Worker:
    """The parts of a job of one rank, with initial weights."""
    plan = make_plan(config, 1)
    groups = build_groups(plan.topology, 0, config.model.num_kv_heads or 1, lambda name, parts: Solo(name))
    return build(plan, groups)


def build(plan: Plan, groups: Groups, device: torch.device = CPU) -> Worker:
    """The parts of one rank, with initial weights."""
    rank = assemble(plan, groups, device, select_kernels(Target(device, DTYPES[plan.config.precision.dtype])))
    initialize(rank, plan.config.train.seed)
    return rank


def body_of(stage: Stage, embed: bool = True) -> Stage:
    """A copy of the stage without its head, and without its embedding if so asked for."""
    part = copy(stage)
    part.head, part.embed = None, stage.embed if embed else None
    return part


def logits(rank: Worker, tokens: torch.Tensor) -> torch.Tensor:
    """All logits [T, V] of the tokens [T] of samples, on a rank that holds the whole model."""
    (stage,), head = rank.stages.values(), rank.stages[0].head
    assert head is not None and rank.groups.tp.size == 1
    hidden = body_of(stage)(None, MicroBatch(tokens, tokens))
    return head.param.fprop(head.norm.forward(hidden)[1])[:, : head.valid]


def tokens(config: Config, steps: int, seed: int = 5) -> torch.Tensor:
    """[steps, global batch, s + 1] token ids with structure a model can learn."""
    generator = torch.Generator().manual_seed(seed)
    shape = steps, config.batch.global_batch_size, config.batch.seq_length + 1
    steps_of = torch.randint(1, 4, shape, generator=generator).cumsum(-1)
    return steps_of % config.model.vocab_size


def documents(config: Config, steps: int, seed: int = 6) -> torch.Tensor:
    """[steps, global batch, s]: where the document of each token begins in its sample; some end where samples do."""
    generator = torch.Generator().manual_seed(seed)
    shape = steps, config.batch.global_batch_size, config.batch.seq_length
    begins = torch.rand(shape, generator=generator) < 0.3
    begins[:, 0, -1], begins[:, 0, :3] = True, torch.tensor([False, True, True])
    at = torch.arange(shape[-1]).expand(shape)
    return torch.where(begins, at, 0).cummax(-1).values


def micro_batches(
    rank: Worker, data: torch.Tensor, masks: torch.Tensor | None = None, starts: torch.Tensor | None = None
) -> list[MicroBatch]:
    """This rank's micro-batches of one global batch [global batch, s + 1]; of documents, if `starts` says where."""
    size, dp = rank.plan.config.batch.micro_batch_size, rank.groups.dp
    if starts is not None:  # the last token of a document, known by the next one's position, predicts nothing
        begins = starts == torch.arange(starts.shape[-1])
        ends = torch.cat([begins[:, 1:], torch.zeros_like(begins[:, :1])], 1)
        masks = ~ends if masks is None else masks & ~ends
    out = []
    for first in range(dp.rank * size, len(data), dp.size * size):
        rows = slice(first, first + size)
        mask = None if masks is None else masks[rows].contiguous()
        parts = None if starts is None else Documents.of(starts[rows].contiguous())
        ids = data[rows, :-1].clone()  # in memory of their own, as those of training
        batch = MicroBatch(ids, data[rows, 1:].contiguous(), mask, parts).part(rank.share)
        out.append(batch.to(rank.device))
    return out


def train(
    rank: Worker, data: torch.Tensor, masks: torch.Tensor | None = None, starts: torch.Tensor | None = None
) -> list[StepConsensus]:
    """One training step on each batch of `data` [steps, global batch, s + 1]."""
    results = []
    for step, batch in enumerate(data):
        extra = (None if part is None else part[step] for part in (masks, starts))
        batches = micro_batches(rank, batch, *extra)
        schedule = rank.plan.schedule_for(len(batches))
        masked = masks is not None or starts is not None
        config, deal = rank.plan.config, rank.plan.config.batch.deal(len(batch), rank.groups.dp.size)
        results.append(train_step(rank, schedule, batches, config.optimizer.lr, masked=masked, deal=deal))
    return results


def on_threads(config: Config, ranks: int, fn: Callable[[Worker], Any], delays: int | None = None) -> list[Any]:
    """fn on every rank of a job whose ranks are threads; `delays` is the seed of random ones."""
    plan = make_plan(config, ranks)
    heads = config.model.num_kv_heads or 1
    if ranks == 1:
        return [fn(solo_rank(config))]
    body = lambda groups: fn(build(plan, groups))  # noqa: E731
    return run_threads(ranks, body, plan.topology, num_kv_heads=heads, delays=delays)


def curve(results: Sequence[StepConsensus]) -> list[float]:
    """Losses and gradient norms, alternating."""
    return list(itertools.chain.from_iterable((r.loss, r.grad_norm) for r in results))


def deviation(own: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest relative difference."""
    assert len(own) == len(theirs)
    return max(abs(a - b) / abs(b) for a, b in zip(own, theirs, strict=True))
