"""What one rank communicates in one training step, from the configuration alone: which operation, how often, how much.

Bytes are those of the whole tensor: all_gather's output, reduce_scatter's input.  Per micro-batch and layer, T tokens
and hidden size h, tensor parallelism gathers and reduce-scatters [T, h] with sequence parallelism (Korthikanti et al.
2022), or all-reduces it without (Shoeybi et al. 2019); both backwards of a row pair gather again what their weight
gradients need, and full recomputation repeats the forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megallama.config.schema import Config
from megallama.plan.memory import DTYPE_BYTES, stage_layout
from megallama.plan.partition import Stages
from megallama.plan.schedule import Kind, Schedule
from megallama.plan.topology import Topology

VOTE = 8  # numbers on which all ranks agree before the optimizer runs: loss, norm, non-finite, late, four signals
ITEM_BYTES = {**DTYPE_BYTES, "int64": 8}


@dataclass(frozen=True)
class Collective:
    """Calls of one operation with tensors of one shape, in one step of one rank."""

    axis: str  # the group: tp, dp, pp, embedding, kv, world
    op: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    what: str

    @property
    def nbytes(self) -> int:
        """Bytes of all calls together."""
        return self.count * prod(self.shape) * ITEM_BYTES[self.dtype]


def collectives(
    config: Config, topology: Topology, stages: Stages, schedule: Schedule, pp_rank: int, dp_rank: int = 0
) -> tuple[Collective, ...]:
    """Everything that a rank communicates in one training step; alike for all tensor-parallel ranks."""
    found: Counter[tuple[str, str, tuple[int, ...], str, str]] = Counter()
    for stage in schedule.stages_of(pp_rank):
        if topology.tp > 1:
            for what, op, shape, dtype, count in _tensor(config, len(stages[stage]), stage, len(stages)):
                found["tp", op, shape, dtype, what] += count * schedule.num_microbatches
        for axis, what, op, size, dtype in _gradients(config, topology, stages, stage, dp_rank):
            found[axis, op, (size,), dtype, what] += 1
    rows, hidden = _tokens(config) // (topology.tp if _sharded(config) else 1), config.model.hidden_size
    for action in schedule.steps[pp_rank]:
        if not action.kind.is_compute:
            what = "activations" if action.kind in (Kind.SEND_F, Kind.RECV_F) else "their gradients"
            found["pp", action.kind.partition("_")[0], (rows, hidden), config.precision.dtype, what] += 1
    if topology.dp > 1 and config.data.document_mask:
        found["dp", "all_reduce", (1,), "int64", "counted tokens"] += 1
    if topology.world_size > 1:
        found["world", "all_reduce", (VOTE,), "fp64", "loss, norm, health"] += 1
    return tuple(Collective(a, op, shape, dtype, n, what) for (a, op, shape, dtype, what), n in found.items() if n)


def _tensor(
    config: Config, layers: int, stage: int, stages: int
) -> Iterator[tuple[str, str, tuple[int, ...], str, int]]:
    """(what, operation, shape, format, count) over tp for one micro-batch of a stage."""
    dtype, wide, tokens = config.precision.dtype, _main(config), _tokens(config)
    again = config.memory.recompute == "full"
    gathers, scatters = layers * (8 if again else 6), layers * (6 if again else 4)
    full, first, last = (tokens, config.model.hidden_size), stage == 0, stage == stages - 1
    if _sharded(config):
        yield "layers", "all_gather", full, dtype, gathers
        yield "layers", "reduce_scatter", full, dtype, scatters
        yield "embedding", "reduce_scatter", full, dtype, first
        yield "embedding", "all_gather", full, dtype, first
        yield "head", "all_gather", full, dtype, last
        yield "head", "reduce_scatter", full, dtype, last
    else:
        yield "layers", "all_reduce", full, dtype, scatters
        yield "embedding", "all_reduce", full, dtype, first
        yield "head", "all_reduce", full, dtype, last
    for start in range(0, tokens if last else 0, config.memory.loss_chunk_tokens):
        chunk = min(config.memory.loss_chunk_tokens, tokens - start)
        yield "loss: maxima", "all_reduce", (chunk,), wide, 1
        yield "loss: sums", "all_reduce", (2, chunk), wide, 1


def _gradients(
    config: Config, topology: Topology, stages: Stages, stage: int, dp_rank: int
) -> Iterator[tuple[str, str, str, int, str]]:
    """(axis, what, operation, size, format) of the gradients and the weights of a stage, once a step."""
    dp, wide = topology.dp, _main(config)
    layout = stage_layout(config, stages, stage, dp)
    copies: Counter[str] = Counter()
    for bucket in layout.buckets:
        if dp > 1:
            yield "dp", "gradients", "reduce_scatter", bucket.stop - bucket.start, wide
            yield "dp", "weights", "all_gather", bucket.stop - bucket.start, config.precision.dtype
        start, stop = bucket.shard(dp, dp_rank)
        if bucket.tied and topology.pp > 1:
            yield "embedding", "gradients of the tied embedding", "all_reduce", stop - start, wide
        for segment in layout.segments(start, stop):
            copies[segment.part.sum_over] += segment.count
    for over, what in (("tp", "gradients of norms"), ("kv", "gradients of shared key/value heads")):
        if copies[over]:
            yield over, what, "all_reduce", copies[over], wide


def _sharded(config: Config) -> bool:
    return config.parallel.sequence_parallel and config.parallel.tp > 1


def _tokens(config: Config) -> int:
    return config.batch.micro_batch_size * config.batch.seq_length


def _main(config: Config) -> str:
    """The format of main gradients and of sums."""
    return "fp64" if config.precision.dtype == "fp64" else "fp32"


def communication_table(config: Config, topology: Topology, stages: Stages, schedule: Schedule) -> str:
    """The calls of one step by axis, of the pipeline rank that communicates most."""
    each = [collectives(config, topology, stages, schedule, rank) for rank in range(topology.pp)]
    rank = max(range(topology.pp), key=lambda r: sum(c.nbytes for c in each[r]))
    sums: dict[tuple[str, str, str], list[int]] = {}
    for c in each[rank]:
        total = sums.setdefault((c.axis, c.op, c.what), [0, 0])
        total[0], total[1] = total[0] + c.count, total[1] + c.nbytes
    rows = [[*key, f"{n:,}", f"{size / 2**20:,.3f}"] for key, (n, size) in sorted(sums.items())]
    rows.insert(0, ["group", "operation", "of", "calls per step", "MiB per step"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, f"of a rank at pipeline position {rank}, which communicates most; whole tensors"])
