"""What a job costs on a machine (seconds by cause, speed, bytes), and a plan (its run, energy, CO2); and the best plan.

Bytes of a job are a closed form, for searching and for programs that use memory otherwise than ours; its constants were
fitted on which published layouts fit into 80 GB (Korthikanti et al. 2022, arXiv:2205.05198, table 2).  A plan of ours
has an exact table (`plan.memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from math import log2

from megallama.config.errors import ConfigError
from megallama.config.rules import check
from megallama.config.schema import Config
from megallama.forecast.cost import Pricer, closed_form, simulated
from megallama.forecast.hardware import Hardware
from megallama.forecast.job import Job, candidates, config_of, job_of, peaks_in_flight
from megallama.plan.exchange import local_heads
from megallama.plan.memory import DTYPE_BYTES, tokens_and_rows
from megallama.plan.params import heads
from megallama.plan.plan import Plan, make_plan, table
from megallama.plan.timeline import Report, StageCost, simulate

GIB = 2**30
PUE, CO2_KG_PER_KWH = 1.1, 0.385  # Touvron et al. 2023 (arXiv:2302.13971, section 6): the US average, and its overhead
Clock = Callable[[Job, Sequence[StageCost], float], float]


@dataclass(frozen=True)
class Prediction:
    """One step. `causes` [s] add up to `step_seconds`; speeds are per GPU and second."""

    step_seconds: float
    causes: dict[str, float]
    tokens_per_second: float
    mfu_full: float
    mfu_causal: float
    hfu: float
    memory_limit: float
    flags: tuple[str, ...]


def predict(job: Job, hardware: Hardware, clock: Clock = simulated) -> Prediction:
    """Price one step; `clock` times the pipeline (by events, or `closed_form` where there are many jobs)."""
    causes = seconds_by_cause(job, hardware, clock)
    step = sum(causes.values())
    tokens = job.step_tokens / step / job.gpus
    per_flop = tokens / (hardware.gpu.peak_tflops * 1e12)
    return Prediction(
        step, causes, tokens, job.flops_per_token(causal=False) * per_flop, job.flops_per_token(causal=True) * per_flop,
        hardware_flops(job, hardware) * per_flop, hardware.gpu.memory_gib * GIB, tuple(flags(job, hardware)),
    )  # fmt: skip


def seconds_by_cause(job: Job, hardware: Hardware, clock: Clock = closed_form) -> dict[str, float]:
    """Seconds of a step by cause, of the average rank where ranks differ."""
    price, m, p = Pricer(job, hardware), job.num_microbatches, job.pp
    items, each = price.layer(), m * job.layers / p
    causes = {item.name: each * (item.forward + item.input_grad + item.weight_grad) for item in items}
    causes["head and loss"] = m / p * sum(price.head()[1:4])
    causes["recompute"] = sum(each * item.again for item in items)
    if idle := job.missing / (job.dp * m):  # the average replica waits for those with most micro-batches
        parts, causes = causes, {name: (1 - idle) * seconds for name, seconds in causes.items()}
        causes["uneven batch"] = idle * sum(parts.values())
    hop, bare = price.hop(), price.stages(blocking=False)
    ranks = [sum(sum(bare[s]) for s in job.owned[r]) for r in range(p)]
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
    causes |= {"optimizer": price.optimizer(), "step overhead": price.stack.step_ms * 1e-3}
    doublings = (p > 1) * log2(max(1.0, job.gpus / hardware.gpu.gpus_per_node))
    causes["jitter"] = sum(causes.values()) * price.stack.jitter * doublings
    return causes


def hardware_flops(job: Job, hardware: Hardware) -> float:
    """Operations per token that the kernels do, repeated ones included."""
    causal, full = hardware.kernels[job.kernel].causal, job.recompute == "full"
    forward = 2.0 * job.width * (job.seq + 1) if causal else 4.0 * job.width * job.seq
    again = full or (job.recompute == "selective" and not causal)
    layer = (8 if full else 6) * job.layer_matrix + forward * (1 + again + (2.5 if causal else 2.0))
    return job.layers * layer + 6 * job.vocab * job.hidden


def flags(job: Job, hardware: Hardware) -> list[str]:
    """What of this job lies outside the measurements that the constants were fitted on."""
    d, size, node, head = job.dp * job.cp, job.parameters, hardware.gpu.gpus_per_node, job.width // job.heads
    known = {
        f"tp={job.tp} leaves a node of {node} GPUs": job.tp > node,
        f"dp={d} is above 256": d > 256,
        f"seq={job.seq} is above 8192 tokens": job.seq > 8192,
        f"{size / 1e9:,.3g}e9 parameters are outside 0.1e9 to 1,100e9": not 1e8 <= size <= 1.1e12,
        f"{job.gpus} GPUs are above 4096": job.gpus > 4096,
        f"heads of {head} are no multiple of 8": head % 8 > 0,
        "fp8 products have other programs' speed": job.fp8 and job.stack == "megallama",
        f"{job.kernel} needs a Hopper GPU": job.kernel == "flash3" and hardware.gpu.peak_tflops < 400,
    }
    return [words for words, outside in known.items() if outside]


def job_bytes(job: Job, hardware: Hardware) -> float:
    """Bytes of the fullest rank of the job: the first, the second or the last."""
    return max(rank_bytes(job, hardware, rank) for rank in {0, min(1, job.pp - 1), job.pp - 1})


def rank_bytes(job: Job, hardware: Hardware, rank: int) -> float:
    """Bytes of the ranks at one pipeline position."""
    stack, held, owned = hardware.stacks[job.stack], job.parameters_of(rank), job.owned[rank]
    d = job.dp * job.cp if job.sharding != "none" else 1
    state = held * (stack.state_bytes + stack.shard_bytes / d)
    if job.sharding == "zero3":
        state = held * (stack.state_bytes + stack.shard_bytes) / d + 4.0 * job.layer_matrix
    saved, working = saved_per_layer(job, hardware)
    tokens = min(job.tokens, 512) if job.stack == "megallama" else job.tokens
    logits = (len(job.stages) - 1 in owned) * (stack.keep_logits / job.tp + stack.keep_whole) * tokens * job.vocab
    layers = sum(job.stages[s] for s in owned) / job.chunks
    return state + saved * layers * in_flight(job, rank) + working + logits + stack.reserve_gb * 1e9


def saved_per_layer(job: Job, hardware: Hardware) -> tuple[float, float]:
    """Bytes that a layer keeps of a micro-batch, and needs while it is computed again."""
    stack, t, cut = hardware.stacks[job.stack], job.tp, job.tp if job.sequence_parallel else 1
    residual, ffn = stack.keep_residual, stack.keep_ffn
    if job.llama_way:
        residual, ffn = residual / 2, ffn * 2 / 3
    whole = residual * job.hidden / cut + (stack.keep_heads * (job.width + job.kv_width) + ffn * job.ffn) / t
    whole += (job.stack == "megallama") * 2.0 * job.kept_by_context
    causal = hardware.kernels[job.kernel].causal
    if not causal and job.recompute != "selective":
        whole += 5.0 * job.heads * job.seq / t
    if job.recompute == "full":
        return 2.0 * job.hidden * job.tokens / cut, whole * job.tokens
    by_operator = job.recompute == "selective" and causal and not job.llama_way  # about every second one
    return whole * job.tokens * (0.5 if by_operator else 1.0), 0.0


def in_flight(job: Job, rank: int) -> int:
    """Micro-batches held at once, in chunks."""
    m = job.num_microbatches if job.schedule == "gpipe" else min(job.num_microbatches, 3 * job.pp)
    name = {"zb-1p": "zb-h1", "zb-2p": "zb-h2"}.get(job.schedule, job.schedule)
    peaks = peaks_in_flight(job.pp, job.chunks, name, m)
    return peaks[rank] if peaks else min(m, 2 * job.pp - 1) * job.chunks


def buffer_bytes(config: Config, hardware: Hardware) -> int:
    """What our program holds for a moment on top of `plan.memory`, and the context."""
    m, p, b = config.model, config.parallel, config.batch
    tokens, size = tokens_and_rows(config)[0], DTYPE_BYTES[config.precision.dtype]
    activation = tokens * m.hidden_size * size
    whole = 2 * b.micro_batch_size * b.seq_length * local_heads(config)[1] * heads(m)[2] * size  # keys and values
    exchanged = (p.cp > 1) * 4 * whole  # they, their gradients, and these on their way
    gathered = (p.tp > 1) * 2 * activation  # of a tensor-parallel layer: its input and its gradient
    moving = (p.pp > 1) * 4 * activation // (p.tp if p.sequence_parallel else 1)
    working = 6 * tokens * m.ffn_hidden_size // p.tp * size
    buckets = 2 * int(config.overlap.bucket_mb * 2**20)
    return exchanged + gathered + moving + working + buckets + int(hardware.stacks["megallama"].reserve_gb * 1e9)


def footprint(gpu_hours: float, watts: float) -> tuple[float, float]:
    """MWh = GPU-hours x watts x PUE / 1e6, and tonnes of CO2 equivalent = MWh x 0.385 (Touvron et al. 2023)."""
    return (mwh := gpu_hours * watts * PUE / 1e6), mwh * CO2_KG_PER_KWH


@dataclass(frozen=True)
class Forecast:
    """A plan on one kind of hardware."""

    plan: Plan
    hardware: Hardware
    job: Job
    prediction: Prediction
    pipeline: Report  # the schedule with this hardware's times
    buffers: int  # bytes of every rank on top of what `plan.memory` counts
    peaks: tuple[int, ...]  # bytes of each pipeline rank, buffers included
    fits: bool  # all of them
    tokens: int  # of the whole run
    gpu_hours: float  # of the whole run, without interruptions
    mwh: float
    tonnes_co2: float
    days: float


def forecast(plan: Plan, hardware: Hardware, kernel: str, tokens: int = 0) -> Forecast:
    """Price a plan, the pipeline by its schedule's events; `tokens`: default those ahead."""
    job = replace(job_of(plan.config, plan.topology, kernel, plan.stages), owners=plan.schedule.owners)
    prediction = predict(job, hardware, lambda _, costs, hop: simulate(plan.schedule, costs, hop).makespan)
    price, buffers = Pricer(job, hardware), buffer_bytes(plan.config, hardware)
    peaks = tuple(plan.memory(rank).total + buffers for rank in range(job.pp))
    tokens = tokens or plan.tokens
    gpu_hours = tokens / prediction.tokens_per_second / 3600
    return Forecast(
        plan, hardware, job, prediction, simulate(plan.schedule, price.stages(), price.hop()), buffers,
        peaks, max(peaks) <= prediction.memory_limit, tokens, gpu_hours,
        *footprint(gpu_hours, hardware.gpu.watts), gpu_hours / job.gpus / 24,
    )  # fmt: skip


