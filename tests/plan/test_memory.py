"""Bytes: the closed forms per token and layer, and the persistent state of every layout."""

from __future__ import annotations

from itertools import product

import pytest

from megallama.config.load import load
from megallama.config.schema import Config
from megallama.plan.memory import (
    deferred_bytes,
    loss_chunk,
    rank_memory,
    saved_bytes,
    stage_layout,
    stage_saved_bytes,
    statistics_bytes,
)
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
        layout = stage_layout(plan.config, plan.stages, rank, dp_cp=4)
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
    rows, head = 8 * tokens, 2 * 2 * tokens * h  # of the embedding; input of the head and its gradient
    assert [plan.memory(r).activations for r in range(2)] == [2 * (4 * layer + rows), 1 * (2 * layer + head)]
    assert rank_memory(c, plan.stages, plan.schedule, 1, 1).logits == 256 * 512 * (2 + 4)  # one micro-batch < a chunk
    assert plan.memory(0).logits == 0


def test_what_a_split_backward_puts_off() -> None:
    """The operands of seven weight gradients: x four times; q, k, v and the output's gradient; gate, up and product."""
    c = config("model.preset=llama3-8b", "batch.seq_length=16", "batch.micro_batch_size=1", "parallel.tp=16")
    stages = make_plan(c, 16).stages
    inside = 2 * 4096 // 16 + 2 * 128 + 3 * 14336 // 16  # 16 ranks share 8 key/value heads of 128
    assert deferred_bytes(c, stages, 0) == 32 * 16 * 2 * (4 * 4096 + inside)


def test_what_a_stage_keeps() -> None:
    words = ["model.preset=debug", "parallel.pp=4", "parallel.stage_layers=[1, 2, 1, 0]", "precision.dtype=fp32"]
    plain, masked = config(*words), config(*words, "data.document_mask=true")
    stages, tokens, h, d = make_plan(plain, 4).stages, 256, 64, 16
    layer = saved_bytes(plain) + statistics_bytes(plain)
    head, rows = 2 * tokens * h * 4, 8 * tokens
    assert [stage_saved_bytes(plain, stages, s) for s in range(4)] == [layer + rows, 2 * layer, layer, head]
    angles = tokens * d * 4  # by document, where there are layers
    assert [stage_saved_bytes(masked, stages, s) for s in range(4)] == [
        layer + rows + angles, 2 * layer + angles, layer + angles, head,
    ]  # fmt: skip


def test_full_recomputation_has_one_layer_again() -> None:
    """While the head's input is not needed any more, and the layer's own still is."""
    c = config("model.preset=debug", "memory.recompute=full", "parallel.pp=2")
    partial = config("model.preset=debug", "memory.recompute=selective", "parallel.pp=2")
    plan, tokens, h = make_plan(c, 2), 256, 64
    again = saved_bytes(partial) + statistics_bytes(partial) - saved_bytes(c)
    head = 2 * 2 * tokens * h
    first, last = (stage_saved_bytes(c, plan.stages, s) for s in (0, 1))
    assert last == 2 * saved_bytes(c) + head and again > head
    assert [plan.memory(r).activations for r in (0, 1)] == [2 * first + again, last + again - head]
    empty = config("model.preset=debug", "memory.recompute=full", "parallel.pp=2", "parallel.stage_layers=[4, 0]")
    assert make_plan(empty, 2).memory(1).activations == head  # nothing to compute again


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_a_split_backward_of_several_layers(recompute: str) -> None:
    """ZB-H1 of two ranks and two micro-batches: F F I W I W on the first, F I F I W W on the last.

    An input gradient leaves all operands to be kept; computing layers again, it has put off those of the layers behind.
    """
    words = ["model.preset=debug", "model.num_layers=6", "parallel.pp=2", "parallel.stage_layers=[3, 3]"]
    words += ["parallel.schedule=zb-h1", "batch.global_batch_size=8", f"memory.recompute={recompute}"]
    c = config(*words)
    plan = make_plan(c, 2)
    assert [" ".join(a.kind for a in steps if a.kind.is_compute) for steps in plan.schedule.steps] == [
        "F F I W I W", "F I F I W W",
    ]  # fmt: skip
    put_off, head = deferred_bytes(c, plan.stages, 0), 2 * 2 * 256 * 64
    first, last = (stage_saved_bytes(c, plan.stages, s) for s in (0, 1))
    peaks = [plan.memory(r).activations for r in (0, 1)]
    if recompute == "selective":
        assert peaks == [max(2 * first, first + put_off), max(last + put_off, 2 * put_off)]
        return
    partial = config(*words[:-1], "memory.recompute=selective")
    again = saved_bytes(partial) + statistics_bytes(partial) - saved_bytes(c)
    others = 2 * (put_off // 3 - saved_bytes(c))
    computing = 2 * first + again + others, put_off + last + again + others - head
    assert peaks == [max(computing[0], first + put_off), max(computing[1], 2 * put_off)]


def test_padding_and_chunks_of_the_loss() -> None:
    """tp cuts a vocabulary of 515 into 258 rows; a chunk is no longer than the micro-batch."""
    words = ["model.preset=debug", "model.vocab_size=515", "parallel.tp=2", "memory.loss_chunk_tokens=100"]
    words.append("run.device=cpu")
    assert make_plan(config(*words), 2).memory(0).logits == 100 * 258 * (2 + 4)
    assert make_plan(config(*words, "precision.dtype=fp64"), 2).memory(0).logits == 100 * 258 * (8 + 8)


def test_a_gpu_has_larger_chunks() -> None:
    """As many whole 128 tokens as loss_chunk_mb allows, never fewer than loss_chunk_tokens, at most the micro-batch."""
    words = ["model.preset=llama-7b", "parallel.tp=2", "batch.seq_length=1024", "memory.loss_chunk_tokens=200"]
    words.append("batch.micro_batch_size=1")
    row = 32000 // 2 * 2  # bytes
    for mib, gpu in ((0, 200), (127.9 * row / 2**20, 200), (300 * row / 2**20, 256), (512, 1024)):
        c = config(*words, f"memory.loss_chunk_mb={mib}")
        assert (min(loss_chunk(c), 1024), loss_chunk(c, gpu=False)) == (gpu, 200)
        assert make_plan(c, 2).memory(0).logits == gpu * 16000 * (2 + 4)
        assert loss_chunk(config(*words, f"memory.loss_chunk_mb={mib}", "run.device=cpu")) == 200


def test_tables_of_every_chunk() -> None:
    plan = make_plan(config("model.preset=debug", "parallel.pp=2", "parallel.chunks=2"), 2)
    assert plan.memory(0).tables == 2 * 64 * 16 * 4


def test_buckets_are_as_large_as_asked_for() -> None:
    """bucket_mb counts fp32 gradients."""
    c = config("model.preset=debug", "overlap.bucket_mb=0.0625")  # 16,384 elements: qkv is 12,288, o 4,096
    first, second = stage_layout(c, make_plan(c, 1).stages, 0, 1).buckets[:2]
    assert [p.spec.name for p in first.params] == ["lm_head"]
    assert [p.spec.name for p in second.params] == ["layers.3.down_proj", "layers.3.gate_up_proj"]
