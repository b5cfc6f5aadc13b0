"""Floating-point operations of the model, counted per token.

A multiply-add is two operations.  Only matrix products count; the embedding is a look-up.  Attention is counted
either in full (every query with every key, the convention of Korthikanti et al. 2022, arXiv:2205.05198) or causally
(what the mask leaves, and what the kernels do).  A training step costs three forwards; recomputation is not counted.
"""

from __future__ import annotations

from megallama.config.schema import ModelConfig
from megallama.plan.params import heads


def layer_forward(model: ModelConfig, seq_length: int, *, causal: bool) -> int:
    """Forward operations of one layer per token: the seven matrices and attention."""
    h, (n, k, d) = model.hidden_size, heads(model)
    matrices = h * (2 * n * d + 2 * k * d + 3 * model.ffn_hidden_size)
    attention = 2 * n * d * (seq_length + 1) if causal else 4 * n * d * seq_length
    return 2 * matrices + attention


def head_forward(model: ModelConfig) -> int:
    """Forward operations of the output head per token."""
    return 2 * model.vocab_size * model.hidden_size


def training_flops(model: ModelConfig, seq_length: int, *, causal: bool) -> int:
    """Operations of forward and backward per token: the numerator of MFU."""
    return 3 * (model.num_layers * layer_forward(model, seq_length, causal=causal) + head_forward(model))
