"""Sequences that are cut over ranks give one rank's numbers, with everything else; and what would be wrong is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megallama.analysis.recording import Call, Recording
from megallama.comm.group import Done, Groups
from megallama.config.schema import Config
from megallama.kernels import attention
from megallama.kernels.attention import Documents
from megallama.layers import context
from megallama.layers.batch import MicroBatch
from megallama.model.llama import Rotary
from megallama.optim.update import GradSync
from megallama.plan.exchange import Share
from megallama.plan.plan import make_plan
from megallama.train.assemble import Worker
from megallama.train.step import train_step
from tests.parity.matrix import CONTEXT, LIMITS, TOGETHER, Layout, context_pairs, possible, trained
from tests.pool import Pool
from tests.small import build, curve, deviation, documents, on_threads, small_config, tokens, train
from tests.threads import run_threads

STEPS, LONG = 4, 10
BY_PROCESSES = Layout(tp=2, cp=2, kv_heads=1, documents=True), Layout(cp=2, exchange="heads", pp=2, documents=True)
_ALONE: dict[Config, list[float]] = {}


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all threads: each would put back what it found."""
    monkeypatch.setattr(attention, "TOGETHER", TOGETHER)


def worst(layout: Layout, dtype: str) -> float:
    """Largest deviation of the ranks, here threads, from one rank in a few steps."""
    alone = layout.config(dtype, alone=True)
    if alone not in _ALONE:
        (_ALONE[alone],) = on_threads(alone, 1, lambda rank: trained(rank, layout, STEPS))
    found = on_threads(layout.config(dtype), layout.ranks, lambda rank: trained(rank, layout, STEPS))
    return max(deviation(own, _ALONE[alone]) for own in found)


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("layout", CONTEXT, ids=str)
def test_every_layout_gives_one_ranks_numbers(layout: Layout) -> None:
    assert worst(layout, "fp64") <= LIMITS["fp64"]


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("layout", CONTEXT[:3], ids=str)
def test_and_nearly_so_in_fp32(layout: Layout) -> None:
    assert worst(layout, "fp32") <= LIMITS["fp32"]


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("gloo", [False, True], ids=["shared memory", "gloo"])
@pytest.mark.parametrize("layout", BY_PROCESSES, ids=str)
def test_over_processes(pool: Pool, layout: Layout, gloo: bool) -> None:
    steps = STEPS if gloo else LONG
    (want,) = on_threads(layout.config("fp64", alone=True), 1, lambda rank: trained(rank, layout, steps))
    for own in pool.run(4, "tests.parity.matrix:run", layout, "fp64", False, steps, gloo=gloo):
        assert deviation(own, want) <= LIMITS["fp64"]


def test_the_rows_hold_every_pair_that_can_occur() -> None:
    wanted = set().union(*map(context_pairs, possible(context=True)))
    assert wanted <= set().union(*map(context_pairs, CONTEXT))


# ---- what is particular about it ----


def small(cp: int = 1, *, kv: int = 4, within: bool = False, micro: int = 1, **parallel: Any) -> Config:
    """8 samples of 16 tokens."""
    sections = {"model": {"num_kv_heads": kv}, "data": {"document_mask": within}, "batch": {"micro_batch_size": micro}}
    return small_config(**sections, parallel={"cp": cp, **parallel})


def steps(config: Config, ranks: int, masks: torch.Tensor | None = None, count: int = 2) -> list[list[float]]:
    data = tokens(config, count)
    starts = documents(config, count) if config.data.document_mask else None
    return on_threads(config, ranks, lambda rank: curve(train(rank, data, masks, starts)))


@pytest.mark.parametrize("way", ["gather", "heads"])
@pytest.mark.parametrize("masked", [0, 1, 3], ids="chunk {}".format)
def test_a_chunk_whose_tokens_count_nothing_is_harmless(way: str, masked: int) -> None:
    """Of rank 0 the chunks 0 and 3, of rank 1 the others; masked 0 and 3: rank 0 counts nothing at all."""
    config = small(2, cp_exchange=way)
    mask = torch.ones(2, 8, 16, dtype=torch.bool)
    mask[..., 4 * masked : 4 * masked + 4] = False
    if masked == 3:
        mask[..., :4] = False
    (want,) = steps(small(micro=8), 1, mask)
    assert all(deviation(own, want) < 1e-12 for own in steps(config, 2, mask))


