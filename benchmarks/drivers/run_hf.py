"""Hugging Face transformers: `LlamaForCausalLM`, alone or in DistributedDataParallel over gloo.

bf16 is autocast over fp32 parameters. Variants: torch's SDPA, or the library's own explicit attention.
"""

from __future__ import annotations

import torch
import work
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    job = work.arguments("ab", ("sdpa", "eager"))
    s = job.shape
    config = LlamaConfig(
        vocab_size=s.vocab,
        hidden_size=s.hidden,
        intermediate_size=s.ffn,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        max_position_embeddings=s.seq,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation=job.variant,
    )
    model = LlamaForCausalLM(config)
    assert next(model.parameters()).dtype == torch.float32
    wrapped = DistributedDataParallel(model) if job.layout.dp > 1 else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=work.LR, betas=work.BETAS, eps=work.EPS, weight_decay=work.DECAY, fused=True
    )
    tokens, _ = work.batch(job, job.rank)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=job.dtype == "bf16"):
            loss = wrapped(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), work.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    work.run(job, step)


if __name__ == "__main__":
    main()
