"""Documents on a GPU: torch's attention of packed documents, and where that is not there one document after another."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from megallama.kernels import attention
from megallama.kernels.attention import ATTENTION, Documents, sdpa
from megallama.kernels.candidate import Target, Unsupported, Wrong
from tests.cuda.claimed import claimed
from tests.cuda.packages import by_documents
from tests.cuda.test_budget import Case, step
from tests.small import CPU, documents, small_config, solo_rank, tokens, train

PACKED = dict(ATTENTION.candidates)["torch varlen_attn"]
ON_CUDA = Target(torch.device("cuda"), torch.bfloat16, documents=True)
HERE = replace(ON_CUDA, device=CPU)
DECLARED = inspect.signature(varlen.varlen_attn)


def varlen_attn(*args: Any, **named: Any) -> Tensor:
    """What `varlen_attn` of the installed torch computes, called as it is declared."""
    given = DECLARED.bind(*args, **named).arguments
    q, k, v, ends, key_ends = (given[name] for name in ("query", "key", "value", "cu_seq_q", "cu_seq_k"))
    for cut, x, most in ((ends, q, given["max_q"]), (key_ends, k, given["max_k"])):
        assert cut.dtype == torch.int32 and cut[0] == 0 and cut[-1] == len(x)
        assert int(cut.diff().max()) <= most and int(cut.diff().min()) > 0
    assert given["window_size"] == (-1, 0), "it would not be causal"
    assert given.get("enable_gqa", False) == (q.shape[1] != k.shape[1])
    assert all(part.dim() == 3 and part.stride(2) == 1 for part in (q, k, v))
    return by_documents(q, k, v, ends, key_ends)


def test_packed_documents_are_attended_to_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    ATTENTION.check(PACKED(ON_CUDA), replace(HERE, fewer=True))


def test_one_that_looks_ahead_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def ahead(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Tensor:
        return varlen_attn(q, k.roll(-1, 0), v, *rest, **named)

    monkeypatch.setattr(varlen, "varlen_attn", ahead)
    with pytest.raises(Wrong, match="output within documents differs"):
        ATTENTION.check(PACKED(ON_CUDA), HERE)


def test_it_is_for_documents_in_16_bits_on_a_gpu() -> None:
    for target, reason in (
        (HERE, "no CUDA device"),
        (replace(ON_CUDA, documents=False), "for documents only"),
        (replace(ON_CUDA, dtype=torch.float32), "16-bit formats only"),
    ):
        with pytest.raises(Unsupported, match=reason):
            PACKED(target)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_mask_of_numbers_is_bitwise_that_of_booleans(dtype: torch.dtype, kv_heads: int) -> None:
    """In which torch turned it in every call before."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, 12, n, 8, generator=generator, dtype=torch.float64).to(dtype) for n in (4, kv_heads, kv_heads)
    )
    packed = Documents.of(torch.tensor([[0] * 5 + [5] * 7, [0, 1, *[2] * 10]]))
    masks = packed.masks(dtype)
    assert len(masks) == 2 and packed.masks(dtype) is masks
    visible = [mask == 0 for mask in masks if mask is not None and mask.dtype == dtype]
    for one, mask in zip(visible, masks, strict=True):
        assert torch.equal(one | mask.isneginf(), torch.ones_like(one))
    same = [part.repeat_interleave(4 // part.shape[2], 2).transpose(1, 2) for part in (q, k, v)]
    want = F.scaled_dot_product_attention(*same, torch.stack(visible)[:, None]).transpose(1, 2)
    assert torch.equal(sdpa(q, k, v, packed), want)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_a_mask_is_made_once_a_micro_batch_and_gone_after_it(monkeypatch: pytest.MonkeyPatch, recompute: str) -> None:
    config = small_config(data={"document_mask": True}, memory={"recompute": recompute})
    rank, made, alive = solo_rank(config), list[weakref.ref[Tensor]](), []
    plain = Documents.masks

    def masks(self: Documents, dtype: torch.dtype) -> list[Tensor | None]:
        (found,) = plain(self, dtype)
        assert found is not None, "several documents in every sample"
        if not any(ref() is found for ref in made):
            made.append(weakref.ref(found))
        alive.append(sum(ref() is not None for ref in made))
        return [found]

    monkeypatch.setattr(attention.Documents, "masks", masks)
    starts = documents(config, 1)
    starts[..., 4:] = starts[..., 4:].clamp(min=4)
    results = train(rank, tokens(config, 1), starts=starts)
    assert len(results) == 1 and len(made) == 8, "micro-batches"
    assert len(alive) == 8 * 4 * (2 if recompute == "full" else 1), "calls, of each layer"
    assert max(alive) == 1, "masks at a time"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_square_of_the_sequence_is_made_on_a_gpu(dtype: str) -> None:
    """In fp32 there is no attention of packed documents; nor, on an older torch, in 16 bits."""
    words = ("model.preset=debug", "batch.seq_length=16384", "batch.micro_batch_size=2", f"precision.dtype={dtype}")
    case = Case((*words, "run.without_kernels=['attention: torch varlen_attn']"), documents=True)
    with claimed():
        counted = step(case, 1, 2)
    kind = "flash" if dtype == "bf16" else "efficient"
    assert counted.launches[f"_scaled_dot_product_{kind}_attention"] == 2 * 2 * 2, "documents"
    assert counted.largest < 16384 * 16384 // 4, "not of a document either"
