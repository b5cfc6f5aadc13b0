"""What is cut over tp by the vocabulary: the embedding, and the head with the loss.

The gradient of the loss is formed where the logits are: each chunk of tokens makes its logits [c, V/t], turns
them into their gradient, multiplies that into those of hidden states and head.  The backward has the norm left.

Over tp two small reductions a chunk make it exact: the maximum over ranks of the logarithm of each
rank's sum of exponentials, then the sum together with the logit of the label (Shoeybi et al. 2019).
"""

from typing import Any

import torch
from torch import Tensor

from megallama.kernels.candidate import accumulate_dtype
from megallama.kernels.pointwise import PointwiseOps
from megallama.layers.batch import MicroBatch
from megallama.layers.linear import RMSNorm, TensorParallel
from megallama.layers.param import Layer, Param


class VocabParallelEmbedding(Layer):
    """Token ids [T] -> [T/t, h] (sequence parallelism) or [T, h]."""

    def __init__(self, param: Param, tp: TensorParallel) -> None:
        self.param = param
        self.tp = tp
        self._anchor = torch.zeros(0, requires_grad=True)  # makes autograd call our backward

    def __call__(self, tokens: Tensor) -> Any:
        return super().__call__(self._anchor, tokens)

    def forward(self, ctx: Any, anchor: Tensor, tokens: Tensor) -> Tensor:
        if self.tp.group.size == 1:
            ctx.save_for_backward(tokens)
            return torch.index_select(self.param.weight, 0, tokens)
        count = self.param.data.shape[0]  # of the ids that this rank holds
        shifted = tokens - self.tp.group.rank * count
        rows = shifted.clamp(0, count - 1)
        held = rows == shifted
        out = torch.index_select(self.param.weight, 0, rows)
        ctx.save_for_backward(rows, held)
        # zeros for others' ids: the sum has one term that is not zero, so it is exact
        out, handle = self.tp.reduce_scatter_sequence(out.masked_fill_(~held.unsqueeze(1), 0))
        handle.wait()
        return out

    def backward(self, ctx: Any, dout: Tensor) -> tuple[None, None]:
        rows, *held = ctx.saved_tensors
        full, handle = self.tp.all_gather_sequence(dout)
        handle.wait()
        if held:  # picking rows instead would wait for the device
            full = full.masked_fill(~held[0].unsqueeze(1), 0)
        self.param.add_rows(rows, full)
        return None, None


