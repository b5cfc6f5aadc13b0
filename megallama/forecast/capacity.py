"""Bytes of a job's fullest rank in closed form: for searching, and for programs that use memory otherwise than ours.

A configuration of ours has an exact table (`plan.memory`); the constants of other programs were fitted on which
published layouts fit into 80 GB.  Forms: Korthikanti et al. 2022 (arXiv:2205.05198), table 2.
"""

from __future__ import annotations

from functools import lru_cache

from megallama.config.schema import Config
from megallama.forecast.cost import built
from megallama.forecast.hardware import Machine
from megallama.forecast.job import Job
from megallama.plan.memory import DTYPE_BYTES

GIB = 2**30


def job_bytes(job: Job, machine: Machine) -> float:
    """Bytes of the fullest rank of the job: the first, the second or the last."""
    return max(rank_bytes(job, machine, rank) for rank in {0, min(1, job.pp - 1), job.pp - 1})


def rank_bytes(job: Job, machine: Machine, rank: int) -> float:
    """Bytes of the ranks at one pipeline position."""
    stack, held, mine = machine.stacks[job.stack], job.parameters_of(rank), job.owned(rank)
    d = job.dp * job.cp if job.sharding != "none" else 1
    state = held * (stack.state_bytes + stack.shard_bytes / d)
    if job.sharding == "zero3":
        state = held * (stack.state_bytes + stack.shard_bytes) / d + 4.0 * job.layer_matrix
    saved, working = saved_per_layer(job, machine)
    tokens = min(job.tokens, 512) if job.stack == "megallama" else job.tokens
    logits = (len(job.stages) - 1 in mine) * (stack.keep_logits / job.tp + stack.keep_whole) * tokens * job.vocab
    layers = sum(job.stages[s] for s in mine) / job.chunks
    return state + saved * layers * in_flight(job, rank) + working + logits + stack.reserve_gb * 1e9


def saved_per_layer(job: Job, machine: Machine) -> tuple[float, float]:
    """Bytes that a layer keeps of a micro-batch, and those that one layer needs while it is computed again."""
    stack, t, cut = machine.stacks[job.stack], job.tp, job.tp if job.sequence_parallel else 1
    wide, ffn = (stack.keep_wide / 2, stack.keep_ffn * 2 / 3) if job.llama_way else (stack.keep_wide, stack.keep_ffn)
    whole = wide * job.hidden / cut + (stack.keep_heads * (job.width + job.kv_width) + ffn * job.ffn) / t
    causal = machine.kernels[job.kernel].causal
    if not causal and job.recompute != "selective":
        whole += 5.0 * job.heads * job.seq / t
    if job.recompute == "full":
        return 2.0 * job.hidden * job.tokens / cut, whole * job.tokens
    by_operator = job.recompute == "selective" and causal and not job.llama_way  # about every second one
    return whole * job.tokens * (0.5 if by_operator else 1.0), 0.0


def in_flight(job: Job, rank: int) -> int:
    """Micro-batches held at once, in chunks."""
    m = job.num_microbatches if job.schedule == "gpipe" else min(job.num_microbatches, 3 * job.pp)
    return _peaks(job.pp, job.chunks, {"zb-1p": "zb-h1", "zb-2p": "zb-h2"}.get(job.schedule, job.schedule), m)[rank]


@lru_cache(maxsize=1024)
def _peaks(pp: int, chunks: int, name: str, m: int) -> tuple[int, ...]:
    schedule = built(pp, chunks, name, m)
    return tuple(map(schedule.peak_in_flight, range(pp))) if schedule else (min(m, 2 * pp - 1) * chunks,) * pp


def buffer_bytes(config: Config, machine: Machine) -> int:
    """What our program holds for a moment beside `plan.memory`, and the context."""
    m, p, b = config.model, config.parallel, config.batch
    tokens, size = b.micro_batch_size * b.seq_length, DTYPE_BYTES[config.precision.dtype]
    activation = tokens * m.hidden_size * size
    gathered = (p.tp > 1) * 2 * activation  # of a tensor-parallel layer: its input and its gradient
    moving = (p.pp > 1) * 4 * activation // (p.tp if p.sequence_parallel else 1)
    working = 6 * tokens * m.ffn_hidden_size // p.tp * size
    buckets = 2 * int(config.overlap.bucket_mb * 2**20)
    return gathered + moving + working + buckets + int(machine.stacks["megallama"].reserve_gb * 1e9)
