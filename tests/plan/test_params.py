"""Which parameters a rank holds: every element of the model owned once, copies where they must be."""

from __future__ import annotations

from itertools import product
from math import prod, sqrt

import numpy as np
import pytest

from megallama.config.schema import ModelConfig
from megallama.plan.params import ParamBuilder, ParamSpec, global_shapes, heads, init_std, num_parameters

MODEL = ModelConfig(
    hidden_size=16, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=4, ffn_hidden_size=24, vocab_size=21
)
TIED = MODEL.model_copy(update={"tie_embeddings": True})


def specs(model: ModelConfig, tp: int, tp_rank: int, stages: int = 1, sp: bool = False) -> list[ParamSpec]:
    """All parameters of one tensor-parallel rank, over all stages of one layer or more."""
    builder = ParamBuilder(model, tp, tp_rank, sp)
    cuts = [range(s * 3 // stages, (s + 1) * 3 // stages) for s in range(stages)]
    return [p for s, layers in enumerate(cuts) for p in builder.stage(list(layers), s == 0, s == stages - 1)]


@pytest.mark.parametrize("model,tp,stages", [(m, t, s) for m, t, s in product((MODEL, TIED), (1, 2, 4, 8), (1, 3))])
def test_every_element_is_owned_once(model: ModelConfig, tp: int, stages: int) -> None:
    held = {key: np.zeros(shape, int) for key, shape in global_shapes(model).items()}
    owned = {key: np.zeros(shape, int) for key, shape in global_shapes(model).items()}
    for rank in range(tp):
        for spec in specs(model, tp, rank, stages):
            for part in spec.parts:
                where = tuple(map(slice, part.box.start, part.box.stop))
                assert part.row + part.box.shape[0] <= spec.shape[0]
                held[part.box.key][where] += 1
                owned[part.box.key][where] += part.owner
    assert all((count == 1).all() for count in owned.values())
    assert sum(count.sum() for count in owned.values()) == num_parameters(model)
    copies = max(1, tp // 2)  # of the two kv heads
    for key, count in held.items():
        want = {"norm": tp, "k_pro": copies, "v_pro": copies}.get(key.split(".")[-2][-9:][:5], 1)
        want = tp if "norm" in key else want
        want = 2 if key == "model.embed_tokens.weight" and model.tie_embeddings and stages > 1 else want
        assert (count == want).all(), key


def test_the_tensors_of_the_whole_model() -> None:
    """Hugging Face's names and shapes, written out."""
    layers = [
        (f"model.layers.{i}.{name}.weight", shape)
        for i in range(3)
        for name, shape in (
            ("input_layernorm", (16,)), ("self_attn.q_proj", (32, 16)), ("self_attn.k_proj", (8, 16)),
            ("self_attn.v_proj", (8, 16)), ("self_attn.o_proj", (16, 32)), ("post_attention_layernorm", (16,)),
            ("mlp.gate_proj", (24, 16)), ("mlp.up_proj", (24, 16)), ("mlp.down_proj", (16, 24)),
        )
    ]  # fmt: skip
    whole = [("model.embed_tokens.weight", (21, 16)), *layers, ("model.norm.weight", (16,))]
    assert list(global_shapes(TIED).items()) == whole
    assert list(global_shapes(MODEL).items()) == [*whole, ("lm_head.weight", (21, 16))]


def test_shapes_and_order() -> None:
    names = {s.name: s for s in specs(MODEL, 2, 1)}
    assert list(names)[:7] == [
        "embed_tokens", "layers.0.input_norm", "layers.0.qkv_proj", "layers.0.o_proj",
        "layers.0.post_attention_norm", "layers.0.gate_up_proj", "layers.0.down_proj",
    ]  # fmt: skip
    assert list(names)[-2:] == ["norm", "lm_head"]
    assert names["embed_tokens"].shape == (11, 16)  # 21 rows over two ranks
    assert names["layers.0.qkv_proj"].shape == ((4 + 1 + 1) * 4, 16)
    assert names["layers.0.o_proj"].shape == (16, 16)
    assert names["layers.0.gate_up_proj"].shape == (24, 16)
    assert names["layers.0.down_proj"].shape == (16, 12)
    q, k, v = names["layers.0.qkv_proj"].parts
    assert (q.row, k.row, v.row) == (0, 16, 20)
    assert (k.box.start, k.box.stop) == ((4, 0), (8, 16))
    gate, up = names["layers.0.gate_up_proj"].parts
    assert (gate.row, up.row, up.box.start, up.box.key) == (0, 12, (12, 0), "model.layers.0.mlp.up_proj.weight")


def test_decay_and_initial_values() -> None:
    for spec in specs(MODEL, 1, 0):
        assert spec.decay == ("norm" not in spec.name)
    small = 0.02 / sqrt(6)
    assert init_std(MODEL, "model.layers.0.self_attn.o_proj.weight") == small
    assert init_std(MODEL, "model.layers.0.mlp.down_proj.weight") == small
    assert init_std(MODEL, "model.layers.0.mlp.up_proj.weight") == 0.02
    assert init_std(MODEL, "model.norm.weight") is None


def test_who_sums_gradients() -> None:
    def over(tp: int, sp: bool) -> dict[str, set[str]]:
        out: dict[str, set[str]] = {}
        for spec in specs(MODEL, tp, 0, sp=sp):
            for part in spec.parts:
                out.setdefault(part.box.key.split(".")[-2], set()).add(part.sum_over)
        return out

    assert set.union(*over(2, sp=False).values()) == {"none"}
    sharded = over(2, sp=True)
    assert {k for k, v in sharded.items() if v == {"tp"}} == {"input_layernorm", "post_attention_layernorm", "norm"}
    many = over(4, sp=False)
    assert {k for k, v in many.items() if v == {"kv"}} == {"k_proj", "v_proj"}


def test_tied_embeddings() -> None:
    one = specs(TIED, 1, 0)
    assert [s.name for s in one if s.tied] == [] and "lm_head" not in [s.name for s in one]
    three = [s for s in specs(TIED, 1, 0, stages=3) if s.tied]
    assert [(s.name, s.parts[0].box.key, s.parts[0].owner) for s in three] == [
        ("embed_tokens", "model.embed_tokens.weight", True), ("lm_head", "model.embed_tokens.weight", False)
    ]  # fmt: skip


def test_vocabulary_smaller_than_tp() -> None:
    tiny = MODEL.model_copy(update={"vocab_size": 5})
    rows = [[p.box.shape[0] for s in specs(tiny, 4, r) if s.name == "embed_tokens" for p in s.parts] for r in range(4)]
    assert rows == [[2], [2], [1], []]


def test_sizes() -> None:
    assert heads(ModelConfig(hidden_size=64, num_heads=4)) == (4, 4, 16)
    assert heads(MODEL) == (8, 2, 4)
    spec = specs(MODEL, 1, 0)[0]
    assert spec.numel == prod(spec.shape) == 21 * 16