class LossHead(Layer):
    """Hidden states [T/t, h] or [T, h] and labels [T] -> the sum of token losses."""

    def __init__(
        self, param: Param, norm: RMSNorm, tp: TensorParallel, pointwise: PointwiseOps, vocab: int, chunk_tokens: int
    ) -> None:
        self.param, self.norm, self.tp, self.chunk_tokens = param, norm, tp, chunk_tokens
        self._softmax, self._gradient = pointwise.softmax_, pointwise.softmax_gradient_
        rows = param.data.shape[0]
        self.first = tp.group.rank * rows
        self.valid = max(0, min(rows, vocab - self.first))  # the other rows are padding

    def __call__(self, x: Tensor, branch: Tensor | None, batch: MicroBatch) -> Any:
        """The sum of -log p(label) of counted tokens, on all of tp; `branch` is added to x first."""
        return super().__call__(x, branch, batch, torch.is_grad_enabled())

    def forward(self, ctx: Any, x: Tensor, branch: Tensor | None, batch: MicroBatch, train: bool) -> Tensor:
        x, normed = self.norm.forward(x, branch)
        full, handle = self.tp.all_gather_sequence(normed)
        handle.wait()
        acc_dtype = accumulate_dtype(x.dtype)
        labels, mask = batch.labels.reshape(-1), batch.mask
        counted = torch.ones_like(labels, dtype=acc_dtype) if mask is None else mask.reshape(-1).to(acc_dtype)
        index, held = self._places(labels)
        scale, grads = counted * batch.grad_scale, []
        total = torch.zeros((), dtype=acc_dtype, device=x.device)
        for a in range(0, len(labels), self.chunk_tokens):
            rows = slice(a, a + self.chunk_tokens)
            losses, dlogits = self.chunk(full[rows], index[rows], held[rows], scale[rows] if train else None)
            total += torch.dot(losses, counted[rows])
            if batch.tell:
                batch.tell(batch, rows, losses)
            if train:
                grads.append(self.param.dgrad(dlogits))
                self.param.accumulate_wgrad(dlogits, full[rows])
        if train:
            dnormed, handle = self.tp.reduce_scatter_sequence(grads[0] if len(grads) == 1 else torch.cat(grads))
            handle.wait()
            ctx.save_for_backward(x, dnormed)
        return total

    def backward(self, ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        x, dnormed = ctx.saved_tensors
        self.param.grad_done()
        dx, _ = self.norm.backward(dnormed, x)
        return dx, dx if ctx.needs_input_grad[2] else None, None, None

    def score(self, x: Tensor, branch: Tensor | None, at: Tensor, labels: Tensor) -> Tensor:
        """Of hidden states, as in a call, those `at` [R]: log p(label), and 1 where it is the likeliest: [2, R].

        Nothing is kept for a backward. Of equally likely tokens the first counts, as with argmax.
        """
        full, handle = self.tp.all_gather_sequence(self.norm.forward(x, branch)[1])
        handle.wait()
        full, (index, held) = full[at], self._places(labels)
        out = torch.empty(2, len(labels), dtype=accumulate_dtype(x.dtype), device=x.device)
        for a in range(0, len(labels), self.chunk_tokens):
            rows = slice(a, a + self.chunk_tokens)
            best = torch.empty_like(out[1, rows])
            losses, _ = self.chunk(full[rows], index[rows], held[rows], None, best)
            out[0, rows], out[1, rows] = -losses, best == labels[rows]
        return out

    def _places(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels [T] -> where this rank has their logits, int64 [T, 1], and if it has them."""
        shifted = labels - self.first
        index = shifted.clamp(0, max(0, self.valid - 1))
        return index.unsqueeze(1), index == shifted

    def _likeliest(self, local: Tensor, out: Tensor) -> None:
        """The ids of all ranks' largest logits into `out` [c]; `local` [c, valid] are this one's."""
        top, at = torch.full_like(out, -torch.inf), torch.zeros_like(out)
        if self.valid:
            top, at = (found.to(out.dtype) for found in local.max(1))
        best = top.clone()
        self.tp.group.all_reduce(best, "max").wait()
        out.copy_(torch.where(top == best, -at - self.first, -torch.inf))
        self.tp.group.all_reduce(out, "max").wait()
        out.neg_()

    def chunk(
        self, hidden: Tensor, index: Tensor, held: Tensor, scale: Tensor | None, likeliest: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses [c] of rows [c, h], and with `scale` [c] the gradient of the logits [c, V/t].

        index: int64 [c, 1], where this rank has the label's logit, if `held` [c] says that it has.
        likeliest: takes the likeliest ids [c].
        """
        logits = self.param.fprop(hidden)
        local = logits[:, : self.valid]
        if likeliest is not None:
            self._likeliest(local, likeliest)
        alone = self.tp.group.size == 1  # the softmax is whole: one pass less over the logits
        log_sum, own, picked = numbers = logits.new_empty(3, len(logits), dtype=accumulate_dtype(logits.dtype))
        if self.valid:
            self._softmax(local, index, log_sum, picked, scale if alone else None)
            picked.mul_(held)
        else:
            log_sum.fill_(-torch.inf)
            picked.zero_()
        total = log_sum
        if not alone:
            top = log_sum.clone()
            self.tp.group.all_reduce(top, "max").wait()
            torch.exp(log_sum - top, out=own)
            self.tp.group.all_reduce(numbers[1:]).wait()
            total = top + own.log()
        if scale is not None and self.valid:
            self._gradient(local, index, scale * held, scale, None if alone else log_sum, total)
        if self.valid < logits.shape[1]:
            logits[:, self.valid :] = 0
        return total - picked, logits
