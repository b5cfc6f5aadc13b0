"""Causal attention on [b, s, heads, d]: Transformer Engine's, matrix products by blocks, torch's.

Each takes `documents`, None or where they begin: a query then attends to its own only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megallama.kernels.candidate import TE, Operation, Results, Target, Unsupported

Attend = Callable[..., Tensor]  # q [b, r, n, d], last rows of k and v [b, s, k, d], documents -> [b, r, n, d]
MakeAttention = Callable[[int, int, int], Attend]  # query heads, kv heads, head size
BLOCK = 128  # queries whose scores `blocked_attention` has in memory
TOGETHER = 64  # tokens of documents that `sdpa` takes together: a call costs more than a mask


@dataclass(frozen=True)
class Documents:
    """Where documents lie in b samples of s tokens, the first of them cut at the sample's front.

    Make one with `of`, on the host: their number decides a shape.  The queries are the last tokens of each
    sample, at first all; documents that end before them are left out.
    starts: int64 [b, s], where in the sample each token's document begins.
    cu_seqlens, cu_keys: int32 [documents + 1], where each begins among all queries, and among the keys they see.
    pieces: of each sample in turn (keys, whether these are several documents), on the host.
    parts, positions_of_part: of a rank of context parallelism, by its chunks; see `part`.
    reach: int64 [b, s], where documents branch, in how many tokens those that see each end; for `sdpa`.
    """

    starts: Tensor
    cu_seqlens: Tensor
    cu_keys: Tensor
    pieces: tuple[tuple[tuple[int, bool], ...], ...]
    parts: tuple[Documents, ...] = ()
    positions_of_part: Tensor | None = None
    reach: Tensor | None = None
    _masks: dict[torch.dtype, list[Tensor | None]] = field(default_factory=dict, init=False)  # by `masks`

    @classmethod
    def of(cls, starts: Tensor, queries: int | None = None) -> Documents:
        """The documents that begin where `starts` [b, s] says, for the last `queries`."""
        count, length = starts.shape
        before, at = length - (queries or length), torch.arange(length, device=starts.device)
        first = ((starts == at) & (at >= starts[:, before, None])).reshape(-1).nonzero().reshape(-1)
        sample = first // length * length
        stop = torch.minimum(torch.cat([first[1:], first.new_tensor([count * length])]), sample + length)
        pieces: list[list[tuple[int, bool]]] = [[] for _ in starts]
        for number, keys in zip((sample // length).tolist(), (stop - first).tolist(), strict=True):
            if (found := pieces[number]) and found[-1][0] + keys <= TOGETHER:
                found[-1] = found[-1][0] + keys, True
            else:
                found.append((keys, False))
        lengths = torch.stack([stop - torch.maximum(first, sample + before), stop - first])
        ends, key_ends = F.pad(lengths.cumsum(1), (1, 0)).to(torch.int32)
        return cls(starts, ends, key_ends, tuple(map(tuple, pieces)))

    def part(self, chunks: Sequence[tuple[int, int]]) -> Documents:
        """Also of a rank's chunks (first token, end), each with all keys up to its end."""
        parts = tuple(Documents.of(self.starts[:, :end].contiguous(), end - first) for first, end in chunks)
        positions = torch.cat([self.positions[:, first:end] for first, end in chunks], 1)
        return replace(self, parts=parts, positions_of_part=positions)

    @cached_property
    def positions(self) -> Tensor:
        """[b, s]: of each token of this rank in its document, or in what the sample holds of it."""
        if self.positions_of_part is not None:
            return self.positions_of_part
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.starts

    def split(self, x: Tensor) -> list[Tensor]:
        """[b, s, heads, d] as [1, heads, tokens, d] of each piece."""
        samples = zip(x.transpose(1, 2).split(1), self.pieces, strict=True)
        return [part for one, pieces in samples for part in one.split([n for n, _ in pieces], 2)]

    def packed(self, x: Tensor) -> Tensor:
        """Keys or values [b, s, heads, d] that queries see: [tokens, heads, d]."""
        seen = [sum(n for n, _ in pieces) for pieces in self.pieces]
        whole = seen == [x.shape[1]] * len(seen)
        return x.flatten(0, 1) if whole else torch.cat([one[-n:] for one, n in zip(x, seen, strict=True)])

    def masks(self, dtype: torch.dtype) -> list[Tensor | None]:
        """For each piece of several documents [tokens, tokens] in `dtype`: 0 where the row's query may attend to the
        column's key, else -inf; None for one document, which is only causal.  Made once."""
        if dtype not in self._masks:
            several = [mixed for sample in self.pieces for _, mixed in sample]
            bounds, branches = (self.starts, False) if self.reach is None else (self.reach, True)
            parts = zip(self.split(bounds[:, :, None, None]), several, strict=True)
            self._masks[dtype] = [_mask(part.flatten(), dtype, branches) if mixed else None for part, mixed in parts]
        return self._masks[dtype]

    def each(self, change: Callable[[Tensor], Tensor]) -> Documents:
        """With its tensors changed: moved, pinned. Masks made of them end with the original."""
        own, reach = (None if x is None else change(x) for x in (self.positions_of_part, self.reach))
        parts = tuple(part.each(change) for part in self.parts)
        starts, ends, keys = map(change, (self.starts, self.cu_seqlens, self.cu_keys))
        return Documents(starts, ends, keys, self.pieces, parts, own, reach)


