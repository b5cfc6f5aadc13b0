"""LLaMA (Touvron et al. 2023) as pipeline stages: pre-norm RMSNorm, rotary attention, SwiGLU, no biases.

    x = x + o_proj(attention(qkv_proj(norm(x))))
    x = x + down_proj(swiglu(gate_up_proj(norm(x))))

A `Stage` is a run of consecutive layers, the first with the embedding before it, the last with final
norm, head and loss behind it.  Activations are [T, h]: all tokens of a micro-batch, sample after
sample; under sequence parallelism each tensor-parallel rank holds T/t consecutive rows of the
residual stream.  Nothing here asks how many ranks there are: groups of one rank do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megallama.config.schema import Config
from megallama.kernels.candidate import accumulate_dtype
from megallama.kernels.pointwise import PointwiseOps, rope_tables
from megallama.kernels.select import Kernels
from megallama.layers.attention import Positions, RotaryAttention
from megallama.layers.batch import MicroBatch
from megallama.layers.embedding import VocabParallelEmbedding
from megallama.layers.linear import ColumnParallelLinear, RowParallelLinear, TensorParallel
from megallama.layers.loss import LossHead
from megallama.layers.norm import RMSNorm
from megallama.layers.param import FlatBuffers, Param
from megallama.plan.params import heads


class TransformerLayer:
    """One layer: [T/t, h] or [T, h] in and out."""

    def __init__(
        self, params: Mapping[str, Param], prefix: str, eps: float, tp: TensorParallel, attention: RotaryAttention,
        pointwise: PointwiseOps,
    ):  # fmt: skip
        def norm(name: str) -> RMSNorm:
            return RMSNorm(params[prefix + name], eps, pointwise)

        self.qkv_proj = ColumnParallelLinear(params[prefix + "qkv_proj"], norm("input_norm"), tp)
        self.attention = attention
        self.o_proj = RowParallelLinear(params[prefix + "o_proj"], tp, pointwise, gated=False)
        self.gate_up_proj = ColumnParallelLinear(params[prefix + "gate_up_proj"], norm("post_attention_norm"), tp)
        self.down_proj = RowParallelLinear(params[prefix + "down_proj"], tp, pointwise, gated=True)

    def __call__(self, x: Tensor, positions: Positions) -> Tensor:
        qkv = self.qkv_proj(x)
        heads = self.attention.attend(*self.attention.heads(qkv, positions), positions.documents)
        x = x + self.o_proj(heads.reshape(qkv.shape[0], -1))
        return x + self.down_proj(self.gate_up_proj(x))


class Stage:
    """Consecutive layers of the model, on one rank."""

    def __init__(
        self,
        config: Config,
        buffers: FlatBuffers,
        layers: Sequence[int],
        first: bool,
        last: bool,
        tp: TensorParallel,
        kernels: Kernels,
    ) -> None:
        model, pointwise = config.model, kernels.pointwise
        n, k, d = heads(model)
        size = tp.group.size
        acc_dtype, device = accumulate_dtype(buffers.weights.dtype), buffers.weights.device
        tables = rope_tables(config.batch.seq_length, d, model.rope_theta, model.rope_scaling, acc_dtype, device)
        local = n // size, max(1, k // size)
        self.rotary = RotaryAttention(*local, *tables, kernels.attention(*local, d), pointwise.apply_rope)
        params, eps = buffers.params, model.norm_eps
        self.recompute = config.memory.recompute == "full"
        self.embed = VocabParallelEmbedding(params["embed_tokens"], tp) if first else None
        self.layers = [TransformerLayer(params, f"layers.{i}.", eps, tp, self.rotary, pointwise) for i in layers]
        self.head: LossHead | None = None
        if last:
            weight = params["lm_head"] if "lm_head" in params else params["embed_tokens"]
            norm = RMSNorm(params["norm"], eps, pointwise)
            self.head = LossHead(weight, norm, tp, pointwise, model.vocab_size, config.memory.loss_chunk_tokens)

    def __call__(self, hidden: Tensor | None, batch: MicroBatch) -> Tensor:
        """Hidden states [T/t, h] or [T, h] of the stage before (None on the first) -> this stage's, or the loss sum."""
        if self.embed is None:
            assert hidden is not None, "only the first stage makes its own hidden states"
            x = hidden
        else:
            x = self.embed(batch.tokens.reshape(-1))
        again, positions = self.recompute and torch.is_grad_enabled(), self.rotary.positions(batch.documents)
        for layer in self.layers:
            x = _Recompute.apply(x, layer, positions) if again else layer(x, positions)
        return x if self.head is None else self.head(x, batch)


class _Recompute(Function):
    """Keep a layer's input only, and run the layer again for its backward (Chen et al. 2016)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: TransformerLayer, positions: Positions) -> Tensor:
        ctx.layer, ctx.documents = layer, positions.documents
        ctx.save_for_backward(x, positions.cos, positions.sin)
        return layer(x, positions)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        x, cos, sin = ctx.saved_tensors
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.layer(leaf, Positions(cos, sin, ctx.documents))
        torch.autograd.backward(out, grads)
        return leaf.grad, None, None
