"""Causal attention on [b, s, heads, d]: Transformer Engine's, matrix products by blocks, torch's.

Each takes `documents`, None or where they begin: a query then attends to its own only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megallama.kernels.candidate import TE, Operation, Results, Target, Unsupported

Attend = Callable[..., Tensor]  # q [b, s, n, d], k and v [b, s, k, d], documents -> [b, s, n, d]
MakeAttention = Callable[[int, int, int], Attend]  # query heads, kv heads, head size
BLOCK = 128  # queries whose scores `blocked_attention` has in memory
TOGETHER = 64  # tokens of consecutive documents that `sdpa` takes together: a call costs more than their mask


@dataclass(frozen=True)
class Documents:
    """Where documents lie in b samples of s tokens, the first of them cut at the sample's front.

    Make one with `of`, on the host: how many there are decides a shape.
    starts: int64 [b, s], where in the sample each token's document begins.
    cu_seqlens: int32 [documents + 1], where each begins among all tokens, and b * s.
    pieces: of each sample in turn (tokens, whether these are several documents), on the host.
    """

    starts: Tensor
    cu_seqlens: Tensor
    pieces: tuple[tuple[tuple[int, bool], ...], ...]

    @classmethod
    def of(cls, starts: Tensor) -> Documents:
        """The documents that begin where `starts` [b, s] says."""
        begins = starts == torch.arange(starts.shape[1], device=starts.device)
        first = begins.reshape(-1).nonzero().reshape(-1)
        ends = torch.cat([first, first.new_tensor([starts.numel()])])
        pieces: list[list[tuple[int, bool]]] = [[] for _ in starts]
        for begin, length in zip(ends.tolist(), ends.diff().tolist(), strict=False):
            sample = pieces[begin // starts.shape[1]]
            if sample and sample[-1][0] + length <= TOGETHER:
                sample[-1] = sample[-1][0] + length, True
            else:
                sample.append((length, False))
        return cls(starts, ends.to(torch.int32), tuple(map(tuple, pieces)))

    @cached_property
    def positions(self) -> Tensor:
        """[b, s]: of each token within its document, or within what the sample holds of it."""
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.starts

    def split(self, x: Tensor) -> list[Tensor]:
        """[b, s, heads, d] as [1, heads, tokens, d] of each piece."""
        samples = zip(x.transpose(1, 2).split(1), self.pieces, strict=True)
        return [part for one, pieces in samples for part in one.split([n for n, _ in pieces], 2)]

    def masks(self, dtype: torch.dtype) -> list[Tensor | None]:
        """For each piece of several documents [tokens, tokens] in `dtype`: 0 where the row's query may attend to the
        column's key, else -inf; None for one document, which is only causal.  Made once."""
        if dtype not in self._masks:
            several = [mixed for sample in self.pieces for _, mixed in sample]
            parts = zip(self.split(self.starts[:, :, None, None]), several, strict=True)
            self._masks[dtype] = [_mask(part.flatten(), dtype) if mixed else None for part, mixed in parts]
        return self._masks[dtype]

    @cached_property
    def _masks(self) -> dict[torch.dtype, list[Tensor | None]]:
        return {}

    def each(self, change: Callable[[Tensor], Tensor]) -> Documents:
        """With both tensors changed: moved, pinned. What was made of them, masks, ends with the original."""
        return Documents(change(self.starts), change(self.cu_seqlens), self.pieces)


