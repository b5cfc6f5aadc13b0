"""Which layout is fastest: every legal one is priced in closed form, the best again with events and exact memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import get_args

from megallama.config.errors import ConfigError
from megallama.config.rules import check, legal_tp
from megallama.config.schema import Config, ParallelConfig
from megallama.forecast.capacity import GIB, job_bytes
from megallama.forecast.cost import built
from megallama.forecast.forecast import Forecast, forecast
from megallama.forecast.hardware import Machine
from megallama.forecast.job import Job, job_of
from megallama.forecast.predict import predict, seconds_by_cause
from megallama.plan.flops import head_forward, layer_forward
from megallama.plan.partition import balanced
from megallama.plan.plan import make_plan
from megallama.plan.topology import Topology

MICRO_BATCHES = (1, 2, 4, 8, 16)
SCHEDULES = get_args(ParallelConfig.model_fields["schedule"].annotation)
ZERO_BUBBLE = [name for name in SCHEDULES if name not in ("gpipe", "1f1b", "csv")]

_balanced = cache(balanced)


def search(
    config: Config, ranks: int, machine: Machine, kernel: str, most: int = 10
) -> tuple[list[Forecast], int, int]:
    """The fastest layouts; how many are legal, how many too large. Raises: ConfigError if none is legal and fits."""
    every = list(candidates(config, ranks, machine, kernel))
    small = [job for job in every if job_bytes(job, machine) <= machine.gpu.memory_gib * GIB]
    priced = sorted(small, key=lambda job: sum(seconds_by_cause(job, machine).values()))[: 3 * most]
    found: list[Forecast] = []
    for job in sorted(priced, key=lambda job: predict(job, machine).step_seconds):
        own = config_of(config, job)
        if len(found) < most and not check(own, ranks, need_data=False):
            found += [f for f in [forecast(make_plan(own, ranks), machine, kernel)] if f.fits]
    if not found:
        words = f"none of {len(every):,} legal layouts of {ranks} ranks fits into {machine.gpu.memory_gib:.0f} GiB"
        raise ConfigError(f"{words}; use other ranks, or another batch.global_batch_size")
    found.sort(key=lambda f: f.prediction.step_seconds)
    return found, len(every), len(every) - len(small)


def candidates(config: Config, ranks: int, machine: Machine, kernel: str) -> Iterator[Job]:
    """Every legal layout of this model and batch."""
    m, b = config.model, config.batch
    base = job_of(config.model_copy(update={"parallel": ParallelConfig()}), Topology(), kernel)
    layer = layer_forward(m, b.seq_length, causal=True)
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
                    for recompute in ("none", "selective", "full"):
                        repeats = 4 if recompute == "full" else 3
                        split = _balanced(m.num_layers, pp * chunks, repeats * layer, 3 * head_forward(m))
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
    for chunks in range(1, layers // pp + 1 if pp > 1 else 2):
        if chunks == 1 or num_microbatches % pp == 0:
            yield "1f1b", chunks
    for name in ZERO_BUBBLE if pp > 1 else ():
        for chunks in (1, 2):
            if pp * chunks <= layers and built(pp, chunks, name, min(num_microbatches, 2 * pp)):
                yield name, chunks


def config_of(config: Config, job: Job) -> Config:
    """The configuration with a job's layout."""
    layout = {k: getattr(job, k) for k in ("tp", "pp", "chunks", "schedule")} | {"stage_layers": None}
    layout["sequence_parallel"] = job.sequence_parallel or job.tp == 1
    changes = {"batch": {"micro_batch_size": job.micro_batch}, "memory": {"recompute": job.recompute}}
    changes["parallel"] = layout
    return config.model_copy(update={k: getattr(config, k).model_copy(update=v) for k, v in changes.items()})
