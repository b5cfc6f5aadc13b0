"""Column- and row-parallel linear layers (Shoeybi et al. 2019), sequence parallel (Korthikanti et al. 2022).

A layer is one node of autograd and contains its collectives: they can run under its own GEMMs.
  `T` tokens, `t` tensor-parallel ranks, [a, b] the global weight, SP = sequence parallelism:

    column, W [b/t, a]      forward                       backward
      SP                    x [T/t, a] --all-gather-->    all-gather of x under the dgrad GEMM,
                            [T, a] @ W.T = y [T, b/t]     reduce-scatter of dx under the wgrad GEMM
      no SP                 x [T, a] (replicated)         all-reduce of dx under the wgrad GEMM
    row, W [b, a/t]
      SP                    x [T, a/t] @ W.T = partial    all-gather of dy under the recomputation
                            --reduce-scatter--> [T/t, b]  of the activation, then dgrad and wgrad
      no SP                 --all-reduce--> [T, b]        (dy is replicated)

A column layer contains the RMSNorm before it, a row layer may contain SwiGLU; kept for the backward is their input
only (Touvron et al. 2023, section 2.4), with ``keep=True`` the operand of the weight gradient too.

With ``chunks`` = n > 1 a forward is cut: each piece, an n-th of every rank's rows, travels under another's GEMM.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megallama.comm.group import Done, Group, Handle
from megallama.kernels.pointwise import PointwiseOps
from megallama.layers.param import Layer, Param


@dataclass(frozen=True)
class TensorParallel:
    """How a layer talks to the other tensor-parallel ranks."""

    group: Group
    sequence_parallel: bool
    overlap: bool  # collectives run under GEMMs; off, each is awaited at once: the same bits
    keep: bool  # keep the operands of weight gradients instead of making them again
    chunks: int = 1  # pieces of a forward; bits depend on them

    def all_gather_sequence(self, shard: Tensor) -> tuple[Tensor, Handle]:
        """[T/t, a] of every rank as [T, a], started; without sequence parallelism it is whole."""
        if not self.sequence_parallel or self.group.size == 1:
            return shard, Done()
        full = shard.new_empty(shard.shape[0] * self.group.size, *shard.shape[1:])
        return full, self._started(self.group.all_gather(full, shard.contiguous()))

    def reduce_scatter_sequence(self, partial: Tensor) -> tuple[Tensor, Handle]:
        """The sum over ranks of [T, a], started: rows [T/t, a] (SP), or all of it."""
        if self.group.size == 1:
            return partial, Done()
        if not self.sequence_parallel:
            return partial, self._started(self.group.all_reduce(partial))
        shard = partial.new_empty(partial.shape[0] // self.group.size, *partial.shape[1:])
        return shard, self._started(self.group.reduce_scatter(shard, partial))

    def pieces(self, tokens: int) -> int:
        """Into how many a forward is cut: 1 if `tokens` do not divide (never in training)."""
        return self.chunks if self.group.size > 1 and tokens % (self._blocks * self.chunks) == 0 else 1

    def piece(self, x: Tensor, number: int, of: int) -> Tensor:
        """Rows [T/of, a] of x [T, a]: of every rank's rows the same part."""
        return x if of == 1 else x.view(self._blocks, of, -1, x.shape[1])[:, number].reshape(-1, x.shape[1])

    def place(self, out: Tensor, piece: Tensor, number: int, of: int) -> None:
        """Write a piece into its rows of out [T, b]."""
        out.view(self._blocks, of, -1, out.shape[1])[:, number] = piece.view(self._blocks, -1, out.shape[1])

    @property
    def _blocks(self) -> int:
        return self.group.size if self.sequence_parallel else 1

    def _started(self, handle: Handle) -> Handle:
        if not self.overlap:
            handle.wait()
        return handle


