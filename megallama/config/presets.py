"""The published LLaMA shapes: one row per model; a new LLaMA is a new row.

Sources: LLaMA (Touvron et al. 2023a, table 2), Llama 2 (Touvron et al. 2023b), Llama 3, 3.1 and 3.2 (Dubey et al.
2024), and the params.json published with each.  Those values and exact parameter counts are in the tests.
"""

from typing import Any


def _row(hidden: int, layers: int, heads: int, ffn: int, **rest: Any) -> dict[str, Any]:
    return {"hidden_size": hidden, "num_layers": layers, "num_heads": heads, "ffn_hidden_size": ffn, **rest}


_V1: dict[str, Any] = {"vocab_size": 32000, "norm_eps": 1e-6}
_V2: dict[str, Any] = {"vocab_size": 32000, "norm_eps": 1e-5}
_V3: dict[str, Any] = {"num_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500000.0}
_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192}
_V31 = _V3 | {"rope_scaling": {"factor": 8.0, **_SCALING}}
_V32 = _V3 | {"rope_scaling": {"factor": 32.0, **_SCALING}, "tie_embeddings": True}

PRESETS: dict[str, dict[str, Any]] = {
    "debug": _row(64, 4, 4, 176, num_kv_heads=2, vocab_size=512),
    "llama-7b": _row(4096, 32, 32, 11008, **_V1),
    "llama-13b": _row(5120, 40, 40, 13824, **_V1),
    "llama-33b": _row(6656, 60, 52, 17920, **_V1),
    "llama-65b": _row(8192, 80, 64, 22016, **_V2),  # the one LLaMA 1 with norm_eps 1e-5
    "llama2-7b": _row(4096, 32, 32, 11008, **_V2),
    "llama2-13b": _row(5120, 40, 40, 13824, **_V2),
    "llama2-70b": _row(8192, 80, 64, 28672, num_kv_heads=8, **_V2),
    "llama3-8b": _row(4096, 32, 32, 14336, **_V3),
    "llama3-70b": _row(8192, 80, 64, 28672, **_V3),
    "llama3.1-8b": _row(4096, 32, 32, 14336, **_V31),
    "llama3.1-70b": _row(8192, 80, 64, 28672, **_V31),
    "llama3.1-405b": _row(16384, 126, 128, 53248, **_V31),
    "llama3.2-1b": _row(2048, 16, 32, 8192, **_V32),
    "llama3.2-3b": _row(3072, 28, 24, 8192, **_V32),
}
"""Name -> keyword arguments of `ModelConfig`."""


def preset_seq_length(name: str) -> int:
    """Tokens per sample of the published (main) training run; 64 for `debug`."""
    family = name.partition("-")[0]
    return {"llama": 2048, "llama2": 4096}.get(family, 8192 if name.startswith("llama3") else 64)
