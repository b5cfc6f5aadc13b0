"""Hugging Face's LLaMA with our weights; in float64 its own float32 casts are lifted to float64 too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, modeling_rope_utils
from transformers.models.llama import modeling_llama

from megallama.config.schema import Config
from megallama.train.assemble import DTYPES, Worker


class _Lifted(ModuleType):
    """torch, except that float32 means float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def lifted(dtype: torch.dtype) -> Iterator[None]:
    """Within the block the reference's modules compute in float64 where they ask for float32."""
    modules = (modeling_llama, modeling_rope_utils)
    try:
        if dtype == torch.float64:
            for module in modules:
                module.torch = _Lifted("torch")
        yield
    finally:
        for module in modules:
            module.torch = torch


def full_tensors(rank: Worker, what: str) -> dict[str, torch.Tensor]:
    """Weights ("data") or gradients ("main_grad") of a one-rank job by their Hugging Face names."""
    out = {}
    for buffers in rank.buffers.values():
        for param in buffers.params.values():
            for part in param.spec.parts:
                rows = slice(part.row, part.row + part.box.shape[0])
                out[part.box.key] = getattr(param, what)[rows].clone()
    return out


def reference_model(config: Config, weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """The independent implementation, with eager attention."""
    model, dtype = config.model, DTYPES[config.precision.dtype]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        scaling = model.rope_scaling
        rope |= {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    with lifted(dtype):
        reference = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=model.hidden_size,
                num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_heads,
                num_key_value_heads=model.num_kv_heads,
                head_dim=model.head_dim,
                intermediate_size=model.ffn_hidden_size,
                vocab_size=model.vocab_size,
                rms_norm_eps=model.norm_eps,
                rope_parameters=rope,
                tie_word_embeddings=model.tie_embeddings,
                max_position_embeddings=512,
                attn_implementation="eager",
            )
        )
    frequencies = reference.model.rotary_emb.inv_freq
    reference = reference.to(dtype)
    reference.model.rotary_emb.inv_freq = frequencies
    problems = reference.load_state_dict(weights, strict=False)
    assert not problems.unexpected_keys
    assert problems.missing_keys in ([], ["lm_head.weight"]), problems
    return reference
