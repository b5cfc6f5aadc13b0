"""What a plan will cost on a machine: time by cause, speed, memory with buffers, the run's length, energy and CO2."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megallama.forecast.capacity import buffer_bytes
from megallama.forecast.cost import Pricer, makespan
from megallama.forecast.hardware import Machine
from megallama.forecast.job import Job, job_of
from megallama.forecast.predict import Prediction, predict
from megallama.plan.plan import Plan
from megallama.plan.simulate import Report, simulate

PUE, CO2_KG_PER_KWH = 1.1, 0.385  # Touvron et al. 2023 (arXiv:2302.13971, section 6): the US average, and its overhead


def footprint(gpu_hours: float, watts: float) -> tuple[float, float]:
    """MWh = GPU-hours x watts x PUE / 1e6, and tonnes of CO2 equivalent = MWh x 0.385 (Touvron et al. 2023)."""
    mwh = gpu_hours * watts * PUE / 1e6
    return mwh, mwh * CO2_KG_PER_KWH


@dataclass(frozen=True)
class Forecast:
    """A plan on a machine."""

    plan: Plan
    machine: Machine
    job: Job
    prediction: Prediction
    pipeline: Report  # the schedule with this machine's times
    buffers: int  # bytes of every rank beside what `plan.memory` counts
    peaks: tuple[int, ...]  # bytes of each pipeline rank, buffers included
    tokens: int  # of the whole run
    gpu_hours: float  # of the whole run, without interruptions
    mwh: float
    tonnes_co2: float
    days: float

    @property
    def fits(self) -> bool:
        """Whether every rank's peak is within the GPU's memory."""
        return max(self.peaks) <= self.prediction.memory_limit


def forecast(plan: Plan, machine: Machine, kernel: str) -> Forecast:
    """Price a plan, the pipeline by the events of its own schedule."""
    config, owners = plan.config, tuple(map(plan.schedule.rank_of, range(plan.num_stages)))
    job = replace(job_of(config, plan.topology, kernel, plan.stages), owners=owners)
    prediction = predict(job, machine, lambda _, costs, hop: makespan(plan.schedule, costs, hop))
    price, buffers = Pricer(job, machine), buffer_bytes(config, machine)
    tokens = plan.batch.samples_after(config.train.steps) * config.batch.seq_length
    gpu_hours = tokens / prediction.tokens_per_second / 3600
    return Forecast(
        plan, machine, job, prediction, simulate(plan.schedule, price.stages(), price.hop()), buffers,
        tuple(plan.memory(rank).total + buffers for rank in range(job.pp)), tokens, gpu_hours,
        *footprint(gpu_hours, machine.gpu.watts), gpu_hours / job.gpus / 24,
    )  # fmt: skip
