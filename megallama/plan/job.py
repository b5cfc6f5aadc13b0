"""One training step as the time and memory models see it: the shapes, the layout, and what the software does.

A `Job` comes from a configuration of ours (`job_of`) or from one row of a table of measurements (`plan.rows`), so
that the constants fitted on published measurements are those that our own plans are priced with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megallama.config.schema import Config
from megallama.plan.params import heads
from megallama.plan.partition import Stages, partition
from megallama.plan.topology import Topology


@dataclass(frozen=True)
class Job:
    """Model, layout and batch. `stack` and `kernel` name rows of hardware.toml."""

    layers: int
    hidden: int
    ffn: int
    gated: bool  # SwiGLU: three matrices; else two
    heads: int
    kv_heads: int
    vocab: int
    seq: int
    gpus: int
    tp: int
    pp: int
    dp: int
    micro_batch: int
    num_microbatches: int
    cp: int = 1
    chunks: int = 1
    schedule: str = "1f1b"  # 1f1b (chunks > 1: interleaved), gpipe, zb-h1, zb-2p, zb-v, ...
    recompute: str = "none"  # none, selective (the LLaMA way with our stack, attention's core in others), full
    sequence_parallel: bool = False
    sharding: str = "zero1"  # none, zero1, zero2, zero3: what dp cuts
    tied: bool = False
    fp8: bool = False
    kernel: str = "flash2"
    stack: str = "megallama"
    network_gbit: float | None = None  # per GPU between nodes; None: the hardware's own
    hide_tp: bool = True  # as far as the stack can
    hide_dp: bool = True
    stage_layers: tuple[int, ...] | None = None  # layers of each stage in model order
    head_dim_: int | None = None

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.head_dim_ or self.hidden // self.heads

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one rank."""
        return self.micro_batch * self.seq // self.cp

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.dp * self.num_microbatches * self.micro_batch * self.seq

    @property
    def kv_width(self) -> int:
        """Width of keys (and of values)."""
        return self.kv_heads * self.head_dim

    @property
    def layer_matrix(self) -> int:
        """Matrix parameters of a layer."""
        attention = 2 * self.hidden * (self.heads * self.head_dim + self.kv_width)
        return attention + (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, norms included."""
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        return self.layers * (self.layer_matrix + 2 * self.hidden) + embeddings + self.hidden

    @cached_property
    def stages(self) -> tuple[int, ...]:
        """Layers of each stage; where nobody said, equal, and what is left over goes to the first stages."""
        n = self.pp * self.chunks
        low, surplus = divmod(self.layers, n)
        return self.stage_layers or tuple(low + (s < surplus) for s in range(n))

    @property
    def llama_way(self) -> bool:
        """Whether norms and activations, and nothing else, are computed again in the backward."""
        return self.recompute == "selective" and self.stack == "megallama"

    @cached_property
    def rank_parameters(self) -> float:
        """Parameters of the fullest rank."""
        return max(self.parameters_of(rank) for rank in range(self.pp))

    def parameters_of(self, pp_rank: int) -> float:
        """Matrix parameters of the ranks at one pipeline position."""
        ends = (pp_rank == 0) + (pp_rank == self.pp - 1 and not (self.tied and self.pp == 1))
        return (sum(self.stages[pp_rank :: self.pp]) * self.layer_matrix + ends * self.vocab * self.hidden) / self.tp

    def flops_per_token(self, *, causal: bool) -> float:
        """Model operations of forward and backward per token (`plan.flops`, for any of the shapes here)."""
        width = self.heads * self.head_dim
        attention = 2 * width * (self.seq + 1) if causal else 4 * width * self.seq
        return 3 * (self.layers * (2 * self.layer_matrix + attention) + 2 * self.vocab * self.hidden)


def job_of(config: Config, topology: Topology, kernel: str, stages: Stages | None = None) -> Job:
    """The job that a configuration of ours describes."""
    m, b, p = config.model, config.batch, config.parallel
    n, k, d = heads(m)
    split = stages or partition(config)
    return Job(
        m.num_layers, m.hidden_size, m.ffn_hidden_size, True, n, k, m.vocab_size, b.seq_length,
        topology.world_size, p.tp, p.pp, topology.dp, b.micro_batch_size,
        b.global_batch_size // (topology.dp * b.micro_batch_size),
        chunks=len(split) // p.pp, schedule=p.schedule, recompute=config.memory.recompute,
        sequence_parallel=p.sequence_parallel and p.tp > 1, tied=m.tie_embeddings, kernel=kernel,
        stage_layers=tuple(map(len, split)), head_dim_=d, hide_tp=config.overlap.tensor_parallel,
        hide_dp=config.overlap.grad_reduce and config.overlap.param_gather,
    )  # fmt: skip
