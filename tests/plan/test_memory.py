"""Bytes: the closed forms per token and layer, and the persistent state of every layout."""

from __future__ import annotations

from itertools import product

import pytest

from megallama.config.load import load
from megallama.config.schema import Config
from megallama.plan.memory import rank_memory, saved_bytes, stage_layout, statistics_bytes
from megallama.plan.params import num_parameters
from megallama.plan.plan import make_plan

LLAMA = {  # none 16h+6f, selective 12h+4f, full 2h
    "llama-7b": (131_584, 93_184, 8_192),
    "llama-13b": (164_864, 116_736, 10_240),
    "llama-33b": (214_016, 151_552, 13_312),
    "llama-65b": (263_168, 186_368, 16_384),
}


def config(*overrides: str) -> Config:
    return load(None, overrides, need_data=False)


@pytest.mark.parametrize("name", LLAMA)
@pytest.mark.parametrize("mode,column", [("none", 0), ("selective", 1), ("full", 2)])
def test_per_token_and_layer(name: str, mode: str, column: int) -> None:
    want = LLAMA[name][column]
    tokens = 4 * 2048
    assert saved_bytes(config(f"model.preset={name}", f"memory.recompute={mode}")) == want * tokens
    sharded = config(f"model.preset={name}", f"memory.recompute={mode}", "parallel.tp=4")
    assert saved_bytes(sharded) * 4 == want * tokens
    single = config(f"model.preset={name}", f"memory.recompute={mode}", "precision.dtype=fp32")
    assert saved_bytes(single) == 2 * want * tokens
    h, f = single.model.hidden_size, single.model.ffn_hidden_size
    parts = ["parallel.tp=4", "parallel.sequence_parallel=false"]
    plain = config(f"model.preset={name}", f"memory.recompute={mode}", *parts)
    without = {"none": 8 * h + (8 * h + 6 * f) // 4, "selective": 4 * h + (8 * h + 4 * f) // 4, "full": 2 * h}
    assert saved_bytes(plain) == without[mode] * tokens


def test_grouped_heads() -> None:
    model = ["model.preset=llama3-8b", "batch.seq_length=16", "batch.micro_batch_size=1", "memory.recompute=selective"]
    h, f, kv = 4096, 14336, 1024
    assert saved_bytes(config(*model)) == 16 * 2 * (2 * h + 2 * h + 2 * kv + 2 * f)
    # 16 ranks share 8 kv heads: each holds one whole head
    assert saved_bytes(config(*model, "parallel.tp=16")) == 2 * (2 * h) + 16 * 2 * (2 * h // 16 + 2 * 128 + 2 * f // 16)


def test_row_statistics() -> None:
    tokens, heads = 4 * 2048, 32
    assert statistics_bytes(config("model.preset=llama-7b")) == 4 * tokens * heads
    assert statistics_bytes(config("model.preset=llama-7b", "parallel.tp=2")) == 4 * tokens * heads // 2
    assert statistics_bytes(config("model.preset=llama-7b", "memory.recompute=full")) == 0


@pytest.mark.parametrize("dtype,weight,main", [("bf16", 2, 4), ("fp16", 2, 4), ("fp32", 4, 4), ("fp64", 8, 8)])
def test_persistent_bytes(dtype: str, weight: int, main: int) -> None:
    plan = make_plan(config("model.preset=debug", f"precision.dtype={dtype}", "parallel.pp=2", "parallel.tp=2"), 16)
    for rank, m in enumerate(plan.memory(r) for r in range(2)):
        layout = stage_layout(plan.config, plan.stages, rank, dp=4)
        numel, copies = layout.numel, 3 if weight < main else 2  # fp32 and fp64 weights are their own masters
        assert (m.weights, m.main_grads) == (numel * weight, numel * main)
        assert m.optimizer == numel * copies * main // 4 + 4 * len(layout.buckets)
        assert m.tables == plan.config.batch.seq_length * 16 * main  # cos and sin of 8 pairs at every position
        assert m.persistent == m.weights + m.main_grads + m.optimizer + m.tables
        assert m.total == m.persistent + m.activations + m.logits


def test_all_tensor_ranks_are_alike() -> None:
    for name, tp in (("debug", 4), ("llama3.2-1b", 16)):
        c = config(f"model.preset={name}", f"parallel.tp={tp}", "model.vocab_size=515", "parallel.pp=2")
        stages = make_plan(c, 2 * tp).stages
        for stage in range(2):
            assert len({stage_layout(c, stages, stage, 1, t).numel for t in range(tp)}) == 1


def test_whole_model_is_held_once() -> None:
    """Over all ranks with dp = 1, the elements that are owned are the parameters of the model."""
    for tp, pp, chunks, tied in product((1, 2, 4), (1, 2), (1, 2), ("true", "false")):
        if pp == 1 and chunks == 2:
            continue
        c = config(
            "model.preset=debug", "model.vocab_size=515", f"parallel.tp={tp}", f"parallel.pp={pp}",
            f"parallel.chunks={chunks}", f"model.tie_embeddings={tied}",
        )  # fmt: skip
        stages = make_plan(c, tp * pp).stages
        owned = sum(
            part.box.numel
            for t in range(tp)
            for s in range(len(stages))
            for bucket in stage_layout(c, stages, s, 1, t).buckets
            for placed in bucket.params
            for part in placed.spec.parts
            if part.owner
        )
        assert owned == num_parameters(c.model), (tp, pp, chunks, tied)


def test_activations_follow_the_schedule() -> None:
    c = config("model.preset=debug", "parallel.pp=2", "model.num_layers=6", "parallel.stage_layers=[4, 2]")
    plan = make_plan(c, 2)
    layer, tokens, h = saved_bytes(c) + statistics_bytes(c), 256, c.model.hidden_size
    rows, head = 9 * tokens, 2 * 2 * tokens * h  # of the embedding; input of the head and its gradient
    assert [plan.memory(r).activations for r in range(2)] == [2 * (4 * layer + rows), 1 * (2 * layer + head)]
    assert rank_memory(c, plan.stages, plan.schedule, 1, 1).logits == 256 * 512 * (2 + 4)  # one micro-batch < a chunk
    assert plan.memory(0).logits == 0
