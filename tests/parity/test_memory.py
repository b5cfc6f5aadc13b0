"""The plan's bytes are the program's: flat buffers, optimizer shards, and what backwards keep, in all rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megallama.config.schema import Config
from megallama.kernels import attention
from megallama.layers.context import _Gather
from megallama.plan import memory
from megallama.plan.exchange import exchange
from megallama.plan.memory import DTYPE_BYTES, rank_memory, stage_saved_bytes, tokens_and_rows
from megallama.plan.params import heads
from megallama.plan.work import Stages
from megallama.train.assemble import Worker
from tests.parity.matrix import FURTHER, Layout, matrix
from tests.small import documents, on_threads, small_config, tokens, train


def kept_by_attention(config: Config, recompute: str | None = None) -> int:
    """What attention on a CPU keeps of a layer, where the plan counts the log-sum-exps of a GPU's fused kernels.

    Ours (16 bits): nothing, nor its output a second time, which the plan counts with context parallelism.  torch's:
    log-sum-exps in the format of sums, its output a second time (if it has several heads, or several documents are
    taken together), and for these a mask of one small square: one for all layers of a stage (`mask_bytes`), but where
    one layer is computed again, as `recompute` says.
    """
    size, cut = DTYPE_BYTES[config.precision.dtype], config.parallel.cp > 1
    (n, _, d), tp, tokens = heads(config.model), config.parallel.tp, tokens_and_rows(config)[0]
    local, masked = n // tp, config.data.document_mask
    if cut and size > 2 and (recompute or config.memory.recompute) != "full" and exchange(config)[0] == "gather":
        torchs = tokens // 2 * OF_THREAD.first  # the chunk of as many queries as keys; all others have our kernel
        return size * local * (torchs * (1 + d) - tokens * d)
    if (recompute or config.memory.recompute) == "full" or size == 2:
        return 0 if (recompute or config.memory.recompute) == "full" or not cut else -tokens * size * local * d
    extra = (local > 1 or masked) * local * d * (not cut)
    return tokens * size * (local + extra) + (recompute is not None) * mask_bytes(config)


def mask_bytes(config: Config) -> int:
    """Of the masks of a micro-batch on a CPU, whose samples are short and of several documents each.

    With context parallelism they depend on where the documents lie, and are not counted (`ignored`).
    """
    size = DTYPE_BYTES[config.precision.dtype]
    counted = config.data.document_mask and size > 2 and config.parallel.cp == 1
    return tokens_and_rows(config)[0] * size * config.batch.seq_length if counted else 0


def kept_by_stage(config: Config, stages: Stages, stage: int) -> int:
    """What a stage keeps of a micro-batch on a CPU."""
    masks = len(stages[stage]) > 0 and config.memory.recompute != "full"
    return stage_saved_bytes(config, stages, stage) + masks * mask_bytes(config)


def tables_of(rank: Worker) -> list[Tensor]:
    """The angles of its stages: of all tokens, and its own of them where these are a copy."""
    rotary = [stage.rotary for stage in rank.stages.values()]
    if rank.groups.cp.size == 1 or rank.plan.config.data.document_mask:
        return [x for one in rotary for x in (one.cos, one.sin)]
    return [x for one in rotary for x in (one.cos, one.sin, *one.tables(None))]


OF_THREAD = threading.local()  # its `kept` counts for the rank that runs in this thread
ignored: list[Tensor] = []  # masks, alive


@pytest.fixture(autouse=True)
def what_context_parallelism_keeps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hooks of its own hide what it keeps from those of `measured`; its masks are noted."""
    start, leave_out, again, mask = _Gather.__init__, _Gather.leave_out, _Gather.again, attention._mask
    back = _Gather.backward

    def init(self: Any, *arguments: Any) -> None:
        start(self, *arguments)
        self.held = [OF_THREAD.kept.pack(x) for x in self.own] if torch.is_grad_enabled() else []

    def pack(self: Any, tensor: Tensor) -> Any:
        found = leave_out(self, tensor)
        return OF_THREAD.kept.pack(found) if isinstance(found, Tensor) else found

    def unpack(self: Any, found: Any) -> Tensor:
        return again(self, found.tensor if isinstance(found, Held) else found)  # type: ignore[no-any-return]

    def backward(self: Any, ctx: Any, *grads: Tensor) -> Any:
        found = back(self, ctx, *grads)
        self.held = self.held if self.own else []
        return found

    def noted(*arguments: Any) -> Tensor:
        found = mask(*arguments)
        ignored.extend([found] * (hasattr(OF_THREAD, "kept") and OF_THREAD.kept.cut))
        return found

    monkeypatch.setattr(_Gather, "__init__", init)
    monkeypatch.setattr(_Gather, "leave_out", pack)
    monkeypatch.setattr(_Gather, "backward", backward)
    monkeypatch.setattr(_Gather, "again", unpack)
    monkeypatch.setattr(attention, "_mask", noted)
    yield
    ignored.clear()


