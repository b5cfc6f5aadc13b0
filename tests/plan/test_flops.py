"""Operations per token against the closed forms: 3 (2P + attention), and published figures in GFLOP."""

from __future__ import annotations

import pytest

from megallama.config.presets import PRESETS
from megallama.config.schema import ModelConfig
from megallama.plan.params import num_parameters
from megallama.plan.work import head_forward, layer_forward, training_flops


@pytest.mark.parametrize(
    "name,matmul,six,full,causal",
    [
        ("llama-7b", 6_607_077_376, 40.430, 42.864, 41.254),
        ("llama-13b", 12_851_609_600, 78.095, 82.143, 79.627),
        ("llama-33b", 32_315_146_240, 195.174, 203.706, 198.801),
        ("llama-65b", 65_022_197_760, 391.714, 406.239, 398.190),
    ],
)
def test_llama_at_2048(name: str, matmul: int, six: float, full: float, causal: float) -> None:
    model = ModelConfig(**PRESETS[name])
    layers, h, s = model.num_layers, model.hidden_size, 2048
    assert training_flops(model, s, causal=False) == 3 * (2 * matmul + 4 * layers * s * h)
    assert training_flops(model, s, causal=True) == 3 * (2 * matmul + 2 * layers * h * (s + 1))
    assert round(6 * num_parameters(model) / 1e9, 3) == six  # the rule of thumb 6N (Kaplan et al. 2020)
    assert round(training_flops(model, s, causal=False) / 1e9, 3) == full
    assert round(training_flops(model, s, causal=True) / 1e9, 3) == causal


def test_parts_by_hand() -> None:
    model = ModelConfig(
        hidden_size=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, ffn_hidden_size=10, vocab_size=20
    )
    # q and o: 8 x 24; k and v: 8 x 12; three of 8 x 10
    assert layer_forward(model, 5, causal=False) == 2 * (2 * 8 * 24 + 2 * 8 * 12 + 3 * 8 * 10) + 4 * 24 * 5
    assert layer_forward(model, 5, causal=True) == 2 * (2 * 8 * 24 + 2 * 8 * 12 + 3 * 8 * 10) + 2 * 24 * 6
    assert head_forward(model) == 2 * 8 * 20
    assert training_flops(model, 5, causal=True) == 3 * (3 * layer_forward(model, 5, causal=True) + 320)


def test_causal_counts_the_pairs_the_mask_leaves() -> None:
    model = ModelConfig(**PRESETS["debug"])
    s, width = 64, 64
    pairs = s * (s + 1) // 2
    attention = layer_forward(model, s, causal=True) - layer_forward(model, 0, causal=False)
    assert attention * s == 4 * width * pairs  # two products of a multiply-add per pair and channel
