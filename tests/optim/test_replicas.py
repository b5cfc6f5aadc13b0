"""Bits that change in one copy of the weights are found, and the rank that holds them is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megallama.layers.param import digest
from megallama.optim.update import wrong_copies
from megallama.plan.params import global_shapes
from megallama.train.assemble import Worker
from tests.small import MODEL, on_threads, small_config, tokens, train

BITS = {"bf16": torch.int16, "fp16": torch.int16, "fp32": torch.int32, "fp64": torch.int64}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "dp4": (4, {}),
    "cp2 dp2": (4, {"cp": 2}),
    "tp2": (2, {"tp": 2}),
    "tp4 kv2": (4, {"tp": 4, "sequence_parallel": False}),
    "pp2 tied": (2, {"pp": 2}),
    "zb-v tied": (2, {"pp": 2, "chunks": 2, "schedule": "zb-v"}),
}


def config_of(layout: str, dtype: str) -> Any:
    model = {**MODEL, "tie_embeddings": "tied" in layout, "num_kv_heads": 2 if "kv2" in layout else None}
    return small_config(model=model, parallel=LAYOUTS[layout][1], precision={"dtype": dtype}, optimizer={"lr": 1e-3})


def flip(tensor: torch.Tensor, bit: int = 3) -> None:
    """One bit of one element."""
    words = tensor.view(BITS[{2: "bf16", 4: "fp32", 8: "fp64"}[tensor.element_size()]])
    words ^= torch.ones_like(words) << bit


def found(layout: str, dtype: str, plant: Callable[[Worker], object], steps: int = 2) -> list[tuple[str, list[int]]]:
    """What the check says after a few steps and `plant`; the same on all ranks."""
    config = config_of(layout, dtype)

    def work(rank: Worker) -> list[tuple[str, list[int]]]:
        train(rank, tokens(config, steps))
        rank.optimizer.wait()
        plant(rank)
        return wrong_copies(rank.optimizer, rank.groups)

    first, *others = on_threads(config, LAYOUTS[layout][0], work)
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize(
    ("layout", "dtype"), [*((layout, "bf16") for layout in LAYOUTS), *(("dp2", dtype) for dtype in BITS)]
)
def test_nothing_is_found_where_nothing_is_wrong(layout: str, dtype: str) -> None:
    assert found(layout, dtype, lambda rank: None) == []


def weight_of(rank: Worker, name: str, element: int) -> torch.Tensor:
    (weight,) = (s.params[name].data for s in rank.buffers.values() if name in s.params)
    return weight.view(-1)[element : element + 1]


def on(number: int, work: Callable[[Worker], object]) -> Callable[[Worker], object]:
    return lambda rank: work(rank) if rank.groups.rank == number else None


@pytest.mark.parametrize(("layout", "wrong"), [("dp2", 0), ("dp2", 1), ("dp4", 2), ("cp2 dp2", 3), ("one", 0)])
def test_a_bit_of_a_weight_names_the_rank(layout: str, wrong: int) -> None:
    element = 32 * 32 - 1 - wrong
    name, key = "layers.1.o_proj", "model.layers.1.self_attn.o_proj.weight"
    plant = on(wrong, lambda rank: flip(weight_of(rank, name, element)))
    assert found(layout, "bf16", plant) == [(key, [wrong])]
    if layout != "one":  # where the weights are their own masters, of two nobody knows which is right
        assert found(layout, "fp32", plant) == [(key, [0, 1] if layout == "dp2" else [wrong])]


@pytest.mark.parametrize(("layout", "wrong"), [("dp2", 1), ("dp4", 3), ("one", 0)])
def test_a_bit_of_a_master_names_its_owner(layout: str, wrong: int) -> None:
    def plant(rank: Worker) -> None:
        flip(next(master for _, bucket, master in rank.optimizer.masters() if bucket.decay)[:1], 30)

    ((key, ranks),) = found(layout, "bf16", on(wrong, plant))
    assert ranks == [wrong] and key in global_shapes(config_of(layout, "bf16").model)


def plant_in_masters(name: str) -> Callable[[Worker], object]:
    """The lowest bit of the masters of one parameter: so small that the bf16 weights stay as they are."""

    def plant(rank: Worker) -> None:
        for sync, bucket, master in rank.optimizer.masters():
            at = [p.offset - sync.range_of(bucket)[0] for p in bucket.params if p.spec.name == name]
            for place in at if bucket.start <= sync.range_of(bucket)[0] else ():
                flip(master[place : place + 1], 0)

    return plant


@pytest.mark.parametrize("dtype", ["bf16", "fp64"])
def test_norms_over_tp_name_both_of_two(dtype: str) -> None:
    plant = on(1, plant_in_masters("layers.2.input_norm"))
    assert found("tp2", dtype, plant) == [("model.layers.2.input_layernorm.weight", [0, 1])]


def test_norms_over_more_ranks_name_the_odd_one() -> None:
    plant = on(2, plant_in_masters("layers.2.input_norm"))
    assert found("tp4 kv2", "bf16", plant) == [("model.layers.2.input_layernorm.weight", [2])]


def test_shared_heads_are_compared_over_the_ranks_that_share_them() -> None:
    def plant(rank: Worker) -> None:
        for sync, bucket, master in rank.optimizer.masters():
            for segment in sync.segments(bucket):
                if segment.part.box.key == "model.layers.0.self_attn.v_proj.weight":
                    flip(master[segment.offset - sync.range_of(bucket)[0] :][:1], 0)

    assert found("tp4 kv2", "bf16", on(3, plant)) == [("model.layers.0.self_attn.v_proj.weight", [2, 3])]


def test_the_two_copies_of_a_tied_embedding() -> None:
    plant = plant_in_masters("lm_head")
    assert found("pp2 tied", "bf16", on(1, plant)) == [("model.embed_tokens.weight", [0, 1])]
    assert found("zb-v tied", "bf16", on(0, plant)) == [("model.embed_tokens.weight", [0])]


@pytest.mark.parametrize("kind", BITS.values())
def test_a_digest_knows_every_bit_and_place(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-(2**15), 2**15, (5000,), generator=generator).to(kind)
    right, seen = int(digest(x)), []
    for element in (0, 5, 1023, 4997, 4999):
        for bit in range(x.element_size() * 8):
            other = x.clone()
            flip(other[element : element + 1], bit)
            seen.append(int(digest(other)))
    assert right not in seen and len(seen) == 5 * x.element_size() * 8
    assert len(set(seen)) > 0.9 * len(seen), "but for the highest bits of words"
    moved = torch.cat([x[1:], x[:1]])
    assert digest(moved) != digest(x) and digest(moved[-1:]) == digest(x[:1]) != digest(x[1:2])


def test_a_digest_does_not_depend_on_where_the_elements_lie() -> None:
    x = torch.randn(1_500_001)
    shifted = torch.cat([x.new_zeros(1), x])[1:]
    assert digest(shifted) == digest(x)
    assert digest(x, torch.bfloat16) == digest(x.bfloat16()) != digest(x)
    assert digest(torch.cat([x[1 << 20 :], x[: 1 << 20]])) != digest(x) and digest(x[:0]) == 0
