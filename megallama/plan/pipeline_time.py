"""How long a step's micro-batches take in the pipeline: closed forms, and events for the schedules that we build.

Closed form of 1F1B with unequal stages T_i and transfers that take `hop` without occupying anybody: a stage i that
holds p-i micro-batches repeats no faster than its round trip to the last stage allows,

    period = max(max_i T_i, max_i (sum_{j >= i} T_j + 2 (p-1-i) hop) / (p-i)),
    time   = (m-1) period + sum_i T_i + 2 (p-1) hop.

Zero bubble (Qi et al. 2023, arXiv:2401.10241, table 2): (p-1)(F+I-W) idle for H1, (p-1)(F+I-2W) for H2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from pydantic import ValidationError

from megallama.config.schema import ParallelConfig
from megallama.plan.job import Job
from megallama.plan.schedule import Schedule, ScheduleError, compute_schedule
from megallama.plan.simulate import StageCost, walk


def closed_form(job: Job, costs: Sequence[StageCost], hop: float) -> float:
    """Seconds of all micro-batches of a step."""
    p, m = job.pp, job.num_microbatches
    ranks = [sum(map(sum, costs[r::p])) for r in range(p)]
    busiest, mean = max(ranks), sum(ranks) / p
    if p == 1:
        return m * mean
    f, i, w = (sum(c[k] for c in costs) / p for k in range(3))
    if job.schedule in ("zb-h1", "zb-1p"):
        return m * busiest + (p - 1) * (max(0.0, f + i - w) + 4 * hop)
    if job.schedule in ("zb-h2", "zb-2p"):
        idle = 0.0 if job.schedule == "zb-2p" else f + i - 2 * w
        return m * busiest + (p - 1) * (max(0.0, idle) + 2 * hop)
    if job.schedule.startswith(("zb-v", "dualpipe")):
        return m * busiest + (p - 1) * (max(0.0, f + i - 2 * w) / 2 + 2 * hop)
    if job.chunks > 1:
        return m * busiest + (p - 1) * (mean / job.chunks + 2 * hop) + 2 * (job.chunks - 1) * p * hop
    rest, period = 0.0, busiest
    for rank in range(p - 1, -1, -1):
        rest += ranks[rank]
        period = max(period, (rest + 2 * (p - 1 - rank) * hop) / min(p - rank, m))
    return (m - 1) * period + sum(ranks) + 2 * (p - 1) * hop


def simulated(job: Job, costs: Sequence[StageCost], hop: float, most: int = 40_000) -> float:
    """The same from events; a long step is run for some micro-batches and continued at their pace.

    Falls back on the closed form for schedules that we do not build.
    """
    p, m = job.pp, job.num_microbatches
    if p == 1:
        return closed_form(job, costs, hop)
    once = 3 * p * p * job.chunks
    rounds = max(3, most // once)
    if m <= rounds * p:
        schedule = built(p, job.chunks, job.schedule, m)
        return closed_form(job, costs, hop) if schedule is None else _makespan(schedule, costs, hop)
    near, far = ((rounds - 1) * p + m % p, rounds * p + m % p)
    schedules = [built(p, job.chunks, job.schedule, n) for n in (near, far)]
    if schedules[0] is None or schedules[1] is None:
        return closed_form(job, costs, hop)
    first, second = (_makespan(s, costs, hop) for s in schedules if s)
    return second + (m - far) / p * (second - first)


@lru_cache(maxsize=64)
def built(pp: int, chunks: int, name: str, num_microbatches: int) -> Schedule | None:
    """The compute of a schedule of ours; None where the name or the numbers are not ours."""
    try:
        parallel = ParallelConfig.model_validate({"pp": pp, "chunks": chunks, "schedule": name})
        return compute_schedule(parallel, num_microbatches)
    except (ValidationError, ScheduleError):
        return None


def _makespan(schedule: Schedule, costs: Sequence[StageCost], hop: float) -> float:
    return max(e.end for e in walk(schedule, lambda a: costs[a.stage].of(a.kind), hop))
