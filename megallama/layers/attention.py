"""Causal self-attention on packed projections, with rotary embeddings applied in place.

The packed output of qkv_proj is turned in place (its layer does not need its own output), and the
gradient of the three parts is written into one packed tensor, so nothing is copied on the way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from megallama.kernels.attention import Attend
from megallama.kernels.rope import rotate_


class RotaryAttention:
    """[T, (n + 2k) d] packed q, k, v of this rank's heads -> [T, n d].

    `attend` maps q [b, s, n, d], k and v [b, s, k, d] to [b, s, n, d], causally.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, cos: Tensor, sin: Tensor, attend: Attend) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.cos = cos  # [s, 1, d/2]
        self.sin = sin
        self._attend = attend

    def __call__(self, qkv: Tensor) -> Tensor:
        q, k, v = _RotateSplit.apply(qkv, self)
        out = self._attend(q, k, v)
        return out.reshape(qkv.shape[0], -1)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views [b, s, heads, d] of the three parts of a packed tensor."""
        q, k, v = self._heads(qkv).split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        return q, k, v

    def turning(self, qkv: Tensor) -> Tensor:
        """The view [b, s, n + k, d] of queries and keys, which are turned by their positions."""
        return self._heads(qkv)[:, :, : self.num_heads + self.num_kv_heads]

    def _heads(self, qkv: Tensor) -> Tensor:
        heads = self.num_heads + 2 * self.num_kv_heads
        return qkv.view(-1, self.cos.shape[0], heads, qkv.shape[1] // heads)


class _RotateSplit(Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layer: RotaryAttention) -> tuple[Tensor, Tensor, Tensor]:
        ctx.layer, ctx.shape = layer, qkv.shape
        rotate_(layer.turning(qkv), layer.cos, layer.sin)
        return layer.split(qkv)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        layer: RotaryAttention = ctx.layer
        packed = grads[0].new_empty(ctx.shape)
        for part, grad in zip(layer.split(packed), grads, strict=True):
            part.copy_(grad)
        rotate_(layer.turning(packed), layer.cos, -layer.sin)
        return packed, None
