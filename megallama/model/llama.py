"""LLaMA (Touvron et al. 2023) as pipeline stages, and its initial weights.

Pre-norm RMSNorm, rotary attention, SwiGLU, no biases:

    x = x + o_proj(attention(qkv_proj(norm(x))))
    x = x + down_proj(swiglu(gate_up_proj(norm(x))))

Activations are [T, h]: all tokens of a micro-batch, sample after sample; under sequence parallelism each
tensor-parallel rank holds T/t consecutive rows of the residual stream.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megallama.comm.flight_record import FlightRecord
from megallama.config.schema import Config
from megallama.kernels.attention import Attend, Documents
from megallama.kernels.candidate import accumulate_dtype
from megallama.kernels.pointwise import PointwiseOps, rope_tables
from megallama.kernels.select import Kernels
from megallama.layers.batch import MicroBatch
from megallama.layers.context import ContextParallel
from megallama.layers.linear import ColumnParallelLinear, RMSNorm, RowParallelLinear, TensorParallel
from megallama.layers.param import FlatBuffers, Layer, Param
from megallama.layers.vocab import LossHead, VocabParallelEmbedding
from megallama.plan.box import Box
from megallama.plan.exchange import WHOLE, Share
from megallama.plan.memory import loss_chunk
from megallama.plan.params import heads

BLOCK = 1 << 17  # initial weights made at a time: the temporaries stay in the cache
_MASK32 = 0xFFFFFFFF


@dataclass(eq=False)
class Rotary(Layer):
    """Packed q, k, v [T, (n + 2k) d] of this rank's heads -> rotated q and k, and v: [b, s, heads, d].

    Kept are the tables alone: the gradient is the inverse rotation.  On a GPU in place, unless groups are `apart`.
    """

    num_heads: int
    num_kv_heads: int
    cos: Tensor  # [s, 1, d/2] of the longest samples
    sin: Tensor
    pointwise: PointwiseOps
    apart: bool = False
    share: Share = WHOLE
    _own: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of this rank's tokens, by how many

    def tables(self, documents: Documents | None, length: int | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin) of this rank's tokens, `length` of a sample; by document: [b, length, 1, d/2]."""
        if documents is None and self.share.size > 1:
            length = length or len(self.cos) // self.share.size
            if length not in self._own:
                chunks = self.share.chunks(length * self.share.size)
                cos, sin = (torch.cat([x[a:b] for a, b in chunks]) for x in (self.cos, self.sin))
                self._own = {length: (cos, sin)}  # of one length: others are rare
            return self._own[length]
        if documents is None:
            return self.cos[:length], self.sin[:length]
        return self.cos[documents.positions], self.sin[documents.positions]

    def forward(self, ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.shape = qkv.shape
        ctx.save_for_backward(cos, sin)
        heads, n, k = self._heads(qkv, cos), self.num_heads, self.num_kv_heads
        parts, (b, s, _, d), gpu = heads.split([n, k, k], dim=2), heads.shape, qkv.is_cuda
        if gpu and not (self.apart and n > k):
            rotated = heads[:, :, : n + k]
            self.pointwise.apply_rope(rotated, cos, sin, rotated)
            return parts
        new = tuple(torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts)
        if not gpu:  # products want the rows of a head together
            new = tuple(part.view(b, -1, s, d).transpose(1, 2) for part in new)
        self.pointwise.rotate_parts(parts, cos, sin, new, False)
        return new

    def backward(self, ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        packed = dq.new_empty(ctx.shape)
        parts = self._heads(packed, cos).split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        self.pointwise.rotate_parts((dq, dk, dv), cos, sin, parts, True)
        return packed, None, None

    def _heads(self, qkv: Tensor, cos: Tensor) -> Tensor:
        """A packed tensor as [b, s, n + 2k, d], of samples as long as their angles."""
        heads = self.num_heads + 2 * self.num_kv_heads
        return qkv.view(-1, cos.shape[-3], heads, qkv.shape[1] // heads)


class TransformerLayer:
    """One layer: [T/t, h] or [T, h] in and out, each as two: the residual stream, and what is yet to be added to it.

    The next norm adds them in its own pass.
    """

    def __init__(
        self, params: dict[str, Param], eps: float, tp: TensorParallel, rotary: Rotary, attend: Attend,
        ops: PointwiseOps,
    ) -> None:  # fmt: skip
        before, after = (RMSNorm(params[name], eps, ops) for name in ("input_norm", "post_attention_norm"))
        self.qkv_proj = ColumnParallelLinear(params["qkv_proj"], before, tp)
        self.rotary, self.attend = rotary, attend
        self.o_proj = RowParallelLinear(params["o_proj"], tp, ops, gated=False)
        self.gate_up_proj = ColumnParallelLinear(params["gate_up_proj"], after, tp)
        self.down_proj = RowParallelLinear(params["down_proj"], tp, ops, gated=True)

    def __call__(
        self, x: Tensor, branch: Tensor | None, cos: Tensor, sin: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor]:
        x, qkv = self.qkv_proj(x, branch)
        heads = self.attend(*self.rotary(qkv, cos, sin), documents)
        x, gate_up = self.gate_up_proj(x, self.o_proj(heads.reshape(qkv.shape[0], -1)))
        return x, self.down_proj(gate_up)


class Stage:
    """Consecutive layers, the first with the embedding, the last with norm, head and loss."""

    def __init__(
        self, config: Config, buffers: FlatBuffers, layers: Sequence[int], first: bool, last: bool, tp: TensorParallel,
        kernels: Kernels, context: ContextParallel, record: FlightRecord | None = None,
    ) -> None:  # fmt: skip
        self._numbers, self._record = layers, record or FlightRecord()
        model, ops, params, eps = config.model, kernels.pointwise, buffers.params, config.model.norm_eps
        n, k, d = heads(model)
        local = n // tp.group.size, max(1, k // tp.group.size)  # key/value heads may be shared
        acc_dtype, device = accumulate_dtype(buffers.weights.dtype), buffers.weights.device
        tables = rope_tables(config.batch.seq_length, d, model.rope_theta, model.rope_scaling, acc_dtype, device)
        self.rotary = Rotary(*local, *tables, ops, kernels.apart, context.share)
        attend = context.over(kernels.attention, *local, d)
        self.recompute = config.memory.recompute == "full"
        self.embed = VocabParallelEmbedding(params["embed_tokens"], tp) if first else None
        self.layers = []
        for prefix in (f"layers.{i}." for i in layers):
            own = {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}
            self.layers.append(TransformerLayer(own, eps, tp, self.rotary, attend, ops))
        self.head: LossHead | None = None
        if last:
            weight = params["lm_head"] if "lm_head" in params else params["embed_tokens"]
            norm = RMSNorm(params["norm"], eps, ops)
            chunk = loss_chunk(config, gpu=device.type != "cpu")
            self.head = LossHead(weight, norm, tp, ops, model.vocab_size, chunk)

    def __call__(self, hidden: Tensor | None, batch: MicroBatch) -> Tensor:
        """Hidden states [T/t, h] or [T, h] of the stage before, if any -> its own, or the loss."""
        x = self.embed(batch.tokens.reshape(-1)) if self.embed else hidden
        assert x is not None, "only the first stage makes its own hidden states"
        documents = batch.documents and batch.documents.each(lambda t: t)  # masks live shorter
        again = self.recompute and torch.is_grad_enabled()
        tables = self.rotary.tables(documents, *batch.tokens.shape[1:])  # flat: of the longest
        branch: Tensor | None = None  # yet to be added to x
        for number, layer in zip(self._numbers, self.layers, strict=True):
            self._record.layer(number)
            if again:
                x = _Recompute(layer)(x, *tables, documents)
            else:
                x, branch = layer(x, branch, *tables, documents)
            if (last := x if branch is None else branch).requires_grad:
                last.register_hook(partial(self._record.layer, number))
        if self.head is not None:
            return self.head(x, branch, batch)
        return x if branch is None else x + branch


@dataclass(eq=False)
class _Recompute(Layer):
    """Keep a layer's input only, and run it again for its backward (Chen et al. 2016)."""

    layer: TransformerLayer

    def forward(self, ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None) -> Tensor:
        ctx.documents = documents
        ctx.save_for_backward(x, cos, sin)
        x, branch = self.layer(x, None, cos, sin, documents)
        return x + branch

    def backward(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin = ctx.saved_tensors
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            out = self.layer(leaf, None, cos, sin, ctx.documents)
        torch.autograd.backward(out, (dy, dy))
        return leaf.grad, None, None, None


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words (in int64): the `lowbias32` hash found by Wellons (2018)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def normal_at(index: Tensor, seed: int, name: str) -> Tensor:
    """Standard normal deviates, float64, of elements `index` (int64) of the tensor `name`.

    A function of (seed, name of the Hugging Face tensor, global index), so of no layout:
    two 32-bit words of a counter-based mixing function, and the Box-Muller transform of them.
    """
    k0, k1 = struct.unpack("<2I", hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest())
    low, high = index & _MASK32, index >> 32
    a = _mix(_mix(low ^ k0) ^ _mix(high ^ k1) ^ k1)
    b = _mix(_mix(a ^ low) ^ k0)
    radius = torch.sqrt(-2 * torch.log((a.double() + 0.5) / 2**32))
    return radius * torch.cos(b.double() * (2 * math.pi / 2**32))


def fill(out: Tensor, box: Box, global_shape: tuple[int, ...], seed: int, std: float | None) -> None:
    """Write the initial values of `box` into `out` [box.shape]; std None means ones."""
    if std is None:
        out.fill_(1)
        return
    step = max(1, BLOCK // box.shape[1])
    rows, columns = (torch.arange(a, b, device=out.device) for a, b in zip(box.start, box.stop, strict=True))
    for part, row in zip(out.split(step), rows.split(step), strict=True):
        index = row.unsqueeze(1) * global_shape[1] + columns
        part.copy_(normal_at(index, seed, box.key) * std)
