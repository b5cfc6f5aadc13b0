"""What one rank communicates in one training step, from the configuration alone: which operation, how often, how much.

Bytes are those of the whole tensor: all_gather's output, reduce_scatter's input.  What layers do
over tp is the table of `layers.linear`, over cp that of docs/how_it_works.md; full recomputation
repeats the forward.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from megallama.config.schema import Config
from megallama.plan.exchange import exchange, kv_copies, local_heads
from megallama.plan.memory import DTYPE_BYTES, loss_chunk, main_dtype, stage_layout, tokens_and_rows
from megallama.plan.params import heads
from megallama.plan.schedule import Kind, Schedule
from megallama.plan.topology import Topology
from megallama.plan.work import Stages

VOTE = 10  # numbers of the vote before the optimizer runs: loss, norm, non-finite, late, failed, five signals
ITEM_BYTES = {**DTYPE_BYTES, "int64": 8}
Found = Counter[tuple[str, str, str, tuple[int, ...], str]]  # axis, operation, what, shape, format


@dataclass(frozen=True)
class Collective:
    """Calls of one operation with tensors of one shape, in one step of one rank."""

    axis: str  # the group: tp, cp, dp (dp_cp where cp > 1), pp, embedding, kv, world
    op: str
    what: str
    shape: tuple[int, ...]
    dtype: str
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes of all calls together."""
        return self.count * prod(self.shape) * ITEM_BYTES[self.dtype]


def collectives(
    config: Config, topology: Topology, stages: Stages, schedule: Schedule, pp_rank: int, shard: int = 0
) -> tuple[Collective, ...]:
    """Everything that a rank communicates in one training step; the same on all tensor-parallel ranks.

    shard: its place among the ranks with the same weights.
    """
    found: Found = Counter()
    hidden, dtype = (tokens_and_rows(config)[1], config.model.hidden_size), config.precision.dtype
    axis, same_weights = ("dp_cp" if topology.cp > 1 else "dp"), topology.size("dp", "cp")
    for stage in schedule.stages_of(pp_rank):
        each = _tensor(config, stages, stage) if topology.tp > 1 else Found()
        each += _context(config, len(stages[stage])) if topology.cp > 1 else Found()
        for key, count in each.items():
            found[key] += count * schedule.num_microbatches
        found += _gradients(config, stages, stage, shard, axis, same_weights)
    if schedule.owners[0] == schedule.owners[-1]:  # both copies of a tied embedding are here
        found = Found({key: n for key, n in found.items() if key[0] != "embedding"})
    for action in schedule.steps[pp_rank]:
        if not action.kind.is_compute:
            what = "activations" if action.kind in (Kind.SEND_F, Kind.RECV_F) else "their gradients"
            found["pp", action.kind.partition("_")[0], what, hidden, dtype] += 1
    found[axis, "all_reduce", "counted tokens", (1,), "int64"] = int(same_weights > 1 and config.data.document_mask)
    found["world", "all_reduce", "loss, norm, health", (VOTE,), "fp64"] = int(topology.world_size > 1)
    return tuple(Collective(*key, n) for key, n in found.items() if n)


