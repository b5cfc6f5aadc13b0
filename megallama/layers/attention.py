"""Causal self-attention on packed projections, with rotary embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function

from megallama.kernels.attention import Attend, Documents
from megallama.kernels.pointwise import ApplyRope


@dataclass(frozen=True)
class Positions:
    """How far the heads of each token are rotated, and which tokens may see each other."""

    cos: Tensor  # [s, 1, d/2], or [b, s, 1, d/2] where positions begin at each document
    sin: Tensor
    documents: Documents | None = None


@dataclass(eq=False)
class RotaryAttention:
    """From [T, (n + 2k) d] packed q, k, v of this rank's heads to what `attend` takes."""

    num_heads: int
    num_kv_heads: int
    cos: Tensor  # [s, 1, d/2]
    sin: Tensor
    attend: Attend  # q [b, s, n, d], k and v [b, s, k, d] -> [b, s, n, d], causally
    apply_rope: ApplyRope

    def positions(self, documents: Documents | None) -> Positions:
        """Positions 0 .. s-1 in every sample, or in every document."""
        if documents is None:
            return Positions(self.cos, self.sin)
        return Positions(self.cos[documents.positions], self.sin[documents.positions], documents)

    def heads(self, qkv: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, values [b, s, heads, d] of `qkv`, which may be overwritten."""
        queries, keys, values = _RopeSplit.apply(qkv, self, positions)
        return queries, keys, values

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Views [b, s, heads, d] of the three parts of a packed tensor."""
        n, k = self.num_heads, self.num_kv_heads
        return qkv.view(-1, len(self.cos), n + 2 * k, qkv.shape[1] // (n + 2 * k)).split([n, k, k], dim=2)


class _RopeSplit(Function):
    """Keeps the tables alone: the gradient of a rotation is the inverse rotation.

    On a GPU the packed output of qkv_proj is rotated in place (its layer does not need its own output),
    and attention reads its parts where they are.  On a CPU, where products over heads want each head's
    rows together, the rotated queries and keys and the values are written head by head instead; the
    packed tensor is freed.  The gradients of the three parts are written into one packed tensor.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layer: RotaryAttention, positions: Positions) -> tuple[Tensor, ...]:
        ctx.layer, ctx.shape = layer, qkv.shape
        ctx.save_for_backward(positions.cos, positions.sin)
        q, k, v = new_q, new_k, new_v = layer.split(qkv)
        if not qkv.is_cuda:
            new_q, new_k, new_v = (_head_by_head(part) for part in (q, k, v))
            new_v.copy_(v)
        layer.apply_rope(q, positions.cos, positions.sin, new_q)
        layer.apply_rope(k, positions.cos, positions.sin, new_k)
        return new_q, new_k, new_v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        packed = grads[0].new_empty(ctx.shape)
        q, k, v = ctx.layer.split(packed)
        ctx.layer.apply_rope(grads[0], cos, -sin, q)
        ctx.layer.apply_rope(grads[1], cos, -sin, k)
        v.copy_(grads[2])
        return packed, None, None


def _head_by_head(part: Tensor) -> Tensor:
    """Uninitialised [b, s, heads, d] like `part`, in which the rows of a head lie together."""
    b, s, heads, d = part.shape
    return part.new_empty(b, heads, s, d).transpose(1, 2)
