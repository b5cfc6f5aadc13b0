"""Plain PyTorch: a LLaMA of torch's own modules, eager or under torch.compile, alone or in DistributedDataParallel.

bf16 is autocast over fp32 parameters.  What anybody writes in an hour, and what torch.compile makes of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import work
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x [batch, heads, sequence, d]; cos and sin [sequence, d]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Block(nn.Module):
    """One layer."""

    def __init__(self, s: work.Shape) -> None:
        super().__init__()
        self.heads = s.heads
        self.norms = nn.ModuleList(nn.RMSNorm(s.hidden, eps=1e-5) for _ in range(2))
        self.qkv = nn.Linear(s.hidden, 3 * s.hidden, bias=False)
        self.out = nn.Linear(s.hidden, s.hidden, bias=False)
        self.gate_up = nn.Linear(s.hidden, 2 * s.ffn, bias=False)
        self.down = nn.Linear(s.ffn, s.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, hidden))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """The whole model, with its loss."""

    def __init__(self, s: work.Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(s.vocab, s.hidden)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden, eps=1e-5)
        self.head = nn.Linear(s.hidden, s.vocab, bias=False)
        d = s.hidden // s.heads
        angles = torch.outer(torch.arange(s.seq), 10000.0 ** (-torch.arange(0, d, 2) / d)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos.to(x.dtype), self.sin.to(x.dtype))
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), labels.flatten())


def main() -> None:
    job = work.arguments("ab", ("compiled", "eager"))
    model: nn.Module = Llama(job.shape)
    wrapped = DistributedDataParallel(model) if job.layout.dp > 1 else model
    if job.variant == "compiled":
        wrapped = torch.compile(wrapped)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=work.LR, betas=work.BETAS, eps=work.EPS, weight_decay=work.DECAY, fused=True
    )
    tokens, labels = work.batch(job, job.rank)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=job.dtype == "bf16"):
            loss = wrapped(tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), work.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    work.run(job, step)


if __name__ == "__main__":
    main()