class Kept:
    """Counts the bytes of unique storages that graphs or queues of weight gradients keep alive."""

    def __init__(self, rank: Worker) -> None:
        self.rank = rank
        self.graphs: dict[int, list[int]] = {}  # storage -> saved so often, bytes
        self.peak, self.cut = 0, rank.groups.cp.size > 1
        permanent = [*(b.weights for b in rank.buffers.values()), *tables_of(rank)]
        self.permanent = {t.untyped_storage().data_ptr() for t in permanent}
        OF_THREAD.kept = self

    def pack(self, tensor: Tensor) -> Held:
        """Called with every tensor that a graph keeps; the graph keeps the result."""
        held = Held(self, tensor)
        self.sample()
        return held

    def sample(self, done: None = None) -> None:
        """Note how much is alive now."""
        alive = {at: size for at, (count, size) in self.graphs.items() if count}
        alive |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.queued()}
        others = self.permanent | {mask.untyped_storage().data_ptr() for mask in ignored}
        self.peak = max(self.peak, sum(size for at, size in alive.items() if at not in others))

    def queued(self) -> Iterator[Tensor]:
        """The operands of weight gradients that are put off."""
        for buffers in self.rank.buffers.values():
            groups: Any = buffers.queue.groups
            for group in groups.values() if isinstance(groups, dict) else groups:
                for work in group:
                    cells: Any = work.__closure__  # type: ignore[attr-defined]
                    yield from (c.cell_contents for c in cells if isinstance(c.cell_contents, Tensor))


class Held:
    """A saved tensor; when its graph lets go of it, it is no longer counted."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self.entry = tensor, kept.graphs.setdefault(storage.data_ptr(), [0, 0])
        self.entry[0] += 1
        self.entry[1] = storage.nbytes()

    def __del__(self) -> None:
        self.entry[0] -= 1


def measured(rank: Worker, data: Tensor, starts: Tensor | None) -> tuple[int, ...]:
    """(weights, main gradients, optimizer, tables, peak of what backwards need) of a rank that trains a step."""
    kept = Kept(rank)
    handlers = rank.runtime._handlers
    for kind, handle in list(handlers.items()):
        handlers[kind] = lambda action, handle=handle: kept.sample(handle(action))  # type: ignore[misc]
    with saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        train(rank, data, starts=starts)
    kept.sample()
    buffers = rank.buffers.values()
    held = [tensors for *_, tensors in rank.optimizer._held]
    weights = {b.weights.untyped_storage().data_ptr() for b in buffers}
    tensors = [h[name] for h in held for name in ("master", "exp_avg", "exp_avg_sq", "step")]
    own = [t for t in tensors if t.untyped_storage().data_ptr() not in weights]
    return (
        sum(b.weights.nbytes for b in buffers),
        sum(b.grads.nbytes for b in buffers),
        sum(t.untyped_storage().nbytes() for t in own),
        sum(x.nbytes for x in tables_of(rank)),
        kept.peak,
    )


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("layout", [*matrix(), *FURTHER], ids=str)
def test_the_plan_predicts_every_byte(layout: Layout, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "statistics_bytes", kept_by_attention)
    monkeypatch.setattr(memory, "stage_saved_bytes", kept_by_stage)
    the_same_bytes(layout.config(dtype, layers=layout.few_layers), layout.ranks)


GATHER: dict[str, Any] = {"cp": 2, "cp_exchange": "gather"}
CONTEXT: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "gathered": (4, {"parallel": GATHER | {"cp": 4}}),
    "gathered, grouped heads": (4, {"parallel": GATHER | {"tp": 2}, "model": {"num_kv_heads": 1}}),
    "gathered by groups of heads": (2, {"parallel": GATHER, "overlap": {"context_parallel_heads": 2}}),
    "gathered and kept": (2, {"parallel": GATHER, "memory": {"cp_keep_kv": True, "recompute": "none"}}),
    "gathered for documents": (2, {"parallel": GATHER, "data": {"document_mask": True}}),
    "gathered again": (4, {"parallel": GATHER | {"pp": 2, "schedule": "zb-h1"}, "memory": {"recompute": "full"}}),
    "kept, again": (2, {"parallel": GATHER, "memory": {"recompute": "full", "cp_keep_kv": True}}),
    "by heads": (2, {"parallel": {"cp": 2, "cp_exchange": "heads"}, "data": {"document_mask": True}}),
    "by heads, copies": (4, {"parallel": {"cp": 4, "cp_exchange": "heads"}, "model": {"num_kv_heads": 2}}),
    "by heads, again": (4, {"parallel": {"cp": 2, "cp_exchange": "heads"}, "memory": {"recompute": "full"}}),
}


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
@pytest.mark.parametrize("name", CONTEXT)
def test_the_plan_predicts_every_byte_of_context_parallelism(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "statistics_bytes", kept_by_attention)
    monkeypatch.setattr(memory, "stage_saved_bytes", kept_by_stage)
    ranks, sections = CONTEXT[name]
    model = {"num_layers": 2, **sections.get("model", {})}
    the_same_bytes(small_config(**{**sections, "model": model, "precision": {"dtype": dtype}}), ranks)


def the_same_bytes(config: Config, ranks: int) -> None:
    data = tokens(config, 1)
    starts = None
    if config.data.document_mask:
        starts = documents(config, 1)
        starts[..., 4:] = starts[..., 4:].clamp(min=4)  # another document begins in every sample

    def body(rank: Worker) -> tuple[tuple[int, ...], tuple[int, ...]]:
        plan, groups = rank.plan, rank.groups
        schedule = plan.schedule_for(config.batch.deal(len(data[0]), groups.dp.size)[groups.dp.rank])
        OF_THREAD.first = groups.cp.rank == 0
        m = rank_memory(config, plan.stages, schedule, groups.dp_cp.size, groups.pp.rank)
        most = plan.memory(groups.pp.rank).activations  # what the plan says is that of the replica with most
        assert m.activations == most if schedule is plan.schedule else m.activations <= most
        return (m.weights, m.main_grads, m.optimizer, m.tables, m.activations), measured(rank, data, starts)

    for number, (predicted, real) in enumerate(on_threads(config, ranks, body)):
        assert predicted == real, number