def _tensor(config: Config, stages: Stages, stage: int) -> Found:
    """Over tp, for one micro-batch of a stage."""
    dtype, tokens, chunk = config.precision.dtype, tokens_and_rows(config)[0], loss_chunk(config)
    layers, first, last = len(stages[stage]), stage == 0, stage == len(stages) - 1
    again = 2 * layers if config.memory.recompute == "full" else 0
    h, n, found = config.model.hidden_size, config.overlap.tensor_parallel_chunks, Found()
    for what, rows, gathers, sums in (
        ("layers", tokens // n, n * (2 * layers + again), n * (2 * layers + again)),  # forwards
        ("layers", tokens, 4 * layers, 2 * layers), ("embedding", tokens, first, first), ("head", tokens, last, last),
    ):  # fmt: skip
        if config.parallel.sequence_parallel:
            found["tp", "all_gather", what, (rows, h), dtype] += gathers
        op = "reduce_scatter" if config.parallel.sequence_parallel else "all_reduce"
        found["tp", op, what, (rows, h), dtype] += sums
    for size in [min(chunk, tokens - start) for start in range(0, tokens if last else 0, chunk)]:
        found["tp", "all_reduce", "loss: maxima", (size,), main_dtype(config)] += 1
        found["tp", "all_reduce", "loss: sums", (2, size), main_dtype(config)] += 1
    return found


def _context(config: Config, layers: int) -> Found:
    """Over cp, for one micro-batch of so many layers."""
    (n, k), d, cp = local_heads(config), heads(config.model)[2], config.parallel.cp
    b, s, dtype = config.batch.micro_batch_size, config.batch.seq_length, config.precision.dtype
    again, found = config.memory.recompute == "full", Found()
    if exchange(config)[0] == "gather":
        pieces, gathers = config.overlap.context_parallel_heads, 1 + again + (not config.memory.cp_keep_kv)
        shape = (cp, 2 * b, s // cp, k // pieces, d)
        found["cp", "all_gather", "keys and values", shape, dtype] = gathers * pieces * layers
        found["cp", "all_to_all", "gradients of keys and values", shape, dtype] = pieces * layers
        return found
    for what, local in (("queries, keys and values", n + 2 * k * kv_copies(k, cp)), ("attention outputs", n)):
        found["cp", "all_to_all", what, (cp, b, s // cp, local // cp, d), dtype] += (2 + again) * layers
    return found


def _gradients(config: Config, stages: Stages, stage: int, shard: int, axis: str, ranks: int) -> Found:
    """The gradients and the weights of a stage, once a step, over a group of `ranks`."""
    layout, main = stage_layout(config, stages, stage, ranks), main_dtype(config)
    found, copies = Found(), Counter[str]()
    for bucket in layout.buckets:
        start, stop = bucket.shard(ranks, shard)
        if ranks > 1:
            size = (bucket.stop - bucket.start,)
            found[axis, "reduce_scatter", "gradients", size, main] += 1
            found[axis, "all_gather", "weights", size, config.precision.dtype] += 1
        if bucket.tied:
            found["embedding", "all_reduce", "gradients of the tied embedding", (stop - start,), main] += 1
        for segment in layout.segments(start, stop):
            copies[segment.part.sum_over] += segment.count
    for over, what in (("tp", "gradients of norms"), ("kv", "gradients of shared key/value heads")):
        found[over, "all_reduce", what, (copies[over],), main] = int(copies[over] > 0)
    return found


def communication_table(config: Config, topology: Topology, stages: Stages, schedule: Schedule) -> str:
    """The calls of one step by axis, of the pipeline rank that communicates most."""
    each = [collectives(config, topology, stages, schedule, rank) for rank in range(topology.pp)]
    rank = max(range(topology.pp), key=lambda r: sum(c.nbytes for c in each[r]))
    lines = [f"{'group':<9}  {'operation':<14}  {'of':<36}  {'calls a step':>12}  {'MiB a step':>14}"]
    for key in sorted({(c.axis, c.op, c.what) for c in each[rank]}):
        same = [c for c in each[rank] if (c.axis, c.op, c.what) == key]
        numbers = f"{sum(c.count for c in same):>12,}  {sum(c.nbytes for c in same) / 2**20:>14,.3f}"
        lines.append(f"{key[0]:<9}  {key[1]:<14}  {key[2]:<36}  {numbers}")
    return "\n".join([*lines, f"of a rank at pipeline position {rank}, which communicates most; whole tensors"])


def behind(config: Config) -> tuple[int, int, int]:
    """Steps, samples and tokens before a run with checkpoint.continue_from, if that can be read."""
    if config.checkpoint.continue_from is None:
        return 0, 0, 0
    from megallama.checkpoint.folder import begun  # and torch, which no other plan needs

    return begun(config)
