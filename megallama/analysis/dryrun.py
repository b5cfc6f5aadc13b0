"""A dry run: every distinct rank of a job on one CPU, through the real model, pipeline and optimizer, without memory.

Tensors are on torch's meta device (shapes and formats, no values), groups record and move nothing.
What decides a branch has a value: token counts are real tensors, and the votes of all ranks read as a loss and a norm
of 1, or as not finite in the step that all ranks must skip.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cache, partial
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megallama.analysis.agreement import Program, prove
from megallama.analysis.recording import Call, FakeGroup, Recording, Wait
from megallama.comm.group import Group, Partition, Solo, build_groups, partitions
from megallama.kernels.candidate import Target
from megallama.kernels.select import select_kernels
from megallama.layers.batch import MicroBatch
from megallama.model.llama import Stage
from megallama.plan.memory import stage_layout
from megallama.plan.plan import Plan
from megallama.plan.schedule import Action, F, Kind
from megallama.train.assemble import DTYPES, assemble
from megallama.train.step import evaluate_step, train_step

META, CPU = torch.device("meta"), torch.device("cpu")


@dataclass(frozen=True)
class DryRun:
    """What was executed and proved."""

    programs: tuple[Program, ...]  # of every rank; equal ranks share one
    phases: tuple[str, ...]  # the labels of calls end with the name of their phase
    blocking: bool  # it would end even if every collective held its rank


def dry_run(plan: Plan) -> DryRun:
    """Run one rank of every kind and prove that all fit together. Raises: Disagreement naming two."""
    kind, ranks = kinds(plan), range(plan.topology.world_size)
    programs = {key: record(plan, rank) for key, rank in {kind(r): r for r in reversed(ranks)}.items()}
    of_rank = tuple(programs[kind(rank)] for rank in ranks)
    blocking = prove(of_rank, partitions(plan.topology, plan.config.model.num_kv_heads or 1))
    return DryRun(of_rank, tuple(name for name, _ in _phases(plan)), blocking)


def kinds(plan: Plan) -> Callable[[int], Hashable]:
    """A function that tells of a rank what its communication can depend on."""
    same_weights = plan.topology.groups("dp", "cp")
    shards, number = len(same_weights[0]), {rank: i for ranks in same_weights for i, rank in enumerate(ranks)}
    layout_of = cache(lambda stage, tp: stage_layout(plan.config, plan.stages, stage, shards, tp))

    @cache
    def of_stage(stage: int, tp: int, shard: int) -> Hashable:
        buckets, summed = layout_of(stage, tp).buckets, Counter[str]()
        for bucket in buckets:
            for segment in layout_of(stage, tp).segments(*bucket.shard(shards, shard)):
                summed[segment.part.sum_over] += segment.count
        specs = [p.spec for bucket in buckets for p in bucket.params]
        held = tuple((s.shape, tuple(part.box.shape for part in s.parts)) for s in specs)
        return held, summed["tp"], summed["kv"]  # what is held of which tensors, and what is summed over others too

    def kind(rank: int) -> Hashable:
        at = plan.topology.coords(rank)
        return plan.work_of(rank), tuple(of_stage(s, at["tp"], number[rank]) for s in plan.schedule.stages_of(at["pp"]))

    return kind


def record(plan: Plan, rank: int) -> Program:
    """What one rank communicates in the phases of a dry run."""
    tape = _Tape(plan, rank)
    for tape.phase, run in _phases(plan):
        run(tape)
    return Program(tuple(tape.calls), tuple(tape.waits))


def _phases(plan: Plan) -> list[tuple[str, Callable[[_Tape], None]]]:
    """Loading, a step of every batch size, one more of the last, an evaluation, a skipped step."""
    sizes = [*plan.config.batch.sizes, plan.config.batch.global_batch_size]
    steps = [(f"step {i}", partial(_Tape.train, size=size)) for i, size in enumerate(sizes, 1)]
    skipped = f"skipped step {len(sizes) + 1}", partial(_Tape.train, size=sizes[-1], loss=nan)
    return [("loading", lambda tape: tape.rank.optimizer.loaded(0)), *steps, ("evaluation", _Tape.evaluate), skipped]


class _Tape:
    """One rank that is not there, and what it communicates."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan, self.phase, self.schedule = plan, "", plan.schedule
        self.calls: list[Call] = []
        self.waits: list[Wait] = []
        self._me, self._value, config = rank, 1.0, plan.config
        groups = build_groups(plan.topology, rank, config.model.num_kv_heads or 1, self._group)
        kernels = select_kernels(Target(META, DTYPES[config.precision.dtype]))
        built = assemble(plan, groups, META, kernels, lambda number, stage: _Repeating(number, stage, self))
        self.rank = replace(built, device=CPU, read=self._read)

    def _group(self, name: str, partition: Partition) -> Group:
        ranks = next(ranks for ranks in partition if self._me in ranks)
        if len(ranks) == 1:
            return Solo(name, self._me)
        label = partial(self.label, numbered=name[:2] != "dp")  # the last micro-batch of another replica may be another
        return Recording(FakeGroup(name, ranks, self._me), self.calls, self.waits, label)

    def _read(self, tensor: Tensor) -> list[float]:
        """A loss, or the sum of votes: loss, squared norm, ranks with values not finite, and others."""
        good = float(isfinite(self._value))
        return [good, good, 1 - good, *[0.0] * tensor.numel()][: tensor.numel()]

    def label(self, numbered: bool = True) -> str:
        """What a call is for, the same on all of its group: action and phase; of a message, the value's maker."""
        if (action := self.rank.runtime.observer.action) is None:
            return self.phase
        if action.kind.is_compute:
            return f"{action if numbered else f'{action.kind}{action.stage}'} of {self.phase}"
        way, _, made_by = action.kind.partition("_")  # send_F2.0 and recv_F3.0 are one message
        maker = action.stage - (way == "recv") * (1 if made_by == "F" else -1)
        return f"the result of {made_by}{maker}.{action.microbatch} of {self.phase}"

    def action(self) -> Action:
        assert (action := self.rank.runtime.observer.action) is not None, "outside the pipeline"
        return action

    def _batches(self, size: int) -> list[MicroBatch]:
        config, dp = self.plan.config, self.rank.groups.dp
        part = MicroBatch.zeros(config).part(self.rank.share).to(META)
        return [part] * config.batch.deal(size, dp.size)[dp.rank]

    def train(self, size: int, loss: float = 1.0) -> None:
        batches, masked = self._batches(size), self.plan.config.data.document_mask
        self.schedule, self._value = self.plan.schedule_for(len(batches)), loss
        deal = self.plan.config.batch.deal(size, self.rank.groups.dp.size)
        result = train_step(self.rank, self.schedule, batches, lr=1e-3, masked=masked, deal=deal)
        assert result.applied is isfinite(loss), result

    def evaluate(self) -> None:
        batches = self._batches(self.plan.config.batch.global_batch_size)
        self.schedule = self.plan.schedule_for(len(batches), training=False)
        evaluate_step(self.rank, self.schedule, batches)

    def said(self, label: str) -> Program:
        """The calls with this label, and the waits for them."""
        at = [i for i, call in enumerate(self.calls) if call.label == label]
        first = at[0] if at else 0
        assert at == list(range(first, first + len(at))), label
        waits = (Wait(w.before - first, w.call - first) for w in self.waits if 0 <= w.call - first < len(at))
        return Program(tuple(self.calls[i] for i in at), tuple(waits))

    def again(self, template: Program) -> None:
        """Repeat calls and waits under today's label."""
        at, label = len(self.calls), self.label()
        self.calls += [replace(call, label=label) for call in template.calls]
        self.waits += [Wait(before + at, call + at) for before, call in template.waits]


