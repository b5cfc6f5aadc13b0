"""One training step as the models of time and memory see it: shapes, layout, and which software runs it.

Jobs come from configurations (`job_of`) and from tables (benchmarks/planner_rows.py): the same constants price both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megallama.config.schema import Config
from megallama.plan.params import heads
from megallama.plan.partition import Stages, partition
from megallama.plan.schedule import looped
from megallama.plan.schedule_v import v_owners
from megallama.plan.topology import Topology

V_SHAPED = ("zb-v", "v-half", "dualpipe-v")  # with two chunks, as `v_owners` places them


@dataclass(frozen=True)
class Job:
    """Model, layout and batch; `kernel` and `stack` name rows of hardware.toml."""

    layers: int
    hidden: int
    ffn: int
    gated: bool  # SwiGLU: three matrices; else two
    heads: int
    kv_heads: int
    head_dim: int
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
    stage_layers: tuple[int, ...] | None = None  # layers of each stage in model order
    owners: tuple[int, ...] = ()  # rank of each stage, where a schedule says it

    @property
    def width(self) -> int:  # elements of all queries of a token (`kv_width`: of all keys)
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def tokens(self) -> int:  # tokens of one micro-batch on one rank
        return self.micro_batch * self.seq // self.cp

    @property
    def step_tokens(self) -> int:  # tokens of one optimizer step
        return self.dp * self.num_microbatches * self.micro_batch * self.seq

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
    def stages(self) -> tuple[int, ...]:
        """Layers of each stage; where nobody said, equal, and what is left over goes to the first stages."""
        low, surplus = divmod(self.layers, self.pp * self.chunks)
        return self.stage_layers or tuple(low + (s < surplus) for s in range(self.pp * self.chunks))

    def owned(self, rank: int) -> tuple[int, ...]:
        """The stages of a pipeline rank."""
        in_v = self.schedule in V_SHAPED and self.chunks == 2
        owners = self.owners or (v_owners(self.pp) if in_v else looped(self.pp, self.pp * self.chunks))
        return tuple(stage for stage, owner in enumerate(owners) if owner == rank)

    def parameters_of(self, rank: int) -> float:
        """Matrix parameters of the ranks at one pipeline position."""
        mine = self.owned(rank)
        ends = (0 in mine) + (len(self.stages) - 1 in mine and not (self.tied and self.pp == 1))
        return (sum(self.stages[s] for s in mine) * self.layer_matrix + ends * self.vocab * self.hidden) / self.tp

    @cached_property
    def rank_parameters(self) -> float:  # parameters of the fullest rank
        return max(map(self.parameters_of, range(self.pp)))

    def flops_per_token(self, *, causal: bool) -> float:
        """Model operations of forward and backward per token, as `plan.flops` counts them."""
        attention = 2 * self.width * (self.seq + 1) if causal else 4 * self.width * self.seq
        return 3 * (self.layers * (2 * self.layer_matrix + attention) + 2 * self.vocab * self.hidden)


def job_of(config: Config, topology: Topology, kernel: str, stages: Stages | None = None) -> Job:
    """The job that a configuration of ours describes."""
    m, b, p, o = config.model, config.batch, config.parallel, config.overlap
    n, k, d = heads(m)
    split = tuple(map(len, stages or partition(config)))
    return Job(
        m.num_layers, m.hidden_size, m.ffn_hidden_size, True, n, k, d, m.vocab_size, b.seq_length,
        topology.world_size, p.tp, p.pp, topology.dp, b.micro_batch_size,
        b.global_batch_size // (topology.dp * b.micro_batch_size), chunks=len(split) // p.pp, schedule=p.schedule,
        recompute=config.memory.recompute, sequence_parallel=p.sequence_parallel and p.tp > 1, tied=m.tie_embeddings,
        fp8=config.precision.fp8 != "none", kernel=kernel, hide_tp=o.tensor_parallel,
        hide_dp=o.grad_reduce and o.param_gather, stage_layers=split,
    )  # fmt: skip
