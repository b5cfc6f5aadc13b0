"""Bytes of one rank: what lives all the time, exactly, and what lives between forward and backward.

Activations saved per layer, for b bytes per element and MHA (x, q, k, v, attention output, the residual
after it, gate and up; `none` keeps the norms' outputs and the SwiGLU product as well):

    none       b (8h + 6f)  = 16h + 6f bytes per token in bf16
    selective  b (6h + 2f)  = 12h + 4f
    full       b h          =  2h

Tensor parallelism divides what is inside attention and feed-forward network; sequence parallelism the rest
(Korthikanti et al. 2022, arXiv:2205.05198, table 2).  Context parallelism: see docs/planner.md.
"""

from dataclasses import dataclass

from megallama.config.schema import Config
from megallama.plan.exchange import exchange, kv_copies, local_heads
from megallama.plan.params import BufferLayout, ParamBuilder, build_layout, heads
from megallama.plan.schedule import Kind, Schedule
from megallama.plan.work import Stages

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank, by category; `state`, of a copy in memory, is not in their sum."""

    weights: int  # on a GPU with precision.fp8 also the layers' rounded ones, in both layouts
    main_grads: int
    optimizer: int
    tables: int  # rotary angles
    activations: int  # what the schedule keeps for backwards at its peak
    logits: int  # one chunk of the loss, on the last stage
    state: int  # this rank's share of the master weights and of both moments

    @property
    def persistent(self) -> int:
        return self.weights + self.main_grads + self.optimizer + self.tables

    @property
    def total(self) -> int:
        """Everything counted here; a running program adds communication and work buffers."""
        return self.persistent + self.activations + self.logits


def stage_layout(config: Config, stages: Stages, stage: int, dp_cp: int, tp_rank: int = 0) -> BufferLayout:
    """The flat buffer of one stage on one tensor-parallel rank."""
    p = config.parallel
    builder = ParamBuilder(config.model, p.tp, tp_rank, p.sequence_parallel and p.tp > 1)
    specs = builder.stage(stages[stage], stage == 0, stage == len(stages) - 1)
    return build_layout(specs, dp_cp, int(config.overlap.bucket_mb * 2**20 / 4))


def saved_bytes(config: Config, recompute: str | None = None, *, gathered: bool = False) -> int:
    """Bytes that a layer keeps of a micro-batch, without row statistics; gathered: every row."""
    m, (tokens, rows) = config.model, tokens_and_rows(config)
    h, f, rows = m.hidden_size, m.ffn_hidden_size // config.parallel.tp, tokens if gathered else rows
    attention = heads(m)[2] * (2 * sum(local_heads(config)) + (0 if gathered else _context_heads(config)))
    outside = {"none": 4 * h, "selective": 2 * h, "full": h}[mode := recompute or config.memory.recompute]
    inside = {"none": attention + 3 * f, "selective": attention + 2 * f, "full": 0}[mode]
    return DTYPE_BYTES[config.precision.dtype] * (rows * outside + tokens * inside)


def _context_heads(config: Config) -> int:
    """Heads per token that context parallelism keeps besides q, k, v and the output."""
    (n, k), cp = local_heads(config), config.parallel.cp
    if cp == 1:
        return 0
    if exchange(config)[0] == "heads":
        return n + 2 * k * (kv_copies(k, cp) - 1)
    return n + 2 * k * cp * config.memory.cp_keep_kv


def statistics_bytes(config: Config, recompute: str | None = None) -> int:
    """What fused attention keeps on top of `saved_bytes`: log-sum-exps in fp32."""
    kept = (recompute or config.memory.recompute) != "full"
    return kept * 4 * tokens_and_rows(config)[0] * (config.model.num_heads // config.parallel.tp)


def stage_saved_bytes(config: Config, stages: Stages, stage: int) -> int:
    """Bytes that a stage keeps of one micro-batch from its forward to its backward."""
    tokens, layers = tokens_and_rows(config)[0], len(stages[stage])
    out = layers * (saved_bytes(config) + statistics_bytes(config))
    if config.data.document_mask and layers:  # angles by document
        out += tokens * heads(config.model)[2] * DTYPE_BYTES[main_dtype(config)]
    ids = (8 + (config.parallel.tp > 1)) * tokens  # and which of them this rank holds
    return out + (stage == 0) * ids + (stage == len(stages) - 1) * _head_saved_bytes(config)


def deferred_bytes(config: Config, stages: Stages, stage: int) -> int:
    """Operands of weight gradients, of a stage and micro-batch, between the halves of its backward [bytes]."""
    return len(stages[stage]) * saved_bytes(config, "none", gathered=True)


def peak_saved_bytes(config: Config, stages: Stages, schedule: Schedule, pp_rank: int) -> int:
    """Most bytes kept for backwards at once, also where a layer is computed again."""
    live, peak, last, full = 0, 0, len(stages) - 1, config.memory.recompute == "full"
    saved = {s: stage_saved_bytes(config, stages, s) for s in schedule.stages_of(pp_rank)}
    deferred = {s: deferred_bytes(config, stages, s) for s in saved}
    again = saved_bytes(config, "selective") + statistics_bytes(config, "selective") - saved_bytes(config, "full")
    for kind, s, _ in schedule.steps[pp_rank] if schedule.is_training else ():
        if full and stages[s] and kind in (Kind.B, Kind.I):  # the layer's input is still there
            others = (len(stages[s]) - 1) * (deferred[s] // len(stages[s]) - saved_bytes(config))  # put off so far
            peak = max(peak, live + again - (s == last) * _head_saved_bytes(config) + (kind is Kind.I) * others)
        live += {Kind.F: saved[s], Kind.B: -saved[s], Kind.I: deferred[s] - saved[s], Kind.W: -deferred[s]}.get(kind, 0)
        peak = max(peak, live)
    return peak


def rank_memory(config: Config, stages: Stages, schedule: Schedule, dp_cp: int, pp_rank: int) -> RankMemory:
    """Bytes of each of the ranks at one pipeline position."""
    owned = schedule.stages_of(pp_rank)
    layouts = [stage_layout(config, stages, s, dp_cp) for s in owned]
    numel, buckets = sum(x.numel for x in layouts), sum(len(x.buckets) for x in layouts)
    dtype, main = DTYPE_BYTES[config.precision.dtype], DTYPE_BYTES[main_dtype(config)]
    specs = (placed.spec for layout in layouts for bucket in layout.buckets for placed in bucket.params)
    products = sum(spec.numel for spec in specs if spec.name.startswith("layers.") and len(spec.shape) == 2)
    fp8 = config.precision.fp8 != "none" and config.run.device != "cpu"
    logits = min(loss_chunk(config), tokens_and_rows(config)[0]) * padded_vocab(config)
    own = config.batch.seq_length // config.parallel.cp * (config.parallel.cp > 1 and not config.data.document_mask)
    return RankMemory(
        weights=numel * dtype + 2 * products * fp8,
        main_grads=numel * main,
        optimizer=numel // dp_cp * (3 if dtype < main else 2) * main + 4 * buckets,  # and step counts
        tables=len(owned) * (config.batch.seq_length + own) * heads(config.model)[2] * main,
        activations=peak_saved_bytes(config, stages, schedule, pp_rank),
        logits=logits * (dtype + main) if len(stages) - 1 in owned else 0,
        state=numel // dp_cp * 3 * main,
    )


def loss_chunk(config: Config, *, gpu: bool = True) -> int:
    """Most tokens whose logits exist at once; on a GPU, unless run.device="cpu", more.

    There a chunk is dozens of launches, and reads and writes the head's whole fp32 gradient.
    """
    memory, row = config.memory, padded_vocab(config) * DTYPE_BYTES[config.precision.dtype]
    by_size = int(memory.loss_chunk_mb * 2**20) // row // 128 * 128
    return max(memory.loss_chunk_tokens, by_size if gpu and config.run.device != "cpu" else 0)


def padded_vocab(config: Config) -> int:
    """Rows of the head on one rank."""
    return -(-config.model.vocab_size // config.parallel.tp)


def _head_saved_bytes(config: Config) -> int:
    return 2 * tokens_and_rows(config)[1] * config.model.hidden_size * DTYPE_BYTES[config.precision.dtype]


def main_dtype(config: Config) -> str:
    """The format of main gradients, and of sums."""
    return "fp64" if config.precision.dtype == "fp64" else "fp32"


def tokens_and_rows(config: Config) -> tuple[int, int]:
    """Tokens of a micro-batch on a rank, and rows of it where sequence parallelism cuts."""
    tokens = config.batch.micro_batch_size * config.batch.seq_length // config.parallel.cp
    return tokens, tokens // config.parallel.tp if config.parallel.sequence_parallel else tokens
