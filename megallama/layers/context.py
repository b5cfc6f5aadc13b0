"""Attention of sequences cut over ranks; `plan.exchange` says how, and what moves."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megallama.comm.group import Group, Handle
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
    pieces: int = 1  # of the heads: one travels under the attention of the one before

    def over(self, make: MakeAttention, num_heads: int, num_kv_heads: int, head_dim: int) -> Attend:
        """Attention of a rank's q [b, s/cp, n, d], k and v [b, s/cp, k, d] to whole samples."""
        cp = self.share.size
        if cp == 1:
            return make(num_heads, num_kv_heads, head_dim)
        if self.share.gathers:
            return partial(self.gathered, make(num_heads // self.pieces, num_kv_heads // self.pieces, head_dim))
        copies = kv_copies(num_kv_heads, cp)
        return partial(self.by_heads, make(num_heads // cp, num_kv_heads * copies // cp, head_dim), copies)

    def gathered(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, within: Documents | None) -> Tensor:
        """Each of a rank's two chunks of queries with all keys up to its end."""
        keep, out, gathers = self.keep or not torch.is_grad_enabled(), list[Tensor](), list[_Gather]()
        for own in zip(*(x.detach().chunk(self.pieces, 2) for x in (k, v)), strict=True):
            gathers.append(_Gather(self.group, own, gathers[-1] if gathers else None))
        heads = zip(gathers, *(x.chunk(self.pieces, 2) for x in (q, k, v)), strict=True)
        for number, (gather, queries, *own_kv) in enumerate(heads, 1):
            keys, values = gather(*own_kv)
            for following in gathers[number : number + 1]:
                following.start()
            rows = zip(queries.chunk(2, 1), self.share.chunks(keys.shape[1]), strict=True)
            with nullcontext() if keep else saved_tensors_hooks(gather.leave_out, gather.again):
                for i, (chunk, (_, end)) in enumerate(rows):
                    out.append(attend(chunk, keys[:, :end], values[:, :end], within and within.parts[i]))
        return torch.cat([torch.cat(out[i::2], 2) for i in (0, 1)], 1)

    def by_heads(
        self, attend: Attend, copies: int, q: Tensor, k: Tensor, v: Tensor, within: Documents | None
    ) -> Tensor:
        """A rank has some heads of whole sequences; autograd adds up copied heads' gradients."""
        if copies > 1:
            k, v = (x.repeat_interleave(copies, 2) for x in (k, v))
        out = attend(*_Exchange(self.group)(q, k, v), within)
        home: tuple[Tensor] = _Exchange(self.group, home=True)(out)
        return home[0]


def _in_order(parts: Tensor) -> Tensor:
    """What ranks have [cp, b, s/cp, heads, d] -> [b, s, heads, d]."""
    halves = [part.chunk(2, 1) for part in parts]
    return torch.cat([first for first, _ in halves] + [last for _, last in reversed(halves)], 1)


def _by_rank(whole: Tensor, cp: int) -> Tensor:
    """The inverse."""
    chunks = whole.chunk(2 * cp, 1)
    ordered = torch.cat([chunks[i] for rank in range(cp) for i in (rank, -1 - rank)], 1)
    return ordered.unflatten(1, (cp, -1)).movedim(1, 0).contiguous()


@dataclass(eq=False)
class _Gather(Layer):
    """Keys and values [b, s/cp, heads, d] of this rank -> of all [b, s, heads, d], in order.

    Of what autograd would keep of them it keeps where it lies, and gathers again in the backward.
    """

    group: Group
    own: tuple[Tensor, ...]
    before: _Gather | None  # whose backward comes next
    arriving: tuple[Tensor, Handle] | None = None
    found: Tensor | None = None  # in the backward
    storage: int = 0

    def start(self) -> tuple[Tensor, Handle]:
        own = torch.cat(self.own)
        parts = own.new_empty(self.group.size, *own.shape)
        self.arriving = parts, self.group.all_gather(parts, own)
        return self.arriving

    def whole(self) -> Tensor:
        """[2 b, s, heads, d]."""
        parts, handle = self.arriving or self.start()
        self.arriving = None
        handle.wait()
        whole = _in_order(parts)
        self.storage = whole.untyped_storage()._cdata
        return whole

    def forward(self, ctx: Any, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return self.whole().chunk(2)

    def backward(self, ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """The gradients of all ranks, added up in fp32 where the tokens are."""
        sent = _by_rank(torch.cat(grads), self.group.size)
        self.found, self.own = None, ()  # the graph may live on, until weight gradients are made
        self.group.all_to_all(found := torch.empty_like(sent), sent).wait()
        return found.sum(0, dtype=accumulate_dtype(sent.dtype)).to(sent.dtype).chunk(2)

    def leave_out(self, tensor: Tensor) -> Any:
        own = tensor.untyped_storage()._cdata == self.storage
        return (tensor.shape, tensor.stride(), tensor.storage_offset()) if own else tensor

    def again(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self.found is None:
            self.found = self.whole()
            if self.before is not None:
                self.before.start()
        return self.found.as_strided(*kept)


@dataclass(eq=False)
class _Exchange(Layer):
    """All heads of own tokens [b, s/cp, heads, d] -> own heads of all; or `home` again."""

    group: Group
    home: bool = False

    def forward(self, ctx: Any, *parts: Tensor) -> tuple[Tensor, ...]:
        cp = self.group.size
        cut = parts if self.home else [x.unflatten(2, (cp, -1)).movedim(2, 0) for x in parts]
        heads = [x.shape[-2] for x in cut]
        sent = _by_rank(torch.cat(parts, 2), cp) if self.home else torch.cat(cut, 3).contiguous()
        self.group.all_to_all(found := torch.empty_like(sent), sent).wait()
        if self.home:
            return tuple(x.movedim(0, 2).flatten(2, 3) for x in found.split(heads, 3))
        return _in_order(found).split(heads, 2)

    def backward(self, ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return replace(self, home=not self.home).forward(ctx, *grads)