def _mask(starts: Tensor, dtype: torch.dtype) -> Tensor:
    """[.., s, s] of consecutive tokens whose documents begin at `starts` [.., s]: 0 or -inf, by query and key."""
    at = torch.arange(starts.shape[-1], device=starts.device)
    hidden = (at > at[:, None]) | (starts[..., None, :] < starts[..., None])
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """torch's fused attention; of each document alone, or of some short ones together under a small mask."""
    group = q.shape[2] // k.shape[2]
    if documents is not None and group > 1 and q.is_cuda:  # no fused kernel there takes a mask too
        k, v, group = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2), 1
    attend: Any = partial(F.scaled_dot_product_attention, enable_gqa=group > 1)
    if documents is None or all(len(sample) == 1 and not sample[0][1] for sample in documents.pieces):
        whole: Tensor = attend(*(part.transpose(1, 2) for part in (q, k, v)), is_causal=True)
        return whole.transpose(1, 2)
    pieces = zip(*map(documents.split, (q, k, v)), documents.masks(q.dtype), strict=True)
    out = [attend(*qkv, mask, is_causal=mask is None).transpose(1, 2) for *qkv, mask in pieces]
    return torch.cat(out, 1).view(q.shape)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """By batched products over blocks of queries; bitwise the same on every call.

    On a CPU torch's fused attention does 16-bit formats slowly.  Here a block sees only the keys up to
    its end, and is a batched product, a softmax and a product, all of which have fast 16-bit kernels.
    Kept are q, k and v; the backward makes probabilities again: memory is that of the fused kernels.
    """
    out: Tensor = _Blocked.apply(q, k, v, documents)
    return out