def _mask(bounds: Tensor, dtype: torch.dtype, branches: bool = False) -> Tensor:
    """[.., s, s] of tokens: 0 or -inf, by query and key; `bounds` [.., s]: `starts`, or else `reach`."""
    at = torch.arange(bounds.shape[-1], device=bounds.device)
    keys = bounds[..., None, :]
    hidden = (at > at[:, None]) | (at + keys <= at[:, None] if branches else keys < bounds[..., None])
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """torch's fused attention, of each document, or of some short ones under a small mask.

    Fewer queries than keys have a kernel on a GPU alone, which knows no documents: else our own blocks.
    """
    group = q.shape[2] // k.shape[2]
    if fewer := q.shape[1] < k.shape[1]:
        if documents is not None or not q.is_cuda or q.dtype == torch.float64:
            return blocked_attention(q, k, v, documents)
    if (fewer or documents is not None) and group > 1 and q.is_cuda:  # no fused kernel takes a mask too
        k, v, group = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2), 1
    attend: Any = partial(F.scaled_dot_product_attention, enable_gqa=group > 1)
    if documents is None or all(len(sample) == 1 and not sample[0][1] for sample in documents.pieces):
        how: Any = {"is_causal": True}
        if fewer:  # imported here: it brings in a compiler
            bias = importlib.import_module("torch.nn.attention.bias")
            how = {"attn_mask": bias.causal_lower_right(q.shape[1], k.shape[1])}
        whole: Tensor = attend(*(part.transpose(1, 2) for part in (q, k, v)), **how)
        return whole.transpose(1, 2)
    pieces = zip(*map(documents.split, (q, k, v)), documents.masks(q.dtype), strict=True)
    out = [attend(*qkv, mask, is_causal=mask is None).transpose(1, 2) for *qkv, mask in pieces]
    return torch.cat(out, 1).view(q.shape)


