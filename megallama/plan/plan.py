"""The plan of a run, and a page of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from megallama.config.errors import counted
from megallama.config.schema import Config
from megallama.plan.builders import build_forward, build_schedule
from megallama.plan.exchange import exchange
from megallama.plan.memory import RankMemory, rank_memory
from megallama.plan.params import ParamBuilder, heads, num_parameters
from megallama.plan.schedule import Schedule
from megallama.plan.timeline import LEGEND, draw, simulate
from megallama.plan.topology import Topology
from megallama.plan.work import Stages, partition, stage_costs, training_flops


@dataclass(frozen=True)
class Plan:
    """What will happen; ``print(plan)`` is a page."""

    config: Config
    topology: Topology
    stages: Stages  # layer numbers of each stage, in model order
    schedule: Schedule  # of the first replica in a step of the full batch, lowered and checked
    behind: tuple[int, int, int] = (0, 0, 0)  # steps made before, their samples and tokens
    _schedules: dict[tuple[bool, int], Schedule] = field(default_factory=dict, repr=False, compare=False)

    def schedule_for(self, num_microbatches: int, *, training: bool = True) -> Schedule:
        """The schedule of a step or an evaluation; each is built once."""
        if training and num_microbatches == self.schedule.num_microbatches:
            return self.schedule
        if (key := (training, n := num_microbatches)) not in self._schedules:
            built = build_schedule(self.config.parallel, n) if training else build_forward(self.schedule, n)
            self._schedules[key] = built
        return self._schedules[key]

    @property
    def tokens(self) -> int:
        """That are yet to be read."""
        train, b, (steps, samples, read) = self.config.train, self.config.batch, self.behind
        if train.phases:
            return max(0, train.phases[-1].until_tokens - read)
        return (b.samples_after(train.steps, steps, samples) - samples) * b.seq_length

    def phases(self, tokens: int) -> list[Plan]:
        """Of each phase that lies ahead where so many tokens are read; without phases this one."""
        train, ranks = self.config.train, self.topology.world_size
        ahead = range(train.phase_after(tokens), len(train.phases))
        return [make_plan(self.config.at(number), ranks) for number in ahead] or [self]

    def memory(self, pp_rank: int) -> RankMemory:
        """Bytes of ranks at a pipeline position, in a replica with most micro-batches."""
        return rank_memory(self.config, self.stages, self.schedule, self.topology.size("dp", "cp"), pp_rank)

    def worst(self, pp_rank: int, tokens: int) -> RankMemory:
        """`memory` in the one of `phases` that takes most."""
        return max((plan.memory(pp_rank) for plan in self.phases(tokens)), key=lambda memory: memory.total)

    def work_of(self, rank: int) -> tuple[int, ...]:
        """Pipeline position, and micro-batches in a step of each size: the same is the same work."""
        at, b, dp = self.topology.coords(rank), self.config.batch, self.topology.dp
        sizes = b.sizes if b.uneven else ()  # those that are past may be too small to be dealt
        return at["pp"], *(len(range(at["dp"], size // b.micro_batch_size, dp)) for size in sizes)

    def __str__(self) -> str:
        schedule, facts = self.schedule, "\n".join(f"{name:<10} {text}" for name, text in _facts(self))
        blocks = [facts, _stage_table(self), _memory_table(self)]
        if 1 < schedule.num_ranks <= 8 and schedule.num_microbatches * schedule.num_stages <= 64:
            blocks.append(f"{draw(simulate(schedule), width=96)}\n{LEGEND}")
        return "\n\n".join(blocks)


def make_plan(config: Config, ranks: int) -> Plan:
    """The plan of a configuration that `config.rules` finds no fault with.

    Raises: ConfigError if the ranks cannot be cut so, ScheduleError if the schedule cannot run the batch.
    """
    p = config.parallel
    topology = Topology.fill(ranks, tp=p.tp, pp=p.pp, cp=p.cp, order=p.rank_order)
    deal = config.batch.deal(config.batch.global_batch_size, topology.dp)
    schedule = build_schedule(p, deal[0])
    topology = replace(topology, ends=(schedule.owners[0], schedule.owners[-1]))
    plan = Plan(config, topology, partition(config), schedule)
    plan.schedule_for(deal[-1])  # now is the time to find that it cannot be run
    return plan


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    config, topology, schedule = plan.config, plan.topology, plan.schedule
    m, b, p = config.model, config.batch, config.parallel
    n, k, d = heads(m)
    yield "model", f"{m.preset or 'own sizes'}: {num_parameters(m):,} parameters"
    tied = ", tied embeddings" if m.tie_embeddings else ""
    yield "", (
        f"{counted(m.num_layers, 'layer')}, hidden {m.hidden_size}, {counted(n, 'head')} of {d} ({k} key/value), "
        f"ffn {m.ffn_hidden_size}, vocabulary {m.vocab_size}{tied}"
    )
    sharded = ", sequence parallel" if p.sequence_parallel and p.tp > 1 else ""
    yield "layout", f"{topology}{sharded}; rank order {p.rank_order}"
    if p.cp > 1:
        yield "exchange", ", since ".join(exchange(config))
    fp8 = "" if config.precision.fp8 == "none" else f", fp8 {config.precision.fp8} in the layers' linear maps"
    yield "precision", f"{config.precision.dtype}{fp8}, recompute {config.memory.recompute}"
    size, deal = b.global_batch_size, b.deal(b.global_batch_size, topology.dp)
    count = f"{deal[0]} or " * (deal[-1] < deal[0]) + counted(deal[-1], "micro-batch")
    yield "batch", (
        f"{counted(size, 'sequence')} x {b.seq_length} = {counted(size * b.seq_length, 'token', ',')} per step = "
        f"{counted(topology.dp, 'replica')} x {count} x {b.micro_batch_size}"
    )
    if deal[-1] < deal[0]:
        idle, fewer = 1 - sum(deal) / (len(deal) * deal[0]), deal.count(deal[-1])
        yield "", f"replicas idle {idle:.1%} of the time, as {fewer} of {len(deal)} have one micro-batch less"
    if len(b.sizes) > 1:
        ramp = counted(b.ramp_samples or 0, "sequence", ",")
        yield "", f"grows from {b.ramp_start} by {b.ramp_increment} over the first {ramp}"
    tokens, made = plan.tokens, f", {plan.behind[0]:,} of them made; ahead" if plan.behind[0] else ","
    yield "run", f"{counted(config.train.steps, 'step', ',')}{made} {counted(tokens, 'token', ',')}"
    work = training_flops(m, b.seq_length, causal=True)
    each = f"{work / 1e9:,.3f}" if work >= 1e9 else f"{work / 1e9:.4g}"
    whole = " in this phase" if config.train.phases else f"; {work * tokens:.3g} FLOP in all"
    yield "work", f"{each} GFLOP per token (causal attention){whole}"
    report = simulate(schedule, stage_costs(config, plan.stages))
    chunks = f", {p.chunks} chunks per rank" if p.chunks > 1 else ""
    yield "schedule", (
        f"{schedule.name}{chunks}: ranks idle {report.bubble:.1%} of the step; "
        f"in flight per rank {_ranges(report.peak_in_flight)}"
    )


def _stage_table(plan: Plan) -> str:
    costs = [sum(c) for c in stage_costs(plan.config, plan.stages)]
    rows = []
    for number, layers in enumerate(plan.stages):
        specs = ParamBuilder(plan.config.model).stage(layers, number == 0, number == len(plan.stages) - 1)
        parameters = sum(spec.numel for spec in specs)
        which = f"{layers[0]}-{layers[-1]} ({len(layers)})" if layers else "none"
        share = f"{costs[number] / sum(costs):.1%}"
        rows.append([str(number), str(plan.schedule.owners[number]), which, f"{parameters:,}", share])
    return table(["stage", "rank", "layers", "parameters", "share of work"], rows)


def _memory_table(plan: Plan) -> str:
    memory = [plan.memory(rank) for rank in range(plan.schedule.num_ranks)]
    unit, name = (2**30, "GiB") if max(m.total for m in memory) >= 2**30 else (2**20, "MiB")
    rows = []
    for rank, m in enumerate(memory):
        cells = [f"{v / unit:.2f}" for v in (m.weights, m.main_grads, m.optimizer, m.activations, m.logits, m.total)]
        rows.append([str(rank), *cells[:3], str(plan.schedule.peak_in_flight(rank)), *cells[3:]])
    head = ["pipeline rank", "weights", "main grads", "optimizer", "in flight", "activations", "logits", "total"]
    return table(head, rows) + f"\n{name} per rank; communication and work buffers come on top"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns aligned right; of more than 20 rows the middle ones are left out."""
    if len(rows) > 20:
        rows = [*rows[:9], ["..."] * len(head), *rows[-10:]]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in [head, *rows])


def _ranges(values: Iterable[int]) -> str:
    words = list(map(str, values))
    return " ".join(words if len(words) <= 16 else [*words[:8], "...", *words[-4:]])
