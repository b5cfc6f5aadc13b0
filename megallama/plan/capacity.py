"""Bytes of a job's fullest rank in closed form: for searching, and for programs whose layout of memory is not ours.

A configuration of ours has an exact table (`plan.memory`); this is a model with constants per program, fitted on
which published layouts fit into 80 GB.  Forms: Korthikanti et al. 2022 (arXiv:2205.05198), table 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from megallama.config.schema import Config
from megallama.plan.hardware import Machine
from megallama.plan.job import Job
from megallama.plan.memory import DTYPE_BYTES

GIB = 2**30


@dataclass(frozen=True)
class Bytes:
    """Bytes of one rank by category."""

    state: float  # weights, gradients, optimizer shard
    activations: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.state + self.activations + self.logits + self.buffers


def job_bytes(job: Job, machine: Machine) -> Bytes:
    """The fullest rank of the job."""
    return max((rank_bytes(job, machine, rank) for rank in sorted({0, job.pp // 2 and 1, job.pp - 1})), key=lambda b: b.total)


def rank_bytes(job: Job, machine: Machine, rank: int) -> Bytes:
    """The ranks at one pipeline position."""
    stack = machine.stacks[job.stack]
    held = job.parameters_of(rank)
    d = job.dp * job.cp if job.sharding != "none" else 1
    state = held * (stack.state_bytes + stack.shard_bytes / d)
    if job.sharding == "zero3":
        state = held * (stack.state_bytes + stack.shard_bytes) / d + 4.0 * job.layer_matrix
    saved, working = saved_per_layer(job, machine)
    layers = sum(job.stages[rank :: job.pp])
    last = rank == job.pp - 1
    logits = (stack.keep_logits / job.tp + stack.keep_whole) * job.tokens * job.vocab * last
    tokens = min(job.tokens, 512) if job.stack == "megallama" else job.tokens
    logits *= tokens / job.tokens
    activations = saved * layers * in_flight(job, rank) / job.chunks + working
    return Bytes(state, activations, logits, stack.reserve_gb * 1e9)


def saved_per_layer(job: Job, machine: Machine) -> tuple[float, float]:
    """Bytes that a layer keeps of a micro-batch, and those that one layer needs while it is computed again."""
    stack, t = machine.stacks[job.stack], job.tp
    width = job.heads * job.head_dim
    cut = t if job.sequence_parallel else 1
    wide, ffn = stack.keep_wide, stack.keep_ffn
    if job.llama_way:
        wide, ffn = wide / 2, ffn * 2 / 3
    whole = wide * job.hidden / cut + (stack.keep_heads * (width + job.kv_width) + ffn * job.ffn) / t
    if not machine.kernels[job.kernel].causal and job.recompute != "selective":
        whole += 5.0 * job.heads * job.seq / t
    if job.recompute == "full":
        return 2.0 * job.hidden * job.tokens / cut, whole * job.tokens
    if job.recompute == "selective" and not job.llama_way and machine.kernels[job.kernel].causal:
        whole /= 2  # by operators: about every second one
    return whole * job.tokens, 0.0


def in_flight(job: Job, rank: int) -> float:
    """Micro-batches of whole chunks held at once, in units of a chunk (interleaving: Narayanan et al. 2021)."""
    p, m, v = job.pp, job.num_microbatches, job.chunks
    if job.schedule == "gpipe":
        return float(m * v)
    if job.schedule in ("zb-h2", "zb-2p"):
        return float(min(m, 2 * p - 1))
    if job.schedule.startswith(("zb-v", "dualpipe")):
        return float(min(m * v, 2 * p))
    if v == 1:
        return float(min(m, p - rank))
    return float(min(m * v, 2 * (p - rank - 1) + (v - 1) * p + 1))


def buffer_bytes(config: Config, machine: Machine) -> int:
    """What our program holds for a moment beside `plan.memory`: communication and work buffers, and the context.

    Gathered inputs of a tensor-parallel layer (twice: forward and gradient), four activations under way between
    stages, two gradient buckets in fp32, and one layer's gate, up and product with their gradients.
    """
    m, p, b = config.model, config.parallel, config.batch
    tokens, size = b.micro_batch_size * b.seq_length, DTYPE_BYTES[config.precision.dtype]
    activation = tokens * m.hidden_size * size
    cut = p.tp if p.sequence_parallel else 1
    gathered = 2 * activation if p.tp > 1 else 0
    moving = 4 * activation // cut if p.pp > 1 else 0
    working = 6 * tokens * m.ffn_hidden_size // p.tp * size
    buckets = 2 * int(config.overlap.bucket_mb * 2**20)
    return gathered + moving + working + buckets + int(machine.stacks["megallama"].reserve_gb * 1e9)