@dataclass(eq=False)
class RMSNorm:
    """x / rms(x) * weight [T, h], made again from x in the backward.

    Under sequence parallelism the weight's gradient is a partial sum, of each rank's rows (`Part.sum_over`).
    """

    param: Param
    eps: float
    _pointwise: PointwiseOps

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x + branch if there is one, the norm of that)."""
        return self._pointwise.add_norm(x, branch, self.param.weight, self.eps)

    def backward(
        self, dy: Tensor, x: Tensor, residual: Tensor | None = None, again: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(gradient of x, plus `residual`; the norm, wanted `again`); the weight's goes into main_grad."""
        param = self.param
        into = param.main_grad, param.overwrite
        results = self._pointwise.add_norm_backward(dy, x, param.weight, self.eps, residual, *into, again)
        param.overwrite = False
        param.grad_done()
        return results


@dataclass(eq=False)
class ColumnParallelLinear(Layer):
    """RMSNorm, then y = x @ W.T, rows of W cut over tp: x [T/t, a] (SP) or [T, a] -> [T, b/t].

    x is a residual stream, to which a branch may have to be added first: (x, branch) -> (their sum, y).
    """

    param: Param
    norm: RMSNorm
    tp: TensorParallel

    def forward(self, ctx: Any, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        (x, normed), tp = self.norm.forward(x, branch), self.tp
        ctx.save_for_backward(x, *([normed] if tp.keep else []))
        if not tp.sequence_parallel or (n := tp.pieces(len(x) * tp.group.size)) == 1:
            full, gather = tp.all_gather_sequence(normed)
            gather.wait()
            return x, self.param.fprop(full)
        out, shards = normed.new_empty(len(x) * tp.group.size, self.param.data.shape[0]), normed.chunk(n)
        full, gather = tp.all_gather_sequence(shards[0])
        for i in range(n):
            gather.wait()
            part = full
            if i + 1 < n:
                full, gather = tp.all_gather_sequence(shards[i + 1])
            tp.place(out, self.param.fprop(part), i, n)
        return x, out

    def backward(self, ctx: Any, residual: Tensor, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        x, *kept = ctx.saved_tensors
        if not kept and self.tp.group.size == 1:  # nothing to gather: one pass makes all
            dx, normed = self.norm.backward(self.param.dgrad(dy), x, residual, again=True)
            assert normed is not None
            self.param.wgrad(dy, normed)
        else:
            full, gather = self.tp.all_gather_sequence(kept[0] if kept else self.norm.forward(x)[1])
            dnormed, scatter = self.tp.reduce_scatter_sequence(self.param.dgrad(dy))
            gather.wait()
            self.param.wgrad(dy, full)
            scatter.wait()
            dx, _ = self.norm.backward(dnormed, x, residual)
        return dx, dx if ctx.needs_input_grad[2] else None


@dataclass(eq=False)
class RowParallelLinear(Layer):
    """[SwiGLU,] then y = x @ W.T with the columns of W cut over tp -> [T/t, b] (SP) or [T, b].

    x is [T, a/t], or [T, 2a/t], packed gate and up, if `gated`.
    """

    param: Param
    tp: TensorParallel
    pointwise: PointwiseOps
    gated: bool

    def forward(self, ctx: Any, x: Tensor) -> Tensor:
        operand = self.pointwise.swiglu(x) if self.gated else x
        ctx.save_for_backward(x, *([operand] if self.gated and self.tp.keep else []))
        n = self.tp.pieces(len(operand))
        sums = [self.tp.reduce_scatter_sequence(self.param.fprop(self.tp.piece(operand, i, n))) for i in range(n)]
        for _, handle in sums:
            handle.wait()
        return sums[0][0] if n == 1 else torch.cat([part for part, _ in sums])

    def backward(self, ctx: Any, dy: Tensor) -> tuple[Tensor]:
        x, *kept = ctx.saved_tensors
        full, gather = self.tp.all_gather_sequence(dy)
        operand: Tensor | None = kept[0] if kept else None if self.gated else x
        if operand is None and self.tp.group.size > 1:  # while dy is gathered
            operand = self.pointwise.swiglu(x)
        gather.wait()
        dx = self.param.dgrad(full)
        if self.gated:
            dx, product = self.pointwise.swiglu_backward(dx, x, operand is None)
            operand = operand if product is None else product
        assert operand is not None
        self.param.wgrad(full, operand)
        return (dx,)
