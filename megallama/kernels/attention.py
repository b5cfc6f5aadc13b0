"""Causal attention on [b, s, heads, d]: Transformer Engine's, matrix products by blocks, torch's.

Each takes `documents`, None or where they begin: a query then attends to its own only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megallama.kernels.candidate import TE, Operation, Results, Target, Unsupported

Attend = Callable[..., Tensor]  # q [b, s, n, d], k and v [b, s, k, d], documents -> [b, s, n, d]
MakeAttention = Callable[[int, int, int], Attend]  # query heads, kv heads, head size
BLOCK = 128  # queries whose scores `blocked_attention` has in memory


@dataclass(frozen=True)
class Documents:
    """Where documents lie in b samples of s tokens, the first of them cut at the sample's front.

    Make one with `of`, on the host: how many there are decides a shape.
    starts: int64 [b, s], where in the sample each token's document begins.
    cu_seqlens: int32 [documents + 1], where each begins among all tokens, and b * s.
    """

    starts: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, starts: Tensor) -> Documents:
        """The documents that begin where `starts` [b, s] says."""
        begins = starts == torch.arange(starts.shape[1], device=starts.device)
        first = begins.reshape(-1).nonzero().reshape(-1)
        return cls(starts, torch.cat([first, first.new_tensor([starts.numel()])]).to(torch.int32))

    @cached_property
    def positions(self) -> Tensor:
        """[b, s]: of each token within its document, or within what the sample holds of it."""
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.starts

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[b, 1, s, s] in `dtype`: 0 where the row's query may attend to the column's key, else -inf; made once."""
        if dtype not in self._masks:
            at = torch.arange(self.starts.shape[1], device=self.starts.device)
            hidden = (at[None, :] > at[:, None]) | (at < self.starts[:, :, None])
            zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self._masks[dtype] = zeros.masked_fill_(hidden, -torch.inf)[:, None]
        return self._masks[dtype]

    @cached_property
    def _masks(self) -> dict[torch.dtype, Tensor]:
        return {}

    def each(self, change: Callable[[Tensor], Tensor]) -> Documents:
        """With both tensors changed: moved, pinned. What was made of them, masks, ends with the original."""
        return Documents(change(self.starts), change(self.cu_seqlens))


def sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """torch's fused attention; documents are a mask of s * s numbers per sample."""
    mask, group = None if documents is None else documents.mask(q.dtype), q.shape[2] // k.shape[2]
    if mask is not None and group > 1:  # no fused kernel takes both
        k, v, group = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2), 1
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=group > 1)
    return out.transpose(1, 2)


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
    if documents is not None:
        others = torch.arange(seen.start, seen.stop, device=scores.device) < documents.starts[:, rows, None]
        hidden = scores.new_zeros(others.shape).masked_fill_(others, -torch.inf)  # [b, r, e]
        scores.view(len(others), -1, *others.shape[1:]).add_(hidden[:, None])
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


def _results(make: MakeAttention, target: Target) -> Results:
    """Each head with its own keys, then in groups; within documents where they matter.

    q, k and v are parts of one packed tensor, as in training: some kernels depend on where they lie.
    """
    starts = torch.tensor([[0] * 70 + [70] * 58, [0] + [1] * 29 + [30] * 98], device=target.device)
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
)