def by_phase(plan: Plan, hardware: Hardware, kernel: str) -> list[Forecast]:
    """Of each phase ahead, with its own tokens; of a run without phases the one of the plan."""
    train, (step, _, read) = plan.config.train, plan.behind
    made = [b - a for a, b in pairwise([step, *train.phase_ends(step, read)])][-len(plan.phases(read)) :]
    tokens = [steps * phase.step_tokens for steps, phase in zip(made, train.phases[-len(made) :], strict=True)]
    plans = [replace(own, behind=plan.behind) for own in plan.phases(read)]
    return [forecast(own, hardware, kernel, n) for own, n in zip(plans, tokens or [0], strict=True)]


def phases(found: Sequence[Forecast]) -> str:
    """What differs between them, a line each, and their days; below: the one with most memory."""
    rows = [["until token", "samples", "of tokens", "rope_theta", "peak GiB", "s/step", "tokens/s per GPU", "days"]]
    for phase, f in zip(found[0].plan.config.train.phases[-len(found) :], found, strict=True):
        p, said = f.prediction, [f"{phase.until_tokens:,}", str(phase.global_batch_size), f"{phase.seq_length:,}"]
        said += [f"{phase.rope_theta:g}", f"{max(f.peaks) / GIB:.2f}", f"{p.step_seconds:.3g}"]
        rows.append([*said, f"{p.tokens_per_second:,.0f}", f"{f.days:,.3g}"])
    days = f"{sum(f.days for f in found):,.3g} days in all; what follows is of the phase that takes most memory"
    return f"{table(rows[0], rows[1:])}\n{days}"


def search(config: Config, ranks: int, hardware: Hardware, kernel: str) -> tuple[list[Forecast], int, int]:
    """The ten fastest layouts; how many are legal, how many too large. Raises: ConfigError if none fits."""
    every = list(candidates(config, ranks, hardware, kernel))
    small = [job for job in every if job_bytes(job, hardware) <= hardware.gpu.memory_gib * GIB]
    priced = sorted(small, key=lambda job: sum(seconds_by_cause(job, hardware).values()))[:30]
    configs = (config_of(config, job) for job in sorted(priced, key=lambda job: predict(job, hardware).step_seconds))
    plans = (make_plan(own, ranks) for own in configs if not check(own, ranks, need_data=False))
    found = list(islice((f for f in (forecast(p, hardware, kernel) for p in plans) if f.fits), 10))
    if not found:
        words = f"none of {len(every):,} legal layouts of {ranks} ranks fits into {hardware.gpu.memory_gib:.0f} GiB"
        raise ConfigError(f"{words}; use other ranks, or another batch.global_batch_size")
    return sorted(found, key=lambda f: f.prediction.step_seconds), len(every), len(every) - len(small)
