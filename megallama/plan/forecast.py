"""What a plan will cost: step time by cause, speed, the run's length, energy, and memory with buffers, as text or data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megallama.config.load import flatten
from megallama.plan.capacity import GIB, buffer_bytes
from megallama.plan.energy import CO2_KG_PER_KWH, PUE, Footprint, footprint
from megallama.plan.hardware import Machine
from megallama.plan.job import Job, job_of
from megallama.plan.plan import Plan
from megallama.plan.predict import Prediction, predict
from megallama.plan.simulate import Report, StageCost, simulate


@dataclass(frozen=True)
class Forecast:
    """A plan on a machine."""

    plan: Plan
    machine: Machine
    job: Job
    prediction: Prediction
    peak_bytes: tuple[int, ...]  # per pipeline rank, buffers included
    pipeline: Report  # the schedule with this machine's times

    @property
    def fits(self) -> bool:
        """Whether every rank's peak is within the GPU's memory."""
        return max(self.peak_bytes) <= self.prediction.memory_limit

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        c = self.plan.config
        return self.plan.batch.samples_after(c.train.steps) * c.batch.seq_length

    @property
    def footprint(self) -> Footprint:
        """GPU-hours, energy and CO2 of the whole run."""
        hours = self.tokens / self.prediction.tokens_per_second / 3600
        return footprint(hours, self.machine.gpu.watts)

    @property
    def days(self) -> float:
        """Days of the whole run without interruptions."""
        return self.footprint.gpu_hours / self.job.gpus / 24


def forecast(plan: Plan, machine: Machine, kernel: str) -> Forecast:
    """Price a plan: the pipeline by events, memory by `plan.memory` plus buffers."""
    from megallama.plan.cost import Pricer

    job = job_of(plan.config, plan.topology, kernel, plan.stages)
    price = Pricer(job, machine)
    costs: tuple[StageCost, ...] = price.stages()
    buffers = buffer_bytes(plan.config, machine)
    peaks = tuple(plan.memory(rank).total + buffers for rank in range(plan.schedule.num_ranks))
    return Forecast(
        plan, machine, job, predict(job, machine), peaks, simulate(plan.schedule, costs, price.hop())
    )


def text(f: Forecast) -> str:
    """The forecast as lines below the plan's page."""
    p, gpu, foot = f.prediction, f.machine.gpu, f.footprint
    worst = max(range(len(f.peak_bytes)), key=f.peak_bytes.__getitem__)
    m, buffers = f.plan.memory(worst), f.peak_bytes[worst] - f.plan.memory(worst).total
    parts = {
        "weights": m.weights, "main gradients": m.main_grads, "optimizer shard": m.optimizer,
        "activations": m.activations, "logits": m.logits, "buffers": buffers,
    }  # fmt: skip
    room = p.memory_limit / GIB
    verdict = "fits" if f.fits else f"DOES NOT FIT: {f.peak_bytes[worst] / GIB - room:.1f} GiB too much"
    lines = [
        ("memory", f"peak {f.peak_bytes[worst] / GIB:.1f} GiB on pipeline rank {worst} of {room:.1f} GiB: {verdict}"),
        ("", ", ".join(f"{k} {v / GIB:.2f}" for k, v in parts.items()) + " GiB"),
        ("machine", f"{f.machine.name}, attention kernel {f.job.kernel}: predicted, not measured"),
        ("step", f"{p.step_seconds:.3f} s, {p.tokens_per_second:,.0f} tokens/s per GPU, "
                 f"{p.tokens_per_second * f.job.gpus:,.0f} in all"),
        ("", f"MFU {p.mfu_full:.1%} (full attention), {p.mfu_causal:.1%} (causal); HFU {p.hfu:.1%}"),
        ("pipeline", f"ranks idle {f.pipeline.bubble:.1%} of its {f.pipeline.makespan:.3f} s with these times"),
        ("run", f"{f.days:,.1f} days, {foot.gpu_hours:,.0f} GPU-hours for {f.tokens:,} tokens"),
        ("energy", f"{foot.mwh:,.0f} MWh, {foot.tonnes_co2:,.0f} t CO2 ({gpu.watts:.0f} W per GPU, "
                   f"PUE {PUE}, {CO2_KG_PER_KWH} kg/kWh)"),
        *(("outside", f"the calibrated range: {flag}") for flag in p.flags),
    ]  # fmt: skip
    rows = "\n".join(f"{name:<10} {words}" for name, words in lines)
    return rows + "\n\n" + causes_table(p)


def causes_table(p: Prediction) -> str:
    """Where the step goes, largest first."""
    order = sorted(p.seconds_by_cause.items(), key=lambda kv: -kv[1])
    return "\n".join(f"{k:>16}  {v:8.3f} s  {v / p.step_seconds:6.1%}" for k, v in order if v > 0)


def as_dict(f: Forecast) -> dict[str, Any]:
    """The whole plan for programs: only numbers, texts, lists and tables."""
    plan, p = f.plan, f.prediction
    ranks = range(plan.schedule.num_ranks)
    memory = [{**asdict(plan.memory(r)), "peak": f.peak_bytes[r]} for r in ranks]
    return {
        "config": flatten(plan.config) and plan.config.model_dump(mode="json"),
        "ranks": plan.topology.world_size,
        "topology": {a: plan.topology.size(a) for a in ("tp", "pp", "dp")},
        "stages": [{"rank": plan.schedule.rank_of(s), "layers": list(layers)} for s, layers in enumerate(plan.stages)],
        "schedule": {
            "name": plan.schedule.name, "micro_batches": plan.schedule.num_microbatches,
            "bubble": f.pipeline.bubble, "peak_in_flight": list(f.pipeline.peak_in_flight),
        },
        "memory_bytes": memory, "memory_limit_bytes": p.memory_limit, "fits": f.fits,
        "hardware": f.machine.name, "kernel": f.job.kernel,
        "step_seconds": p.step_seconds, "seconds_by_cause": p.seconds_by_cause,
        "tokens_per_second_per_gpu": p.tokens_per_second,
        "mfu_full": p.mfu_full, "mfu_causal": p.mfu_causal, "hfu": p.hfu,
        "tokens": f.tokens, "days": f.days, **asdict(f.footprint), "flags": list(p.flags),
    }  # fmt: skip
