"""Rotary embeddings of the packed projections, and their split into the heads that attention takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megallama.kernels.attention import Documents
from megallama.kernels.pointwise import ApplyRope
from megallama.layers.param import Layer


@dataclass(frozen=True)
class Positions:
    """How far the heads of each token are rotated, and which tokens may see each other."""

    cos: Tensor  # [s, 1, d/2], or [b, s, 1, d/2] where positions begin at each document
    sin: Tensor
    documents: Documents | None = None


@dataclass(eq=False)
class Rotary(Layer):
    """From [T, (n + 2k) d], packed q, k, v of this rank's heads, to rotated q and k, and v: [b, s, heads, d].

    Kept are the tables alone: the gradient of a rotation is the inverse rotation.

    On a GPU the packed tensor is rotated in place (the layer that made it does not need it), and
    attention reads its parts where they are.  On a CPU, where products over heads want each head's rows
    together, queries, keys and values are written head by head instead; the packed tensor is freed.
    The gradients of the three parts are written into one packed tensor.
    """

    num_heads: int
    num_kv_heads: int
    cos: Tensor  # [s, 1, d/2]
    sin: Tensor
    apply_rope: ApplyRope

    def positions(self, documents: Documents | None) -> Positions:
        """Positions 0 .. s-1 in every sample, or in every document."""
        if documents is None:
            return Positions(self.cos, self.sin)
        return Positions(self.cos[documents.positions], self.sin[documents.positions], documents)

    def forward(self, ctx: Any, qkv: Tensor, positions: Positions) -> tuple[Tensor, ...]:
        ctx.shape = qkv.shape
        ctx.save_for_backward(positions.cos, positions.sin)
        q, k, v = new_q, new_k, new_v = self._split(qkv)
        if not qkv.is_cuda:
            new_q, new_k, new_v = (_head_by_head(part) for part in (q, k, v))
            new_v.copy_(v)
        self.apply_rope(q, positions.cos, positions.sin, new_q)
        self.apply_rope(k, positions.cos, positions.sin, new_k)
        return new_q, new_k, new_v

    def backward(self, ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None]:
        cos, sin = ctx.saved_tensors
        packed = dq.new_empty(ctx.shape)
        q, k, v = self._split(packed)
        self.apply_rope(dq, cos, -sin, q)
        self.apply_rope(dk, cos, -sin, k)
        v.copy_(dv)
        return packed, None

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Views [b, s, heads, d] of the three parts of a packed tensor."""
        n, k = self.num_heads, self.num_kv_heads
        heads = qkv.view(-1, len(self.cos), n + 2 * k, qkv.shape[1] // (n + 2 * k))
        return heads.split([n, k, k], dim=2)


def _head_by_head(part: Tensor) -> Tensor:
    """Uninitialised [b, s, heads, d] like `part`, in which the rows of a head lie together."""
    b, s, heads, d = part.shape
    return part.new_empty(b, heads, s, d).transpose(1, 2)
