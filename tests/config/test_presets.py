"""The published parameter counts, exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config.load import load
from megallama.config.presets import PRESETS, preset_seq_length
from megallama.config.schema import ModelConfig
from megallama.plan.params import num_parameters

COUNTS = {
    "debug": 250_432,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
}
# dim, n_layers, n_heads, n_kv_heads, multiple_of, ffn_dim_multiplier, norm_eps, rope_theta, use_scaled_rope, vocab_size
# of Meta's params.json (its keys where it has them; the first LLaMA's vocabulary is its tokenizer's)
PUBLISHED = {
    "llama-7b": (4096, 32, 32, None, 256, None, 1e-6, None, False, 32000),
    "llama-13b": (5120, 40, 40, None, 256, None, 1e-6, None, False, 32000),
    "llama-33b": (6656, 60, 52, None, 256, None, 1e-6, None, False, 32000),
    "llama-65b": (8192, 80, 64, None, 256, None, 1e-5, None, False, 32000),
    "llama2-7b": (4096, 32, 32, None, 256, None, 1e-5, None, False, 32000),
    "llama2-13b": (5120, 40, 40, None, 256, None, 1e-5, None, False, 32000),
    "llama2-70b": (8192, 80, 64, 8, 4096, 1.3, 1e-5, None, False, 32000),
    "llama3-8b": (4096, 32, 32, 8, 1024, 1.3, 1e-5, 500000.0, False, 128256),
    "llama3-70b": (8192, 80, 64, 8, 4096, 1.3, 1e-5, 500000.0, False, 128256),
    "llama3.1-8b": (4096, 32, 32, 8, 1024, 1.3, 1e-5, 500000.0, True, 128256),
    "llama3.1-70b": (8192, 80, 64, 8, 4096, 1.3, 1e-5, 500000.0, True, 128256),
    "llama3.1-405b": (16384, 126, 128, 8, 4096, 1.2, 1e-5, 500000.0, True, 128256),
    "llama3.2-1b": (2048, 16, 32, 8, 256, 1.5, 1e-5, 500000.0, True, 128256),
    "llama3.2-3b": (3072, 28, 24, 8, 256, 1.0, 1e-5, 500000.0, True, 128256),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_is_the_published_one(name: str) -> None:
    dim, layers, heads, kv, multiple, multiplier, eps, theta, scaled, vocabulary = PUBLISHED[name]
    model = load(None, [f"model.preset={name}"], need_data=False).model
    width = int(2 * 4 * dim / 3)
    width = int(multiplier * width) if multiplier else width
    assert (model.hidden_size, model.num_layers, model.num_heads, model.vocab_size) == (dim, layers, heads, vocabulary)
    assert (model.num_kv_heads, model.ffn_hidden_size) == (kv or heads, -(-width // multiple) * multiple)
    assert (model.norm_eps, model.rope_theta) == (eps, theta or 10000.0)
    assert (model.rope_scaling is not None) == scaled and model.tie_embeddings == name.startswith("llama3.2")
    assert {*PUBLISHED, "debug"} == {*PRESETS}


def test_what_a_preset_gives_is_not_what_the_user_wrote(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[model]\npreset = "llama-65b"\nrope_theta = 10000.0\n')
    model = load(file, ["model.num_layers=2"], need_data=False).model
    assert (model.norm_eps, model.num_layers) == (1e-5, 2)
    assert {"norm_eps", "hidden_size"}.isdisjoint(model.model_fields_set)
    assert {"preset", "rope_theta", "num_layers"} <= model.model_fields_set


def test_every_preset_is_counted() -> None:
    assert set(COUNTS) == set(PRESETS)


@pytest.mark.parametrize("name", COUNTS)
def test_count(name: str) -> None:
    assert num_parameters(ModelConfig(**PRESETS[name])) == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_preset_loads_and_divides(name: str) -> None:
    config = load(None, [f"model.preset={name}"], ranks=2, need_data=False)
    assert config.batch.seq_length == preset_seq_length(name)
    assert config.model.head_dim is not None and config.model.head_dim % 2 == 0


def test_rope_scaling_of_31_and_32() -> None:
    for name, factor in (("llama3.1-405b", 8.0), ("llama3.2-1b", 32.0)):
        scaling = load(None, [f"model.preset={name}"], need_data=False).model.rope_scaling
        assert scaling is not None
        assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (factor, 1.0, 4.0)
        assert scaling.original_max_position == 8192
    assert load(None, ["model.preset=llama3-8b"], need_data=False).model.rope_scaling is None


def test_sequence_lengths() -> None:
    assert [preset_seq_length(n) for n in ("llama-7b", "llama2-7b", "llama3-8b", "llama3.2-1b", "debug")] == [
        2048, 4096, 8192, 8192, 64
    ]  # fmt: skip
