"""Vocabulary-parallel embedding: each tensor-parallel rank holds a range of token ids.

A rank looks up the ids it holds and leaves zeros for the others; the sum over ranks has exactly one
term that is not zero, so it is exact in every format.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megallama.layers.linear import TensorParallel
from megallama.layers.param import Param


class VocabParallelEmbedding:
    """Token ids [T] -> [T/t, h] (sequence parallelism) or [T, h]."""

    def __init__(self, param: Param, tp: TensorParallel) -> None:
        self.param = param
        self.tp = tp
        self._anchor = torch.zeros(0, requires_grad=True)  # makes autograd call our backward

    def __call__(self, tokens: Tensor) -> Tensor:
        out: Tensor = _Embed.apply(self._anchor, tokens, self)
        return out


class _Embed(Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tokens: Tensor, layer: VocabParallelEmbedding) -> Tensor:
        count = layer.param.data.shape[0]  # of the ids that this rank holds
        rows = tokens - layer.tp.group.rank * count
        held = (rows >= 0) & (rows < count)
        out = torch.index_select(layer.param.weight, 0, rows.clamp_(0, count - 1))
        ctx.layer = layer
        ctx.save_for_backward(rows, held)
        if layer.tp.group.size == 1:
            return out
        out, handle = layer.tp.reduce_scatter_sequence(out.masked_fill_(~held.unsqueeze(1), 0))
        handle.wait()
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        layer: VocabParallelEmbedding = ctx.layer
        rows, held = ctx.saved_tensors
        full, handle = layer.tp.all_gather_sequence(grads[0])
        handle.wait()
        if layer.tp.group.size > 1:  # picking rows instead would wait for the device
            full = full.masked_fill(~held.unsqueeze(1), 0)
        layer.param.add_rows(rows, full)
        return None, None, None
