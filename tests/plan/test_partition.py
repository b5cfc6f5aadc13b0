"""Layers over stages."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.load import load
from megallama.plan.work import balanced, head_forward, layer_forward, partition, stage_costs


def counts(*overrides: str) -> list[int]:
    return [len(s) for s in partition(load(None, overrides, need_data=False))]


def test_whole_layers_in_order() -> None:
    config = load(None, ["model.num_layers=10", "parallel.pp=2", "parallel.chunks=2"], need_data=False)
    stages = partition(config)
    assert [i for stage in stages for i in stage] == list(range(10)) and len(stages) == 4


def test_explicit() -> None:
    assert partition(load(None, ["parallel.pp=2", "parallel.stage_layers=[4, 0]"], need_data=False)) == (
        (0, 1, 2, 3), ()
    )  # fmt: skip


def test_llama_sizes() -> None:
    assert counts("model.preset=llama-65b", "parallel.pp=8") == [10] * 8
    assert counts("model.preset=llama-7b", "parallel.pp=8") == [4] * 8
    # 126 layers do not divide by 16; the last stage has the head
    assert counts("model.preset=llama3.1-405b", "parallel.pp=16", "batch.micro_batch_size=1") == [7] + [8] * 14 + [7]
    # the head of a small model with a large vocabulary costs five layers
    assert counts("model.preset=llama3.2-1b", "parallel.pp=4", "batch.micro_batch_size=1") == [5, 5, 5, 1]


def test_small_models_give_the_head_its_share() -> None:
    """The head of these costs 1.2 and 3.3 layers in operations."""
    sizes = "hidden_size={} num_layers={} num_heads={} ffn_hidden_size={} vocab_size={}"
    small, medium = (
        [f"model.{word}" for word in sizes.format(*numbers).split()] + [f"batch.seq_length={seq}"]
        for numbers, seq in (((256, 4, 4, 688, 4096), 256), ((768, 12, 12, 2048, 32000), 512))
    )
    config = load(None, medium, need_data=False)
    ratio = head_forward(config.model) / layer_forward(config.model, 512, causal=True)
    assert ratio == pytest.approx(2 * 768 * 32000 / (2 * (4 * 768**2 + 3 * 768 * 2048) + 2 * 768 * 513), rel=1e-6)
    assert counts(*small, "parallel.pp=2") == [3, 1]
    assert counts(*medium, "parallel.pp=2") == [8, 4]
    assert counts(*medium, "parallel.pp=4") == [4, 4, 4, 0]
    assert counts(*medium, "parallel.pp=2", "parallel.chunks=2") == [4, 4, 4, 0]


def test_fewer_layers_than_stages() -> None:
    assert counts("parallel.pp=4", "parallel.chunks=2") == [0, 0, 0, 1, 1, 1, 1, 0]
    assert counts("model.num_layers=1", "parallel.pp=2") == [1, 0]


def test_recomputation_makes_layers_dearer() -> None:
    assert balanced(13, 2, 3.0, 3.6) == (7, 6)
    assert balanced(13, 2, 4.0, 3.6) == (7, 6)
    assert balanced(7, 2, 3.0, 9.1) == (5, 2) and balanced(7, 2, 4.0, 9.1) == (5, 2)
    assert balanced(8, 2, 3.0, 9.1) == (6, 2) and balanced(8, 2, 4.0, 9.1) == (5, 3)


@given(st.integers(0, 9), st.integers(1, 4), st.floats(0.01, 6))
@settings(max_examples=100, deadline=None)
def test_no_split_is_better(layers: int, stages: int, head: float) -> None:
    def costs(counts: tuple[int, ...]) -> list[float]:
        return sorted((n + head * (i == stages - 1) for i, n in enumerate(counts)), reverse=True)

    split = balanced(layers, stages, 1.0, head)
    assert sum(split) == layers and len(split) == stages
    every = (c for c in product(range(layers + 1), repeat=stages) if sum(c) == layers)
    assert costs(split) == min(map(costs, every))


def test_costs() -> None:
    config = load(None, ["model.preset=llama-7b", "parallel.pp=2", "memory.recompute=full"], need_data=False)
    first, last = stage_costs(config, partition(config))
    layer, head = layer_forward(config.model, 2048, causal=True), head_forward(config.model)
    assert first == (16 * layer, 32 * layer, 16 * layer)
    assert last == (16 * layer + head, 32 * layer + head, 16 * layer + head)
    assert head / (2 * (4 * 4096**2 + 3 * 4096 * 11008)) == pytest.approx(0.65, abs=0.01)
