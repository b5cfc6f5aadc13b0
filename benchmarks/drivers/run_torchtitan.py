"""torchtitan: its Llama 3 model with LLaMA's sizes and rotary frequencies, alone or in DistributedDataParallel.

bf16 is autocast over fp32 parameters (its own mixed precision comes with FSDP2, which needs CUDA here).
Its mixture-of-experts kernels import triton, which a CPU installation has not: a stand-in takes their place.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import MagicMock

sys.modules["torchtitan.distributed.minimal_async_ep.kernels"] = MagicMock()

import torch  # noqa: E402
import work  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torchtitan.models import llama3  # noqa: E402
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402


def settings(s: work.Shape) -> Any:
    """Of the model."""
    config = llama3.Llama3Model.Config(
        dim=s.hidden,
        vocab_size=s.vocab,
        tok_embeddings=Embedding.Config(
            num_embeddings=s.vocab, embedding_dim=s.hidden, param_init=llama3._EMBEDDING_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=s.hidden, param_init=llama3._NORM_INIT),
        lm_head=Linear.Config(
            in_features=s.hidden, out_features=s.vocab, param_init=llama3._output_linear_init(s.hidden)
        ),
        layers=llama3._build_llama3_layers(
            fuse_qkv=True,
            n_layers=s.layers,
            dim=s.hidden,
            n_heads=s.heads,
            hidden_dim=s.ffn,
            rope=ComplexRoPE.Config(dim=s.hidden // s.heads, max_seq_len=s.seq, theta=10000),
            attn_backend="flex",
        ),
    )
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # flex has no backward on CPU
    return config


def build(s: work.Shape) -> Any:
    """The model with its own initial weights."""
    model = settings(s).build()
    model.init_states(buffer_device=torch.device("cpu"))
    return model


def main() -> None:
    job = work.arguments("ab")
    model = build(job.shape)
    wrapped = DistributedDataParallel(model) if job.layout.dp > 1 else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=work.LR, betas=work.BETAS, eps=work.EPS, weight_decay=work.DECAY, fused=True
    )
    tokens, labels = work.batch(job, job.rank)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=job.dtype == "bf16"):
            logits = wrapped(tokens)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), work.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    work.run(job, step)


if __name__ == "__main__":
    main()