class _Blocked(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.documents = documents
        queries, keys, values = _heads_first(q, k, v)
        out = torch.empty_like(queries)
        for rows, seen in _blocks(q.shape[1], documents):
            p = _probabilities(queries, keys, rows, seen, documents)
            torch.bmm(p, values[:, seen], out=out[:, rows])
        return out.view(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        queries, keys, values = _heads_first(q, k, v)
        (dout,) = _heads_first(grads[0])
        dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        scale = q.shape[3] ** -0.5
        for rows, seen in _blocks(q.shape[1], ctx.documents):
            p = _probabilities(queries, keys, rows, seen, ctx.documents)
            dp = torch.bmm(dout[:, rows], values[:, seen].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, rows] = torch.baddbmm(ds.new_empty(()), ds, keys[:, seen], beta=0, alpha=scale)
            dk[:, seen].add_(torch.bmm(ds.transpose(1, 2), queries[:, rows]), alpha=scale)
            dv[:, seen].add_(torch.bmm(p.transpose(1, 2), dout[:, rows]))
        return _tokens_first(dq, q), _tokens_first(dk, k), _tokens_first(dv, v), None


def _blocks(length: int, documents: Documents | None) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys that any of them sees) of each block of rows."""
    for a in range(0, length, BLOCK):
        end = min(a + BLOCK, length)
        first = 0 if documents is None else int(documents.starts[:, a].min())
        yield slice(a, end), slice(first, end)


def _heads_first(*parts: Tensor) -> tuple[Tensor, ...]:
    """[b, s, heads, d] as contiguous [b * n, s, d], n those of the first; fewer are repeated."""
    n = parts[0].shape[2]
    repeated = (p if p.shape[2] == n else p.repeat_interleave(n // p.shape[2], 2) for p in parts)
    return tuple(p.transpose(1, 2).reshape(-1, p.shape[1], p.shape[3]) for p in repeated)


def _tokens_first(grad: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_heads_first` for a gradient: repeated heads are summed."""
    b, s, heads, d = like.shape
    grouped = grad.view(b, heads, -1, s, d)
    return (grouped.squeeze(2) if grouped.shape[2] == 1 else grouped.sum(2)).transpose(1, 2)


def _probabilities(q: Tensor, k: Tensor, rows: slice, seen: slice, documents: Documents | None) -> Tensor:
    """softmax of the scores [b n, r, e] of queries `rows` over keys `seen`, which end together."""
    count, scale = rows.stop - rows.start, q.shape[2] ** -0.5
    scores = torch.baddbmm(q.new_empty(()), q[:, rows], k[:, seen].transpose(1, 2), beta=0, alpha=scale)
    future = torch.full((count, count), -torch.inf, dtype=scores.dtype, device=scores.device).triu_(1)
    scores[:, :, scores.shape[2] - count :].add_(future)  # far faster than masked_fill_ on a CPU
    last = seen.start if documents is None else int(documents.starts[:, rows].max())
    if documents is not None and last > seen.start:  # keys of other documents lie before it
        others = torch.arange(seen.start, last, device=scores.device) < documents.starts[:, rows, None]
        hidden = scores.new_zeros(others.shape).masked_fill_(others, -torch.inf)  # [b, r, last - start]
        scores.view(len(others), -1, *scores.shape[1:])[..., : last - seen.start].add_(hidden[:, None])
    return torch.softmax(scores, -1)


def _te_attention(target: Target) -> MakeAttention:
    """cuDNN or flash attention through Transformer Engine, which without them forms all scores of a document."""
    target.need_half_on_cuda()
    te = target.te_module("transformer_engine.pytorch")
    if target.documents and importlib.util.find_spec("flash_attn") is None:
        major, minor = torch.cuda.get_device_capability(target.device)
        if major < 9:
            raise Unsupported(f"documents need flash_attn below compute capability 9.0, here {major}.{minor}")

    def make(num_heads: int, num_kv_heads: int, head_dim: int) -> Attend:
        attention = te.DotProductAttention(
            num_heads, head_dim, num_gqa_groups=num_kv_heads, qkv_format="bshd", attn_mask_type="causal"
        )

        def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
            if documents is None:
                out: Tensor = attention(q, k, v)
                return out.view(*q.shape)
            ends, longest = documents.cu_seqlens, q.shape[1]  # packed: [tokens, heads, d], by document
            packed: dict[str, Any] = {"qkv_format": "thd", "attn_mask_type": "padding_causal"}
            packed |= {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": longest, "max_seqlen_kv": longest}
            out = attention(*(part.flatten(0, 1) for part in (q, k, v)), **packed)
            return out.view(*q.shape)

        return attend

    return make


def _varlen_attention(target: Target) -> MakeAttention:
    """torch's flash attention of packed documents: no mask, and no scores between documents."""
    target.need_half_on_cuda()
    if not target.documents:
        raise Unsupported("for documents only")
    varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        if documents is None:  # never where samples have documents, but the check asks
            return sdpa(q, k, v)
        ends, longest = documents.cu_seqlens, q.shape[1]
        packed = (part.flatten(0, 1) for part in (q, k, v))
        grouped = {"enable_gqa": True} if k.shape[2] < q.shape[2] else {}
        out: Tensor = varlen(*packed, ends, ends, longest, longest, window_size=(-1, 0), **grouped)
        return out.view(q.shape)

    return lambda num_heads, num_kv_heads, head_dim: attend


def _blocked_attention(target: Target) -> MakeAttention:
    if target.device.type == "cuda" or target.dtype not in (torch.bfloat16, torch.float16):
        raise Unsupported("16-bit formats on a CPU only")
    return lambda num_heads, num_kv_heads, head_dim: blocked_attention


def _formula(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Of all scores: what every implementation is compared with."""
    k, v = (part.repeat_interleave(q.shape[2] // part.shape[2], 2) for part in (k, v))
    starts = torch.zeros(q.shape[:2], device=q.device) if documents is None else documents.starts
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) * q.shape[3] ** -0.5 + _mask(starts, q.dtype)[:, None]
    return torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v)


def _results(make: MakeAttention, target: Target) -> Results:
    """Each head with its own keys, then in groups; within documents where they matter.

    q, k and v are parts of one packed tensor, as in training: some kernels depend on where they lie.
    """
    starts = torch.tensor([[0] * 70 + [70] * 58, [0] * 20 + [20] + [21] * 29 + [50] * 78], device=target.device)
    results, dout = [], target.random(2, 128, 4, 64, seed=3)
    for kv in (4, 2):
        attend, heads = make(4, kv, 64), [4, kv, kv]
        packed = target.random(2, 128, sum(heads), 64).requires_grad_()
        for case in (None, Documents.of(starts)) if target.documents else (None,):
            out = attend(*packed.split(heads, 2), case)
            (grads,) = torch.autograd.grad(out, packed, dout)
            where = " within documents" * (case is not None) + " of grouped heads" * (kv < 4)
            found = zip("qkv", grads.split(heads, 2), strict=True)
            results += [(f"output{where}", out), *((f"gradient of {x}{where}", grad) for x, grad in found)]
    return results


ATTENTION = Operation(
    [(TE, _te_attention), ("blocks of matrix products", _blocked_attention), ("torch varlen_attn", _varlen_attention)],
    ("torch scaled_dot_product_attention", lambda target: lambda num_heads, num_kv_heads, head_dim: sdpa),
    _results,
    (2e-2, 4e-2, 4e-2, 4e-2),
    plain=lambda num_heads, num_kv_heads, head_dim: _formula,
)
