"""The prediction of a job on a machine: seconds of a step by cause, speed, memory, and what lies outside experience."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log2

from megallama.forecast.capacity import GIB, job_bytes
from megallama.forecast.cost import Pricer, closed_form, simulated
from megallama.forecast.hardware import Machine
from megallama.forecast.job import Job
from megallama.plan.simulate import StageCost

Clock = Callable[[Job, Sequence[StageCost], float], float]


@dataclass(frozen=True)
class Prediction:
    """One step. `causes` are seconds and add up to `step_seconds`; speeds are per GPU and second."""

    step_seconds: float
    causes: dict[str, float]
    tokens_per_second: float
    mfu_full: float
    mfu_causal: float
    hfu: float
    memory_bytes: float
    memory_limit: float
    flags: tuple[str, ...]


def predict(job: Job, machine: Machine, clock: Clock = simulated) -> Prediction:
    """Price one step; `clock` times the pipeline (by events, or `closed_form` where there are many jobs)."""
    causes = seconds_by_cause(job, machine, clock)
    step = sum(causes.values())
    tokens = job.step_tokens / step / job.gpus
    per_flop = tokens / (machine.gpu.peak_tflops * 1e12)
    return Prediction(
        step, causes, tokens, job.flops_per_token(causal=False) * per_flop, job.flops_per_token(causal=True) * per_flop,
        hardware_flops(job, machine) * per_flop, job_bytes(job, machine), machine.gpu.memory_gib * GIB,
        tuple(flags(job, machine)),
    )  # fmt: skip


def seconds_by_cause(job: Job, machine: Machine, clock: Clock = closed_form) -> dict[str, float]:
    """Seconds of a step by cause, of the average rank where ranks differ."""
    price, m, p = Pricer(job, machine), job.num_microbatches, job.pp
    causes, again = {}, 0.0
    for part in price.layer():
        causes[part.name] = m * job.layers / p * (part.forward + part.input_grad + part.weight_grad)
        again += m * job.layers / p * part.again
    causes["head and loss"] = m / p * sum(price.head()[1:4])
    causes["recompute"] = again
    hop, bare = price.hop(), price.stages(blocking=False)
    ranks = [sum(sum(bare[s]) for s in job.owned(r)) for r in range(p)]
    quiet = clock(job, bare, 0.0)
    causes["imbalance"] = m * (max(ranks) - sum(ranks) / p)
    causes["pp bubble"] = quiet - m * max(ranks)
    causes["pp transfers"] = clock(job, price.stages(), hop) - quiet if p > 1 else 0.0
    share = price.stack.dp_overlap * job.hide_dp
    if job.sharding in ("zero3", "zero2"):
        each = price.gathering()
        causes["dp comm"] = m * (each - min(share * each, sum(causes.values()) / m))
    else:
        each = price.data_parallel()
        # while the last micro-batches leave one chunk, the other chunks still compute
        window = ranks[0] / job.chunks * (1 + (job.chunks - 1) * p)
        causes["dp comm"] = each - min(share * each, window)
    causes["optimizer"] = price.optimizer()
    causes["step overhead"] = price.stack.step_ms * 1e-3
    doublings = (p > 1) * log2(max(1.0, job.gpus / machine.gpu.gpus_per_node))
    causes["jitter"] = sum(causes.values()) * price.stack.jitter * doublings
    return causes


def hardware_flops(job: Job, machine: Machine) -> float:
    """Operations per token that the kernels do, repeated ones included."""
    causal, full = machine.kernels[job.kernel].causal, job.recompute == "full"
    forward = 2.0 * job.width * (job.seq + 1) if causal else 4.0 * job.width * job.seq
    again = full or (job.recompute == "selective" and not causal)
    layer = (8 if full else 6) * job.layer_matrix + forward * (1 + again + (2.5 if causal else 2.0))
    return job.layers * layer + 6 * job.vocab * job.hidden


def flags(job: Job, machine: Machine) -> list[str]:
    """What of this job lies outside the measurements that the constants were fitted on."""
    d, size, node = job.dp * job.cp, job.parameters, machine.gpu.gpus_per_node
    known = {
        f"tp={job.tp} leaves a node of {node} GPUs": job.tp > node,
        f"dp={d} is above 256": d > 256,
        f"seq={job.seq} is above 8192 tokens": job.seq > 8192,
        f"{size / 1e9:,.3g}e9 parameters are outside 0.1e9 to 1,100e9": not 1e8 <= size <= 1.1e12,
        f"{job.gpus} GPUs are above 4096": job.gpus > 4096,
        f"heads of {job.head_dim} are no multiple of 8": job.head_dim % 8 > 0,
        "fp8 products have other programs' speed": job.fp8 and job.stack == "megallama",
        f"{job.kernel} needs a Hopper GPU": job.kernel == "flash3" and machine.gpu.peak_tflops < 400,
    }
    return [words for words, outside in known.items() if outside]