@pytest.mark.parametrize("way", ["gather", "heads"])
def test_micro_batches_of_their_own_lengths(way: str) -> None:
    lengths, rows = [16, 4, 8, 12], tokens(small(), 1)[0][:4]
    padded = torch.arange(16) < torch.tensor(lengths)[:, None]

    def body(rank: Worker) -> tuple[float, float]:
        samples = zip(rows[:, None], lengths, strict=True)
        whole = [MicroBatch(x[:, :n].clone(), x[:, 1 : n + 1].clone()) for x, n in samples]
        batches, schedule = [batch.part(rank.share) for batch in whole], rank.plan.schedule_for(4)
        result = train_step(rank, schedule, batches, 1e-3, masked=True)
        return result.loss, result.grad_norm

    alone = on_threads(small(), 1, lambda rank: curve(train(rank, rows[None], padded[None])))[0]
    for found in on_threads(small(2, cp_exchange=way, pp=2), 4, body):
        assert deviation(found, alone) < 1e-12


def recorded(config: Config, ranks: int) -> list[list[Call]]:
    """What the ranks of cp say to one another in a step of one micro-batch per replica."""
    plan, data = make_plan(config, ranks), tokens(config, 1)

    def body(groups: Groups) -> list[Call]:
        calls: list[Call] = []
        train(build(plan, replace(groups, cp=Recording(groups.cp, calls))), data)
        return calls

    return run_threads(ranks, body, plan.topology, num_kv_heads=config.model.num_kv_heads or 1)


@pytest.mark.parametrize(
    ("recompute", "keep", "gathers", "passes"),
    [("selective", False, 2, 2), ("none", True, 1, 2), ("full", False, 3, 3), ("full", True, 2, 3)],
    ids=["again", "kept", "recomputed", "recomputed and kept"],
)
def test_what_is_moved_is_what_the_rule_counts(recompute: str, keep: bool, gathers: int, passes: int) -> None:
    """2 heads of 8, 2 key/value heads, 8 samples of 16 tokens, 4 layers: keys and values are 2 x 16 numbers a token."""
    batch, memory = {"micro_batch_size": 8}, {"recompute": recompute, "cp_keep_kv": keep}
    for way in ("gather", "heads"):
        config = small_config(batch=batch, memory=memory, parallel={"cp": 2, "cp_exchange": way})
        for calls in recorded(config, 2):
            kv, qkvo, tokens_of_all = 2 * 4 * 8 * 8, 4 * 4 * 8 * 8, 8 * 16
            total = sum(call.nbytes for call in calls)
            if way == "gather":
                assert [c.op for c in calls].count("all_gather") == 4 * gathers
                assert [c.op for c in calls].count("all_to_all") == 4  # sums of gradients
                assert total == 4 * (gathers + 1) * kv * tokens_of_all
            else:
                assert [c.op for c in calls] == ["all_to_all"] * (2 * 4 * passes)
                assert total == 4 * passes * qkvo * tokens_of_all // 2


