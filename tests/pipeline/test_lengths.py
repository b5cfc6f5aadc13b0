"""Micro-batches of their own lengths: every schedule gives the numbers of one rank whose rows are padded and masked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megallama.kernels.attention import Documents
from megallama.layers.batch import MicroBatch
from megallama.train.assemble import Worker
from megallama.train.step import count_tokens, evaluate_step, train_step
from tests.pipeline.test_runtime import SCHEDULES
from tests.small import curve, deviation, documents, micro_batches, on_threads, small_config, solo_rank, tokens, train

LENGTHS = [16, 4, 10, 2, 16, 8, 14, 6]  # of the 8 rows of a batch
LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    **{str(s): (n, {"parallel": s}) for n, s in SCHEDULES if "stage_layers" not in s and n < 4},
    "sp": (2, {"parallel": {"tp": 2}, "overlap": {"tensor_parallel_chunks": 2}}),
    "sp, pp": (4, {"parallel": {"tp": 2, "pp": 2}, "memory": {"recompute": "full"}}),
    "tp, zb-v, dp": (8, {"parallel": {"tp": 2, "sequence_parallel": False, "pp": 2, "schedule": "zb-v", "chunks": 2}}),
}


def cut(batch: MicroBatch, length: int) -> MicroBatch:
    """The first `length` tokens of its rows."""
    assert batch.mask is not None
    starts = None if batch.documents is None else batch.documents.starts[:, :length]
    parts = (part[:, :length].contiguous() for part in (batch.tokens, batch.labels, batch.mask))
    return MicroBatch(*parts, None if starts is None else Documents.of(starts))


def of_own_lengths(rank: Worker, data: Tensor, starts: Tensor | None) -> list[float]:
    """Losses and gradient norms of steps, and the loss of an evaluation after them."""
    found, dp = [], rank.groups.dp
    for step, rows in enumerate(data):
        whole = micro_batches(rank, rows, torch.ones_like(rows[:, 1:]).bool(), None if starts is None else starts[step])
        batches = [cut(batch, n) for batch, n in zip(whole, LENGTHS[dp.rank :: dp.size], strict=True)]
        schedule = rank.plan.schedule_for(len(batches))
        found.append(train_step(rank, schedule, batches, rank.plan.config.optimizer.lr, masked=True))
    forward = rank.plan.schedule_for(len(batches), training=False)
    return [*curve(found), evaluate_step(rank, forward, batches).loss]


@pytest.mark.parametrize("name", [*LAYOUTS, *(f"documents, {name}" for name in list(LAYOUTS)[-3:])])
def test_rows_of_any_length_give_one_ranks_numbers(name: str) -> None:
    ranks, sections = LAYOUTS[name.removeprefix("documents, ")]
    within = {"document_mask": name.startswith("documents, ")}
    config = small_config(**sections, data=within)
    data = tokens(config, 2)
    starts = documents(config, 2) if config.data.document_mask else None
    padded = torch.arange(16) < torch.tensor(LENGTHS)[:, None]
    alone = solo_rank(small_config(data=within))
    want = curve(train(alone, data, padded.expand(2, -1, -1), starts))
    again = micro_batches(alone, data[1], padded, None if starts is None else starts[1])
    want.append(evaluate_step(alone, alone.plan.schedule_for(8, training=False), again).loss)
    for own in on_threads(config, ranks, lambda rank: of_own_lengths(rank, data, starts)):
        assert deviation(own, want) <= 1e-12


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([16, 5], "1 samples of 5 tokens: give at most 16 each, in all a multiple of 2"),
        ([18, 4], "1 samples of 18 tokens: give at most 16 each, in all a multiple of 2"),
    ],
    ids=["does not divide", "too long"],
)
def test_what_no_layout_could_do_is_said_before_anything_is_sent(lengths: list[int], message: str) -> None:
    config = small_config(parallel={"tp": 2, "pp": 2})

    def body(rank: Worker) -> str:
        batches = [MicroBatch(torch.zeros(1, n, dtype=torch.int64), torch.zeros(1, n).long()) for n in lengths]
        with pytest.raises(ValueError) as error:
            rank.runtime.run(rank.plan.schedule_for(2), batches)
        return str(error.value)

    assert on_threads(config, 4, body) == [message] * 4


def test_lengths_that_other_replicas_do_not_know_are_not_counted_as_theirs() -> None:
    rank = solo_rank(small_config())
    batches = micro_batches(rank, tokens(rank.plan.config, 1)[0])
    assert count_tokens(rank, batches, masked=False, of=8) == 8 * 16
    shorter = [replace(batches[0], num_counted=4), *batches[1:]]
    with pytest.raises(AssertionError, match="the other ranks do not know of"):
        count_tokens(rank, shorter, masked=False, of=8)
    assert count_tokens(rank, shorter, masked=True) == 7 * 16 + 4
