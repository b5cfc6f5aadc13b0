"""Attention of sequences that are cut over ranks; `plan.exchange` says how, and what it moves."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megallama.comm.group import Group
from megallama.kernels.attention import Attend, Documents, MakeAttention
from megallama.kernels.candidate import accumulate_dtype
from megallama.layers.param import Layer
from megallama.plan.exchange import Share, kv_copies


@dataclass(frozen=True)
class ContextParallel:
    """How attention reaches the tokens of other ranks."""

    group: Group
    share: Share
    keep: bool  # gathered keys and values for the backward

    def over(self, make: MakeAttention, num_heads: int, num_kv_heads: int, head_dim: int) -> Attend:
        """Attention of this rank's tokens, q [b, s/cp, n, d], k and v [b, s/cp, k, d], to all of their samples."""
        cp = self.share.size
        if cp == 1:
            return make(num_heads, num_kv_heads, head_dim)
        if self.share.gathers:
            return _Gathered(self, make(num_heads, num_kv_heads, head_dim))
        copies = kv_copies(num_kv_heads, cp)
        attend = make(num_heads // cp, num_kv_heads * copies // cp, head_dim)
        return _ByHeads(_Exchange(self.group), attend, copies)


@dataclass(frozen=True)
class _Gathered:
    """A rank's two chunks of queries, each with all keys up to its end."""

    context: ContextParallel
    attend: Attend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        whole, share = _Whole(self.context.group, k.detach(), v.detach()), self.context.share
        k, v = _Gather(whole)(k, v)
        keep = self.context.keep or not torch.is_grad_enabled()
        out = []
        with nullcontext() if keep else saved_tensors_hooks(whole.leave_out, whole.again):
            for i, (rows, (_, end)) in enumerate(zip(q.chunk(2, 1), share.chunks(k.shape[1]), strict=True)):
                out.append(self.attend(rows, k[:, :end], v[:, :end], documents and documents.parts[i]))
        return torch.cat(out, 1)


class _Whole:
    """The keys and values of all ranks; what autograd would keep of them is gathered again when it is needed."""

    def __init__(self, group: Group, k: Tensor, v: Tensor) -> None:
        self._group, self._own, self._storage = group, (k, v), 0
        self.found: Tensor | None = None  # in the backward

    def gather(self) -> Tensor:
        """[2, b, s, heads, d], in order."""
        own, cp = torch.stack(self._own), self._group.size
        two, b, tokens, heads, d = own.shape
        parts = own.new_empty(cp, two, b, 2, tokens // 2, heads, d)
        self._group.all_gather(parts, own).wait()
        whole = own.new_empty(two, b, heads, cp * tokens, d).transpose(2, 3)  # the rows of a head together
        places = whole.unflatten(2, (2 * cp, -1))
        for rank, part in enumerate(parts):
            places[:, :, rank], places[:, :, 2 * cp - 1 - rank] = part.unbind(2)
        self._storage = whole.untyped_storage()._cdata
        return whole

    def sums(self, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of all tokens from every rank -> of this rank's, added up in fp32."""
        cp, (b, s, heads, d) = self._group.size, dk.shape
        sent = dk.new_empty(cp, 2, b, 2, s // (2 * cp), heads, d)
        for i, grad in enumerate((dk, dv)):
            chunks = grad.unflatten(1, (2 * cp, -1))
            for rank in range(cp):
                sent[rank, i, :, 0], sent[rank, i, :, 1] = chunks[:, rank], chunks[:, 2 * cp - 1 - rank]
        found = torch.empty_like(sent)
        self._group.all_to_all(found, sent).wait()
        total = found.sum(0, dtype=accumulate_dtype(dk.dtype)).to(dk.dtype)
        own_k, own_v = total.flatten(2, 3).unbind()
        return own_k, own_v

    def leave_out(self, tensor: Tensor) -> Any:
        """In place of what is a part of the gathered ones: where it lies in them."""
        if tensor.untyped_storage()._cdata != self._storage:
            return tensor
        return tensor.shape, tensor.stride(), tensor.storage_offset()

    def again(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self.found is None:
            self.found = self.gather()
        return self.found.as_strided(*kept)


@dataclass(eq=False)
class _Gather(Layer):
    """Keys and values [b, s/cp, heads, d] of this rank -> of all [b, s, heads, d]."""

    whole: _Whole

    def forward(self, ctx: Any, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return self.whole.gather().unbind()

    def backward(self, ctx: Any, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        self.whole.found = None
        return self.whole.sums(dk, dv)


@dataclass(frozen=True)
class _ByHeads:
    """Every rank has some heads of whole sequences (Jacobs et al. 2023)."""

    exchange: _Exchange
    attend: Attend
    copies: int  # of each key/value head; autograd adds up their gradients

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        cp = self.exchange.group.size
        if self.copies > 1:
            k, v = (x.repeat_interleave(self.copies, 2) for x in (k, v))
        parts = [x.unflatten(2, (cp, -1)) for x in (q, k, v)]
        sizes = [x.shape[3] for x in parts]
        found = self.exchange(torch.cat(parts, 3).movedim(2, 0).contiguous())  # [cp, b, s/cp, heads, d]
        first, last = found.unflatten(2, (2, -1)).unbind(2)
        whole = torch.cat([first, last.flip(0)]).movedim(0, 1).flatten(1, 2)  # [b, s, heads, d]
        out = self.attend(*whole.split(sizes, 2), documents).unflatten(1, (2 * cp, -1))
        first, last = out[:, :cp], out[:, cp:].flip(1)
        sent = torch.stack([first, last], 2).movedim(1, 0).flatten(2, 3)
        return self.exchange(sent.contiguous()).movedim(0, 2).flatten(2, 3)


@dataclass(eq=False)
class _Exchange(Layer):
    """Piece r of [cp, ..] goes to rank r, and what every rank has for this one comes back."""

    group: Group

    def forward(self, ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self.group.all_to_all(out, x).wait()
        return out

    def backward(self, ctx: Any, dout: Tensor) -> tuple[Tensor]:
        return (self.forward(ctx, dout.contiguous()),)
