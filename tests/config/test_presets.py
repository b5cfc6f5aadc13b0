"""The published parameter counts, exactly."""

from __future__ import annotations

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
