"""litgpt: its `GPT` with LLaMA's settings under Lightning Fabric, alone or with DDP over gloo.

Variants: bf16-mixed (autocast over fp32 parameters), or bf16-true (bf16 parameters and Adam, no fp32 master).
"""

from __future__ import annotations

import torch
import work
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy


def main() -> None:
    job = work.arguments("ab", ("mixed", "true"))
    s = job.shape
    precision = "32-true" if job.dtype == "fp32" else f"bf16-{job.variant}"
    strategy = DDPStrategy(process_group_backend="gloo") if job.layout.dp > 1 else "auto"
    plugins = [TorchElasticEnvironment()] if job.layout.dp > 1 else []
    fabric = Fabric(accelerator="cpu", devices=job.layout.dp, strategy=strategy, precision=precision, plugins=plugins)
    fabric.launch()
    torch.set_num_threads(job.layout.threads)
    config = Config(
        block_size=s.seq,
        n_layer=s.layers,
        n_embd=s.hidden,
        n_head=s.heads,
        vocab_size=s.vocab,
        padded_vocab_size=s.vocab,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=s.ffn,
    )
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    model.apply(model._init_weights)
    model = fabric.setup(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=work.LR, betas=work.BETAS, eps=work.EPS, weight_decay=work.DECAY, fused=True
    )
    optimizer = fabric.setup_optimizers(optimizer)
    tokens, labels = work.batch(job, job.rank)

    def step() -> float:
        logits = model(tokens)
        loss = chunked_cross_entropy(logits, labels, chunk_size=0)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=work.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    work.run(job, step)


if __name__ == "__main__":
    main()