def sdpa_in_fp32(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """`sdpa`, on copies of its operands in 16 bits."""
    return sdpa(q.float(), k.float(), v.float(), documents).to(q.dtype)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """By batched products over blocks of queries; bitwise the same on every call.

    On a CPU torch's fused attention does 16 bits slowly.  Here a block sees the keys up to its end by products and
    a softmax, all fast in 16 bits.  Kept are q, k, v; the backward makes probabilities again, as fused kernels do.
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
        for rows, seen in _blocks(queries, keys, documents):
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
        for rows, seen in _blocks(queries, keys, ctx.documents):
            p = _probabilities(queries, keys, rows, seen, ctx.documents)
            dp = torch.bmm(dout[:, rows], values[:, seen].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, rows] = torch.baddbmm(ds.new_empty(()), ds, keys[:, seen], beta=0, alpha=scale)
            dk[:, seen].add_(torch.bmm(ds.transpose(1, 2), queries[:, rows]), alpha=scale)
            dv[:, seen].add_(torch.bmm(p.transpose(1, 2), dout[:, rows]))
        return _tokens_first(dq, q), _tokens_first(dk, k), _tokens_first(dv, v), None


def _blocks(queries: Tensor, keys: Tensor, documents: Documents | None) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys that any of them sees) of each block of rows."""
    length, before = queries.shape[1], keys.shape[1] - queries.shape[1]
    for a in range(0, length, BLOCK):
        end = min(a + BLOCK, length)
        first = 0  # also of a dry run, which has shapes alone
        if documents is not None and not documents.starts.is_meta:
            first = int(documents.starts[:, before + a].min())
        yield slice(a, end), slice(first, before + end)


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
    starts = None if documents is None else documents.starts[:, seen.stop - count : seen.stop]
    last = seen.start if starts is None or starts.is_meta else int(starts.max())
    if starts is not None and last > seen.start:  # keys of other documents lie before it
        others = torch.arange(seen.start, last, device=scores.device) < starts[:, :, None]
        hidden = scores.new_zeros(others.shape).masked_fill_(others, -torch.inf)  # [b, r, last - start]
        scores.view(len(others), -1, *scores.shape[1:])[..., : last - seen.start].add_(hidden[:, None])
    return torch.softmax(scores, -1)


def _te_attention(target: Target) -> MakeAttention:
    """cuDNN's or flash attention, by Transformer Engine, which else forms all scores."""
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
            fewer = "_bottom_right" * (q.shape[1] < k.shape[1])
            if documents is None:
                out: Tensor = attention(q, k, v, attn_mask_type=f"causal{fewer}")
                return out.view(*q.shape)
            packed: dict[str, Any] = {"qkv_format": "thd", "attn_mask_type": f"padding_causal{fewer}"}
            ends, key_ends = documents.cu_seqlens, documents.cu_keys if fewer else documents.cu_seqlens
            packed |= {"cu_seqlens_q": ends, "cu_seqlens_kv": key_ends}
            packed |= {"max_seqlen_q": q.shape[1], "max_seqlen_kv": k.shape[1]}
            out = attention(q.flatten(0, 1), documents.packed(k), documents.packed(v), **packed)
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
        packed = q.flatten(0, 1), documents.packed(k), documents.packed(v)
        ends, longest = (documents.cu_seqlens, documents.cu_keys), (q.shape[1], k.shape[1])
        grouped = {"enable_gqa": True} if k.shape[2] < q.shape[2] else {}
        out: Tensor = varlen(*packed, *ends, *longest, window_size=(-1, 0), **grouped)
        return out.view(q.shape)

    return lambda num_heads, num_kv_heads, head_dim: attend


def _blocked_attention(target: Target) -> MakeAttention:
    if target.device.type == "cuda" or target.dtype not in (torch.bfloat16, torch.float16):
        raise Unsupported("16-bit formats on a CPU only")
    return lambda num_heads, num_kv_heads, head_dim: blocked_attention


def _formula(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Of all scores: what every implementation is compared with."""
    k, v = (part.repeat_interleave(q.shape[2] // part.shape[2], 2) for part in (k, v))
    starts = torch.zeros(k.shape[:2], device=q.device) if documents is None else documents.starts
    mask = _mask(starts, q.dtype)[:, None, -q.shape[1] :]
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) * q.shape[3] ** -0.5 + mask
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
        for rows, masked in product((128, 40)[: 1 + target.fewer], (False, True)[: 1 + target.documents]):
            q, k, v = packed.split(heads, 2)
            out = attend(q[:, -rows:], k, v, Documents.of(starts, rows) if masked else None)
            (grads,) = torch.autograd.grad((out * dout[:, -rows:]).sum(), packed)
            where = " within documents" * masked + " of grouped heads" * (kv < 4) + " of the last rows" * (rows < 128)
            found = zip("qkv", grads.split(heads, 2), strict=True)
            results += [(f"output{where}", out), *((f"gradient of {x}{where}", grad) for x, grad in found)]
    return results


ATTENTION = Operation(
    [(TE, _te_attention), ("blocks of matrix products", _blocked_attention), ("torch varlen_attn", _varlen_attention)],
    ("torch scaled_dot_product_attention", lambda target: lambda num_heads, num_kv_heads, head_dim: sdpa),
    _results,
    (2e-2, 4e-2, 4e-2, 4e-2),
    plain=lambda num_heads, num_kv_heads, head_dim: _formula,
    named=[("attention in fp32", Target.on_cpu(lambda num_heads, num_kv_heads, head_dim: sdpa_in_fp32))],
)