@pytest.mark.parametrize("within", [False, True], ids=["across documents", "within documents"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_heads_that_are_gathered_under_the_attention_of_others_change_no_bit(recompute: str, within: bool) -> None:
    def bits(pieces: int, delays: int | None = None) -> list[list[float]]:
        config = small(4, kv=2, within=within, cp_exchange="gather").changed(batch={"global_batch_size": 4})
        changed = {"overlap": {"context_parallel_heads": pieces}, "memory": {"recompute": recompute}}
        data, starts = tokens(config, 2), documents(config, 2) if within else None

        def run(rank: Worker) -> list[float]:
            numbers = curve(train(rank, data, starts=starts))
            rank.optimizer.wait()  # or the handles of the last gathering are dropped
            return numbers

        return on_threads(config.changed(**changed), 4, run, delays)

    assert bits(1) == bits(2) == bits(2, delays=1) == bits(2, delays=2)


# ---- twelve mistakes, each of which a comparison with one rank finds ----


def in_order_of_ranks(patch: pytest.MonkeyPatch) -> None:
    real = context._Gather.whole

    def gather(self: Any) -> torch.Tensor:
        return real(self).unflatten(1, (4, -1))[:, [0, 3, 1, 2]].flatten(1, 2)  # as they arrive

    patch.setattr(context._Gather, "whole", gather)
    patch.setattr(context._Gather, "leave_out", lambda self, tensor: tensor)


def a_position_off_by_one(patch: pytest.MonkeyPatch) -> None:
    real = Rotary.tables

    def tables(self: Rotary, *arguments: Any) -> tuple[torch.Tensor, ...]:
        cos, sin = real(self, *arguments)
        half = len(cos) // 2
        return tuple(torch.cat([x[:half], x[half - 1 : -1]]) for x in (cos, sin))

    patch.setattr(Rotary, "tables", tables)


def masks_aligned_at_the_top(patch: pytest.MonkeyPatch) -> None:
    attend = torch.nn.functional.scaled_dot_product_attention

    def top(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, within: object) -> torch.Tensor:
        return attend(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)

    patch.setattr("megallama.kernels.attention.blocked_attention", top)


def gradients_of_keys_not_summed(patch: pytest.MonkeyPatch) -> None:
    real = torch.Tensor.sum

    def first(self: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        return self[0] if "dtype" in named and self.dim() == 5 else real(self, *arguments, **named)

    patch.setattr(torch.Tensor, "sum", first)


def counted_by_each_rank(patch: pytest.MonkeyPatch) -> None:
    def own(worker: Worker, batches: list[MicroBatch], **named: Any) -> int:
        return max(1, 2 * sum(batch.num_counted for batch in batches))

    patch.setattr("megallama.train.step.count_tokens", own)


def copies_of_keys_not_summed(patch: pytest.MonkeyPatch) -> None:
    def repeat(self: torch.Tensor, n: int, dim: int) -> torch.Tensor:
        return torch.stack([self, *[self.detach()] * (n - 1)], dim + 1).flatten(dim, dim + 1)

    patch.setattr(torch.Tensor, "repeat_interleave", repeat)


def heads_in_another_order(patch: pytest.MonkeyPatch) -> None:
    real = context.ContextParallel.by_heads

    def call(self: Any, *arguments: Any) -> torch.Tensor:
        return real(self, *arguments).unflatten(2, (2, -1)).flip(2).flatten(2, 3)

    patch.setattr(context.ContextParallel, "by_heads", call)


def documents_a_token_later(patch: pytest.MonkeyPatch) -> None:
    real = Documents.part

    def part(self: Documents, chunks: Any) -> Documents:
        found, at = real(self, chunks), torch.arange(self.starts.shape[1])
        later = torch.where((self.starts == at).roll(1, 1), at, 0).cummax(1).values  # each begins a token later
        parts = tuple(Documents.of(later[:, :end].contiguous(), end - first) for first, end in chunks)
        return replace(found, parts=parts)

    patch.setattr(Documents, "part", part)


def gradients_reduced_over_dp_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GradSync, "_reduce", lambda self, bucket: self._handles.update({bucket.index: Done()}))


def loss_counted_by_every_tensor_parallel_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Worker, "counts_loss", True)


def angles_by_local_row(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rotary, "tables", lambda self, documents, length: (self.cos[:length], self.sin[:length]))


def labels_of_local_neighbours(patch: pytest.MonkeyPatch) -> None:
    real = MicroBatch.part

    def part(self: MicroBatch, own: Share) -> MicroBatch:
        found = real(self, own)
        return replace(found, labels=torch.cat([found.tokens[:, 1:], found.labels[:, -1:]], 1))

    patch.setattr(MicroBatch, "part", part)


GATHER, HEADS = {"cp": 2, "cp_exchange": "gather"}, {"cp": 2, "cp_exchange": "heads"}
FAULTS: list[tuple[Callable[[pytest.MonkeyPatch], None], int, dict[str, Any]]] = [
    (in_order_of_ranks, 2, GATHER),
    (a_position_off_by_one, 2, GATHER),
    (masks_aligned_at_the_top, 2, GATHER),
    (gradients_of_keys_not_summed, 2, GATHER),
    (counted_by_each_rank, 2, GATHER),
    (copies_of_keys_not_summed, 2, {**HEADS, "kv": 1}),
    (heads_in_another_order, 2, HEADS),
    (documents_a_token_later, 2, {**GATHER, "within": True}),
    (gradients_reduced_over_dp_alone, 2, GATHER),
    (loss_counted_by_every_tensor_parallel_rank, 4, {**GATHER, "tp": 2}),
    (angles_by_local_row, 2, HEADS),
    (labels_of_local_neighbours, 2, HEADS),
]


@pytest.mark.parametrize(("plant", "ranks", "layout"), FAULTS, ids=[plant.__name__ for plant, *_ in FAULTS])
def test_mistakes_are_found(
    plant: Callable[[pytest.MonkeyPatch], None], ranks: int, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.ones(2, 8, 16, dtype=torch.bool)
    mask[..., 4:12] = False  # all that rank 1 has
    chosen = mask if plant is counted_by_each_rank else None
    alone = {name: value for name, value in layout.items() if name in ("kv", "within")}
    (want,) = steps(small(micro=8, **alone), 1, chosen)
    sound = steps(small(**layout), ranks, chosen)
    plant(monkeypatch)
    assert deviation(sound[0], want) < 1e-12 < 1e-6 < deviation(steps(small(**layout), ranks, chosen)[0], want)
