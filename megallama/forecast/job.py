"""One training step as the models of time and memory see it: shapes, layout, and which software runs it.

Jobs come from configurations (`job_of`; every legal layout: `candidates`) and from tables of published layouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from itertools import product
from math import lcm

from pydantic import ValidationError

from megallama.config.rules import V_SCHEDULES, legal_tp
from megallama.config.schema import Config, ParallelConfig
from megallama.forecast.hardware import Hardware
from megallama.plan.builders import FIXED_CHUNKS, compute_schedule, v_owners
from megallama.plan.exchange import exchange
from megallama.plan.params import heads
from megallama.plan.schedule import Schedule, ScheduleError, looped
from megallama.plan.topology import Topology
from megallama.plan.work import Stages, balanced, head_forward, layer_forward, partition

MICRO_BATCHES = (1, 2, 4, 8, 16)
CP_TOKENS = 4096  # fewer of a sequence on a rank are not worth an exchange
RECOMPUTE = ("none", "selective", "full")
_balanced = cache(balanced)


@dataclass(frozen=True)
class Job:
    """Model, layout and batch; `kernel` and `stack` name rows of hardware.toml."""

    layers: int
    hidden: int
    ffn: int
    gated: bool  # SwiGLU: three matrices; else two
    heads: int
    width: int  # elements of all queries of a token
    kv_width: int  # and of all keys
    vocab: int
    seq: int
    gpus: int
    tp: int
    pp: int
    dp: int
    micro_batch: int
    num_microbatches: int
    stages: tuple[int, ...]  # layers of each stage in model order
    cp: int = 1
    chunks: int = 1
    schedule: str = "1f1b"  # 1f1b with chunks > 1 is interleaved
    recompute: str = "none"  # none, selective (the LLaMA way in our stack, attention's core in others), full
    sequence_parallel: bool = False
    sharding: str = "zero1"  # none, zero1, zero2, zero3
    tied: bool = False
    fp8: bool = False
    kernel: str = "flash2"
    stack: str = "megallama"
    network_gbit: float | None = None  # per GPU between nodes; None: as the hardware has
    hide_tp: bool = True  # as far as the stack can
    hide_dp: bool = True
    owners: tuple[int, ...] = ()  # rank of each stage, where a schedule says it
    missing: int = 0  # micro-batches of a step that dp x num_microbatches has too many
    exchange: str = "gather"  # of keys and values over cp: gather or heads
    keep_kv: bool = False  # gathered once, and kept for the backward
    cp_pieces: int = 1  # groups of heads, of which one is exchanged under the attention of another
    stride: int = 0  # ranks from one to the next of a cp group; 0: tp

    @property
    def tokens(self) -> int:  # tokens of one micro-batch on one rank
        return self.micro_batch * self.seq // self.cp

    @property
    def local_heads(self) -> tuple[int, int, int]:  # on a rank; and of those for keys, copies included, by heads
        k = max(1, self.kv_width * self.heads // self.width // self.tp)
        return self.heads // self.tp, k, lcm(k, self.cp)

    @property
    def exchanged(self) -> float:  # elements: keys and values gathered; of each of the two ways by heads
        n, k, copied = self.local_heads
        whole = 2 * k * self.cp if self.exchange == "gather" else n + copied
        return float(self.tokens * whole * self.width // self.heads)

    @property
    def kept_by_context(self) -> float:  # elements of a token, as `plan.memory` counts them
        n, k, copied = self.local_heads
        more = 2 * k * self.cp * self.keep_kv if self.exchange == "gather" else 2 * (copied - k)
        return (self.cp > 1) * (n + more) * self.width / self.heads

    @property
    def step_tokens(self) -> int:  # tokens of one optimizer step
        return (self.dp * self.num_microbatches - self.missing) * self.micro_batch * self.seq

    @property
    def layer_matrix(self) -> int:  # matrix parameters of a layer
        return self.hidden * (2 * self.width + 2 * self.kv_width + (3 if self.gated else 2) * self.ffn)

    @property
    def parameters(self) -> int:  # parameters of the whole model
        embeddings = (2 - self.tied) * self.vocab * self.hidden
        return self.layers * (self.layer_matrix + 2 * self.hidden) + embeddings + self.hidden

    @property
    def llama_way(self) -> bool:  # whether norms and activations, and nothing else, are computed again in the backward
        return self.recompute == "selective" and self.stack == "megallama"

    @cached_property
    def owned(self) -> tuple[tuple[int, ...], ...]:
        """The stages of each pipeline rank."""
        in_v = self.schedule in V_SCHEDULES and self.chunks == 2
        owners = self.owners or (v_owners(self.pp) if in_v else looped(self.pp, self.pp * self.chunks))
        return tuple(tuple(stage for stage, owner in enumerate(owners) if owner == rank) for rank in range(self.pp))

    def parameters_of(self, rank: int) -> float:
        """Matrix parameters of the ranks at one pipeline position."""
        owned = self.owned[rank]
        ends = (0 in owned) + (len(self.stages) - 1 in owned and not (self.tied and self.pp == 1))
        return (sum(self.stages[s] for s in owned) * self.layer_matrix + ends * self.vocab * self.hidden) / self.tp

    @cached_property
    def rank_parameters(self) -> float:  # parameters of the fullest rank
        return max(map(self.parameters_of, range(self.pp)))

    def flops_per_token(self, *, causal: bool) -> float:
        """Model operations of forward and backward per token, as `plan.work` counts them."""
        attention = 2 * self.width * (self.seq + 1) if causal else 4 * self.width * self.seq
        return 3 * (self.layers * (2 * self.layer_matrix + attention) + 2 * self.vocab * self.hidden)


def job_of(config: Config, topology: Topology, kernel: str, stages: Stages | None = None) -> Job:
    """The job that a configuration of ours describes."""
    m, b, p, o = config.model, config.batch, config.parallel, config.overlap
    n, k, d = heads(m)
    split, deal = tuple(map(len, stages or partition(config))), b.deal(b.global_batch_size, topology.dp)
    return Job(
        m.num_layers, m.hidden_size, m.ffn_hidden_size, True, n, n * d, k * d, m.vocab_size, b.seq_length,
        topology.world_size, p.tp, p.pp, topology.dp, b.micro_batch_size, deal[0], split, chunks=len(split) // p.pp,
        schedule=p.schedule, recompute=config.memory.recompute, sequence_parallel=p.sequence_parallel and p.tp > 1,
        tied=m.tie_embeddings, fp8=config.precision.fp8 != "none", kernel=kernel, hide_tp=o.tensor_parallel,
        hide_dp=o.grad_reduce and o.param_gather, missing=len(deal) * deal[0] - sum(deal),
        cp=p.cp, exchange=exchange(config)[0], keep_kv=config.memory.cp_keep_kv,
        cp_pieces=o.context_parallel_heads, stride=topology.strides["cp"],
    )  # fmt: skip


def candidates(config: Config, ranks: int, hardware: Hardware, kernel: str) -> Iterator[Job]:
    """Every legal layout of this model and batch."""
    m, b = config.model, config.batch
    base = job_of(config.model_copy(update={"parallel": ParallelConfig()}), Topology(), kernel)
    s, powers = b.seq_length, (2**i for i in range(9))
    layer = layer_forward(m, s, causal=True)
    cps = [c for c in powers if c == 1 or (s >= c * CP_TOKENS and s % (2 * c) == 0)]
    for tp, cp, pp, micro in product(legal_tp(config.model), cps, range(1, m.num_layers + 1), MICRO_BATCHES):
        dp = ranks // (tp * pp * cp)
        count = b.global_batch_size // max(1, dp * micro)
        if tp > hardware.gpu.gpus_per_node or tp * pp * cp * dp != ranks or dp * micro * count != b.global_batch_size:
            continue
        stride = Topology(tp, pp, dp, cp, config.parallel.rank_order).strides["cp"]
        exchanges = ("gather", "heads")[: 1 + (cp > 1 and m.num_heads // tp % cp == 0)]
        ways = product(placements(pp, m.num_layers, count), RECOMPUTE, (True, False)[tp == 1 :], exchanges)
        for (schedule, chunks), recompute, sp, way in ways:
            if sp and micro * s // cp % tp:
                continue
            repeats = 4 if recompute == "full" else 3
            yield replace(
                base, gpus=ranks, tp=tp, pp=pp, dp=dp, micro_batch=micro, num_microbatches=count, chunks=chunks,
                schedule=schedule, recompute=recompute, sequence_parallel=sp, cp=cp, exchange=way, stride=stride,
                stages=_balanced(m.num_layers, pp * chunks, repeats * layer, 3 * head_forward(m)),
            )  # fmt: skip


def placements(pp: int, layers: int, num_microbatches: int) -> Iterator[tuple[str, int]]:
    """Schedules and chunks that can run this many micro-batches."""
    for chunks in range(1, layers // pp + 1 if pp > 1 else 2):
        if chunks == 1 or num_microbatches % pp == 0:
            yield "1f1b", chunks
    for name, (chunks, _) in FIXED_CHUNKS.items() if pp > 1 else ():
        if pp * chunks <= layers and peaks_in_flight(pp, chunks, name, min(num_microbatches, 3 * pp)):
            yield name, chunks


def config_of(config: Config, job: Job) -> Config:
    """The configuration with a job's layout."""
    layout = {k: getattr(job, k) for k in ("tp", "pp", "cp", "chunks", "schedule")}
    layout |= {"stage_layers": None, "sequence_parallel": job.sequence_parallel or job.tp == 1}
    layout["cp_exchange"] = job.exchange if job.cp > 1 else "auto"
    batch, memory = {"micro_batch_size": job.micro_batch}, {"recompute": job.recompute}
    return config.changed(parallel=layout, batch=batch, memory=memory)


@lru_cache(maxsize=64)
def built(pp: int, chunks: int, name: str, num_microbatches: int) -> Schedule | None:
    """The compute of a schedule of ours; None where the name or the numbers are not ours."""
    try:
        parallel = ParallelConfig.model_validate({"pp": pp, "chunks": chunks, "schedule": name})
        return compute_schedule(parallel, num_microbatches)
    except (ValidationError, ScheduleError):
        return None


@lru_cache(maxsize=1024)
def peaks_in_flight(pp: int, chunks: int, name: str, num_microbatches: int) -> tuple[int, ...]:
    """Micro-batches that each rank holds at once, in chunks; none where name or numbers are not ours."""
    schedule = built(pp, chunks, name, num_microbatches)
    return tuple(map(schedule.peak_in_flight, range(pp))) if schedule else ()
