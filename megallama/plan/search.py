"""Which layout is fastest: every legal one is priced in closed form, the best again with events and exact memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import get_args

from megallama.config.errors import ConfigError
from megallama.config.rules import check, legal_tp
from megallama.config.schema import Config, ParallelConfig
from megallama.plan.flops import head_forward, layer_forward
from megallama.plan.forecast import Forecast, forecast
from megallama.plan.capacity import job_bytes, GIB
from megallama.plan.hardware import Machine
from megallama.plan.job import Job, job_of
from megallama.plan.partition import balanced
from megallama.plan.plan import make_plan
from megallama.plan.pipeline_time import built
from megallama.plan.predict import Prediction, predict, step_seconds
from megallama.plan.topology import Topology

MICRO_BATCHES = (1, 2, 4, 8, 16)
SCHEDULES = get_args(ParallelConfig.model_fields["schedule"].annotation)


@dataclass(frozen=True)
class Found:
    """One layout, with its exact forecast."""

    config: Config
    forecast: Forecast

    @property
    def words(self) -> str:
        """The settings that make it, as one would type them."""
        p, c = self.config.parallel, self.config
        out = [f"parallel.tp={p.tp}", f"parallel.pp={p.pp}"]
        out += [f"parallel.chunks={p.chunks}"] * (p.chunks > 1)
        out += [f"parallel.schedule={p.schedule}"] * (p.pp > 1)
        out += [f"parallel.sequence_parallel={str(p.sequence_parallel).lower()}"] * (p.tp > 1)
        return " ".join([*out, f"batch.micro_batch_size={c.batch.micro_batch_size}", f"memory.recompute={c.memory.recompute}"])

    @property
    def limits(self) -> str:
        """The largest avoidable causes."""
        p = self.forecast.prediction
        avoidable = {k: v for k, v in p.seconds_by_cause.items() if k not in ("matrices", "attention", "head and loss")}
        largest = sorted(avoidable.items(), key=lambda kv: -kv[1])[:3]
        return ", ".join(f"{k} {v / p.step_seconds:.1%}" for k, v in largest)


def search(config: Config, ranks: int, machine: Machine, kernel: str, most: int = 10) -> tuple[list[Found], int, int]:
    """The best layouts, how many were legal, and how many of those would not fit.

    Raises: ConfigError if none fits.
    """
    priced: list[tuple[float, Job]] = []
    legal = full = 0
    for job in candidates(config, ranks, machine, kernel):
        legal += 1
        if job_bytes(job, machine).total > machine.gpu.memory_gib * GIB:
            full += 1
            continue
        priced.append((step_seconds(job, machine), job))
    priced.sort(key=lambda pair: pair[0])
    again = sorted(((predict(job, machine), job) for _, job in priced[: 3 * most]), key=lambda pair: pair[0].step_seconds)
    found: list[Found] = []
    for _, job in again:
        if len(found) == most:
            break
        own = config_of(config, job)
        if check(own, ranks, need_data=False):
            continue
        f = forecast(make_plan(own, ranks), machine, kernel)
        if f.fits:
            found.append(Found(own, f))
    if not found:
        raise ConfigError(f"none of {legal:,} legal layouts of {ranks} ranks fits into {machine.gpu.memory_gib:.0f} GiB; use more ranks")
    return sorted(found, key=lambda x: x.forecast.prediction.step_seconds), legal, full


def candidates(config: Config, ranks: int, machine: Machine, kernel: str) -> Iterator[Job]:
    """Every legal layout of this model and batch."""
    m, b = config.model, config.batch
    base = job_of(config, Topology(), kernel)
    for tp in legal_tp(config):
        for pp in range(1, m.num_layers + 1):
            dp, rest = divmod(ranks, tp * pp)
            if rest or not dp or tp > machine.gpu.gpus_per_node:
                continue
            for micro in MICRO_BATCHES:
                count, rest = divmod(b.global_batch_size, dp * micro)
                if rest or not count:
                    continue
                for schedule, chunks in placements(pp, m.num_layers, count):
                    split = stage_layers(config, pp * chunks)
                    for recompute in ("none", "selective", "full"):
                        for sp in (True, False) if tp > 1 else (True,):
                            if sp and micro * b.seq_length % tp:
                                continue
                            yield replace(
                                base, gpus=ranks, tp=tp, pp=pp, dp=dp, micro_batch=micro, num_microbatches=count,
                                chunks=chunks, schedule=schedule, recompute=recompute,
                                sequence_parallel=sp and tp > 1, stage_layers=split,
                            )  # fmt: skip


def placements(pp: int, layers: int, num_microbatches: int) -> Iterator[tuple[str, int]]:
    """Schedules and chunks that can run this many micro-batches."""
    if pp == 1:
        yield "1f1b", 1
        return
    for chunks in range(1, layers // pp + 1):
        if chunks == 1 or num_microbatches % pp == 0:
            yield "1f1b", chunks
    for name in SCHEDULES:
        if name not in ("gpipe", "1f1b", "csv"):
            for chunks in (1, 2):
                if pp * chunks <= layers and built(pp, chunks, name, num_microbatches):
                    yield name, chunks


def stage_layers(config: Config, stages: int) -> tuple[int, ...]:
    """Layers of each stage, balanced with the head."""
    m, s = config.model, config.batch.seq_length
    return _balanced(m.num_layers, stages, layer_forward(m, s, causal=True), head_forward(m))


_balanced = lru_cache(maxsize=256)(balanced)


def config_of(config: Config, job: Job) -> Config:
    """The configuration with a job's layout."""
    layout = {
        "tp": job.tp, "pp": job.pp, "chunks": job.chunks, "schedule": job.schedule, "stage_layers": job.stage_layers,
        "sequence_parallel": job.sequence_parallel or job.tp == 1,
    }  # fmt: skip
    return config.model_copy(update={
        "parallel": config.parallel.model_copy(update=layout),
        "batch": config.batch.model_copy(update={"micro_batch_size": job.micro_batch}),
        "memory": config.memory.model_copy(update={"recompute": job.recompute}),
    })  # fmt: skip


def table(found: list[Found]) -> str:
    """The best layouts as text."""
    lines = []
    for i, x in enumerate(found, 1):
        p = x.forecast.prediction
        lines.append(
            f"{i:>2}. {p.tokens_per_second:,.0f} tokens/s/GPU, {p.step_seconds:.3f} s, MFU {p.mfu_full:.1%}, "
            f"{max(x.forecast.peak_bytes) / GIB:.1f} GiB: {x.words}\n    limited by {x.limits}"
        )
    return "\n".join(lines)
