"""Samples of several documents give the loss and the gradients of the documents run one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megallama.config.schema import Config
from megallama.layers.batch import MicroBatch
from megallama.train.assemble import Worker
from megallama.train.step import evaluate_step
from tests.model.reference import full_tensors
from tests.small import curve, documents, micro_batches, on_threads, small_config, solo_rank, tokens, train

Pieces = list[tuple[torch.Tensor, torch.Tensor]]


def pieces(config: Config) -> Pieces:
    """Tokens and labels of each document of a batch, cut as the samples cut them; those that predict something."""
    out = []
    for row, starts in zip(tokens(config, 1)[0], documents(config, 1)[0], strict=True):
        ends = [*starts.unique().tolist(), len(starts)]
        for a, b in zip(ends, ends[1:], strict=False):
            b = b + 1 if b == len(starts) else b  # only the last one may predict the token after the sample
            if b - a > 1:
                out.append((row[a : b - 1], row[a + 1 : b]))
    return out


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equal_to_the_documents_one_by_one(recompute: str, kv_heads: int) -> None:
    settings: dict[str, Any] = {"data": {"document_mask": True}, "memory": {"recompute": recompute}}
    config = small_config(model={"init_std": 0.2, "num_kv_heads": kv_heads}, **settings)
    packed = solo_rank(config)
    batches = micro_batches(packed, tokens(config, 1)[0], starts=documents(config, 1)[0])
    packed.optimizer.start_step()
    loss = packed.runtime.run(packed.plan.schedule_for(len(batches)), batches)

    alone, total = None, torch.zeros((), dtype=torch.float64)
    for inputs, labels in pieces(config):  # a model of exactly this length, so nothing is padded or masked
        rank = solo_rank(small_config(model={"init_std": 0.2, "num_kv_heads": kv_heads}, batch={
            "seq_length": len(inputs), "global_batch_size": 1}, memory={"recompute": recompute}))  # fmt: skip
        rank.optimizer.start_step()
        part = rank.stages[0](None, MicroBatch(inputs, labels))
        part.backward()
        total += part.detach()
        gradients = full_tensors(rank, "main_grad")
        alone = gradients if alone is None else {name: alone[name] + grad for name, grad in gradients.items()}

    assert alone is not None
    assert sum(b.num_counted for b in batches) == sum(len(labels) for _, labels in pieces(config))
    assert abs(float(loss - total)) <= 1e-10 * float(total)
    for name, grad in full_tensors(packed, "main_grad").items():
        assert float((grad - alone[name]).norm() / alone[name].norm()) <= 1e-10, name


@pytest.mark.parametrize(
    "parallel", [{"tp": 2}, {"pp": 2}, {"tp": 2, "sequence_parallel": False}, {}], ids=["tp2 sp", "pp2", "tp2", "dp2"]
)
def test_layouts_agree(parallel: dict[str, Any]) -> None:
    config = small_config(data={"document_mask": True}, parallel=parallel)
    data, starts = tokens(config, 3), documents(config, 3)
    want = curve(train(solo_rank(small_config(data={"document_mask": True})), data, starts=starts))
    for own in on_threads(config, 2, lambda rank: curve(train(rank, data, starts=starts))):
        assert own == pytest.approx(want, rel=1e-12)


def test_evaluation_of_a_last_batch_that_only_some_ranks_can_fill() -> None:
    """Ranks without padding must count tokens together with those that have it."""
    config = small_config()
    data = tokens(config, 1)[0, :4]

    def counted(rank: Worker) -> tuple[Any, int]:
        real = torch.ones(1, config.batch.seq_length, dtype=torch.bool)
        mask = None if rank.groups.dp.rank == 0 else ~real  # two micro-batches each; rank 1 is all padding
        rows = data[rank.groups.dp.rank :: 2]
        batches = [MicroBatch(r[None, :-1].contiguous(), r[None, 1:].contiguous(), mask) for r in rows]
        known = evaluate_step(rank, rank.plan.schedule_for(2, training=False), batches)
        return known.sums, known.tokens

    (a, tokens_a), (b, tokens_b) = on_threads(config, 2, counted)
    assert a == b and tokens_a == tokens_b == 2 * config.batch.seq_length
