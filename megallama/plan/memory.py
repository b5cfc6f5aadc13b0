"""Bytes of one rank: what lives all the time, exactly, and what lives between forward and backward.

Persistent: the flat buffers as `plan.layout` lays them out, padding included: weights in the training format,
main gradients in fp32, and this rank's shard of master weights and two moments in fp32 (all fp64 with fp64).

Activations saved per layer, for b bytes per element, T tokens and MHA (x, q, k, v, attention output, the residual
after attention, gate and up; `none` keeps the two norm outputs and the SwiGLU product as well):

    none       b (8h + 6f)  = 16h + 6f bytes per token in bf16
    selective  b (6h + 2f)  = 12h + 4f
    full       b h          =  2h

Tensor parallelism divides what lies inside attention and the feed-forward network; sequence parallelism the rest
too (Korthikanti et al. 2022, arXiv:2205.05198, table 2).  Besides, fp32 row statistics: 1/rms of two norms, and the
log-sum-exp of attention per head.
"""

from __future__ import annotations

from dataclasses import dataclass

from megallama.config.schema import Config
from megallama.plan.layout import BufferLayout, build_layout
from megallama.plan.params import ParamBuilder, ParamSpec, heads
from megallama.plan.partition import Stages
from megallama.plan.schedule import Schedule

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, by category."""

    weights: int
    main_grads: int
    optimizer: int
    activations: int  # saved layer activations at the schedule's peak
    logits: int  # one chunk of the loss, on the last stage

    @property
    def persistent(self) -> int:
        """What lives all the time."""
        return self.weights + self.main_grads + self.optimizer

    @property
    def total(self) -> int:
        """Everything counted here; a running program adds communication and work buffers."""
        return self.persistent + self.activations + self.logits


def stage_specs(config: Config, stages: Stages, stage: int, tp_rank: int = 0) -> tuple[ParamSpec, ...]:
    """The parameters of one stage on one tensor-parallel rank."""
    p = config.parallel
    builder = ParamBuilder(config.model, p.tp, tp_rank, p.sequence_parallel and p.tp > 1)
    return builder.stage(stages[stage], stage == 0, stage == len(stages) - 1)


def stage_layout(config: Config, stages: Stages, stage: int, dp: int, tp_rank: int = 0) -> BufferLayout:
    """The flat buffer of one stage on one tensor-parallel rank; its length is the same on all of them."""
    return build_layout(stage_specs(config, stages, stage, tp_rank), dp, int(config.overlap.bucket_mb * 2**20 / 4))


def saved_bytes(config: Config, recompute: str | None = None) -> int:
    """Activation bytes that one layer keeps of one micro-batch on one rank, without row statistics."""
    m, tp = config.model, config.parallel.tp
    n, k, d = heads(m)
    h, f, local_kv = m.hidden_size, m.ffn_hidden_size // tp, max(1, k // tp)
    tokens, rows = _tokens_and_rows(config)
    outside = {"none": 4 * h, "selective": 2 * h, "full": h}[mode := recompute or config.memory.recompute]
    heads_bytes = 2 * d * (n // tp + local_kv)  # q, attention output; k, v
    inside = {"none": heads_bytes + 3 * f, "selective": heads_bytes + 2 * f, "full": 0}[mode]
    return DTYPE_BYTES[config.precision.dtype] * (rows * outside + tokens * inside)


def statistics_bytes(config: Config) -> int:
    """Bytes of fp32 row statistics that one layer keeps beside `saved_bytes`: a logsumexp a head in fused attention."""
    if config.memory.recompute == "full":
        return 0
    return 4 * _tokens_and_rows(config)[0] * config.model.num_heads // config.parallel.tp


def rank_memory(config: Config, stages: Stages, schedule: Schedule, dp: int, pp_rank: int) -> RankMemory:
    """Bytes of the ranks at one pipeline position (alike for all tp and dp ranks there)."""
    owned = schedule.stages_of(pp_rank)
    numel = sum(stage_layout(config, stages, s, dp).numel for s in owned)
    dtype, main = DTYPE_BYTES[config.precision.dtype], 8 if config.precision.dtype == "fp64" else 4
    layer = saved_bytes(config) + statistics_bytes(config)
    last = len(stages) - 1 in owned
    padded_vocab = -(-config.model.vocab_size // config.parallel.tp)
    chunk = min(config.memory.loss_chunk_tokens, _tokens_and_rows(config)[0])
    return RankMemory(
        weights=numel * dtype,
        main_grads=numel * main,
        optimizer=numel // dp * 3 * main,
        activations=layer * schedule.peak_in_flight(pp_rank, lambda stage: len(stages[stage])),
        logits=chunk * padded_vocab * (dtype + main) if last else 0,
    )


def _tokens_and_rows(config: Config) -> tuple[int, int]:
    """Tokens of a micro-batch, and rows of it that this rank holds where sequence parallelism cuts."""
    tokens = config.batch.micro_batch_size * config.batch.seq_length
    return tokens, tokens // config.parallel.tp if config.parallel.sequence_parallel else tokens