class _Repeating:
    """A stage that runs in full for the micro-batches that can differ, and repeats for the others what it said.

    The first waits for gathered weights, the last reduces gradients.
    """

    def __init__(self, number: int, stage: Stage, tape: _Tape) -> None:
        self._number, self._stage, self._tape = number, stage, tape
        self._templates: dict[tuple[str, bool], Program] = {}
        self._phase = ""
        self._out: dict[bool, Tensor] = {}
        self._anchor = torch.zeros(0, requires_grad=True)  # the first stage has no input that asks for a gradient

    def __call__(self, hidden: Tensor | None, batch: MicroBatch) -> Tensor:
        train = torch.is_grad_enabled()
        if self._phase != self._tape.phase:  # who runs in full, and of each kind the one to learn from
            self._phase = self._tape.phase
            steps = self._tape.schedule.steps[self._tape.rank.groups.pp.rank]
            mine = [a for a in steps if a.stage == self._number and a.kind.is_compute]
            order = {kind: [a.microbatch for a in mine if a.kind is kind] for kind, _, _ in mine}
            self._models = {kind: order[kind][:2][-1 if kind is F else 0] for kind in order}
            self._whole = {order[F][0], *(order[kind][-1] for kind in order if kind is not F)}
            self._whole.update(model for kind, model in self._models.items() if (kind, train) not in self._templates)
        if self._tape.action().microbatch in self._whole:
            out = self._stage(hidden, batch)
            self._out[train] = torch.empty_like(out)
            return out
        self._repeat(F, train)
        repeated: Tensor = _Repeated.apply(self._anchor if hidden is None else hidden, self, self._out[train])
        return repeated

    def backward(self) -> None:
        self._repeat(self._tape.action().kind, True)

    def _repeat(self, kind: Kind, train: bool) -> None:
        if (key := (kind, train)) not in self._templates:
            assert self._models[kind] in self._whole
            self._templates[key] = self._tape.said(f"{kind}{self._number}.{self._models[kind]} of {self._tape.phase}")
        self._tape.again(self._templates[key])


class _Repeated(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: _Repeating, like: Tensor) -> Tensor:
        ctx.x, ctx.stage = x.detach(), stage
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        ctx.stage.backward()
        return (torch.empty_like(ctx.x) if ctx.x.is_meta else None), None, None
