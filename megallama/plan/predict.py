"""The prediction of a job on a machine: seconds of a step by cause, speed, memory, and what lies outside experience."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megallama.plan.capacity import GIB, Bytes, job_bytes
from megallama.plan.cost import Pricer
from megallama.plan.hardware import Machine
from megallama.plan.job import Job
from megallama.plan.pipeline_time import closed_form, simulated

Clock = Callable[[Job, tuple, float], float]


@dataclass(frozen=True)
class Prediction:
    """One step. `seconds_by_cause` adds up to `step_seconds`."""

    step_seconds: float
    seconds_by_cause: dict[str, float]
    bubble: float  # idle share of the pipeline's time, imbalance included
    tokens_per_second: float  # per GPU
    mfu_full: float
    mfu_causal: float
    hfu: float
    memory: Bytes
    memory_limit: float
    flags: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's bytes are within the GPU's memory."""
        return self.memory.total <= self.memory_limit


def predict(job: Job, machine: Machine, clock: Clock = simulated) -> Prediction:
    """Price one step; `clock` times the pipeline (events by default, `closed_form` where there are many)."""
    price = Pricer(job, machine)
    causes = _causes(job, price, clock)
    step = sum(causes.values())
    tokens = job.step_tokens / step / job.gpus
    peak = price.peak
    idle = causes["pipeline bubble"] + causes["imbalance"]
    busy = step - sum(causes[k] for k in ("dp comm", "optimizer", "step overhead", "jitter"))
    return Prediction(
        step, causes, idle / busy, tokens,
        tokens * job.flops_per_token(causal=False) / peak, tokens * job.flops_per_token(causal=True) / peak,
        tokens * hardware_flops(job, machine) / peak,
        job_bytes(job, machine), machine.gpu.memory_gib * GIB, tuple(flags(job, machine)),
    )  # fmt: skip


def _causes(job: Job, price: Pricer, clock: Clock) -> dict[str, float]:
    """Seconds of a step by cause, of the average rank where ranks differ."""
    m, p, n = job.num_microbatches, job.pp, len(job.stages)
    causes = {}
    again = 0.0
    for part in price.layer():
        causes[part.name] = m * job.layers / p * (part.forward + part.input_grad + part.weight_grad)
        again += m * job.layers / p * part.again
    head = price.head()
    causes["head and loss"] = m / p * (head.forward + head.input_grad + head.weight_grad)
    causes["recompute"] = again
    hop, bare, waiting = price.hop(), price.stages(blocking=False), price.stages()
    ranks = [sum(map(sum, bare[r::p])) for r in range(p)]
    causes["imbalance"] = m * (max(ranks) - sum(ranks) / p)
    quiet = clock(job, bare, 0.0)
    causes["pipeline bubble"] = quiet - m * max(ranks)
    causes["pp transfers"] = clock(job, waiting, hop) - quiet if p > 1 else 0.0
    if job.sharding in ("zero3", "zero2"):
        each, room = price.gathering(), (sum(causes.values()) / m)
        hidden = min(price.stack.dp_overlap * each, room)
        causes["dp comm"] = m * (each - hidden)
    else:
        each = price.data_parallel()
        chunks = n // p  # of the last micro-batches, all chunks but one follow while a chunk's buckets are on their way
        window = sum(map(sum, bare[::p])) / chunks * (1 + (chunks - 1) * p)
        causes["dp comm"] = each - min(price.stack.dp_overlap * job.hide_dp * each, window)
    causes["optimizer"] = price.optimizer()
    causes["step overhead"] = price.stack.step_ms * 1e-3
    causes["jitter"] = sum(causes.values()) * price.jitter()
    return causes


def step_seconds(job: Job, machine: Machine) -> float:
    """Only the step time, in closed form."""
    return sum(_causes(job, Pricer(job, machine), closed_form).values())


def hardware_flops(job: Job, machine: Machine) -> float:
    """Operations per token that the kernels do, repeated ones included."""
    kernel = machine.kernels[job.kernel]
    width = job.heads * job.head_dim
    forward = 2.0 * width * (job.seq + 1) if kernel.causal else 4.0 * width * job.seq
    backward = 2.5 if kernel.causal else 2.0
    layer = 6 * job.layer_matrix + forward * (1 + backward)
    if job.recompute == "full":
        layer += 2 * job.layer_matrix + forward
    elif job.recompute == "selective" and not kernel.causal:
        layer += forward
    return job.layers * layer + 6 * job.vocab * job.hidden


def flags(job: Job, machine: Machine) -> list[str]:
    """What of this job lies outside the measurements that the constants were fitted on."""
    out = []
    if job.tp > machine.gpu.gpus_per_node:
        out.append(f"tp={job.tp} leaves a node of {machine.gpu.gpus_per_node}: no measurement has that")
    if job.dp * job.cp > 256:
        out.append(f"dp={job.dp * job.cp} is above 256")
    if job.seq > 8192:
        out.append(f"sequences of {job.seq} are above 8192 tokens")
    if job.parameters > 1.1e12:
        out.append(f"{job.parameters / 1e9:,.0f}e9 parameters are above 1.0e12")
    if job.gpus > 4096:
        out.append(f"{job.gpus} GPUs are above 4096")
    if job.layer_matrix * job.layers < 1e8:
        out.append("the model is below 0.1e9 parameters: launch overheads rule there")
    if job.head_dim % 8:
        out.append(f"heads of {job.head_dim} are no multiple of 8: kernels for those are slow")
    if job.kernel == "flash3" and machine.gpu.peak_tflops < 400:
        out.append("flash3 needs a Hopper GPU")
    return out
