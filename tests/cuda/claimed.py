"""A GPU that is not there: tensors on the meta device that say they are on CUDA.

All branches and kernel candidates of a GPU without Transformer Engine and apex run, on shapes and formats alone, so
real sizes cost nothing.  What torch decides by the device is decided here as it is on CUDA: which kernel a norm and
attention are.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megallama.config.load import load
from megallama.config.schema import Config
from megallama.kernels.attention import Documents
from megallama.kernels.candidate import TRITON, Operation, Target, accumulate_dtype
from megallama.kernels.select import Kernels, select_kernels
from megallama.layers.batch import MicroBatch
from megallama.train.assemble import DTYPES

META, GPU = torch.device("meta"), torch.device("cuda")
HALF = (torch.bfloat16, torch.float16)
aten = torch.ops.aten


def settings(*words: str, ranks: int = 1, documents: bool = False) -> Config:
    """The configuration that a command line with these words makes; with samples of several documents."""
    config = load(None, ["data.synthetic=true", *words], ranks=ranks)
    return config.model_copy(update={"data": config.data.model_copy(update={"document_mask": documents})})


def kernels_on_cuda(config: Config, triton: bool = False) -> Kernels:
    """What a GPU of compute capability 9.0 takes: selection is the real one, but there are no values to compare.

    With `triton` within `counted_triton` only: its own kernels know nothing of the meta device.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Operation, "check", lambda *_: None)
        patch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
        target = Target(GPU, DTYPES[config.precision.dtype], documents=config.data.document_mask)
        without = [*config.run.without_kernels, *([] if triton else [TRITON])]
        return select_kernels(target, fp8=config.precision.fp8, without=without)


def batches(config: Config, count: int) -> list[MicroBatch]:
    """Equal micro-batches; with documents two begin in each sample."""
    b, masked = config.batch, config.data.document_mask
    tokens = torch.zeros(b.micro_batch_size, b.seq_length, dtype=torch.int64)
    starts = tokens.clone()
    starts[:, b.seq_length // 2 :] = b.seq_length // 2
    mask, documents = (torch.ones_like(tokens).bool(), Documents.of(starts)) if masked else (None, None)
    return [MicroBatch(tokens, tokens, mask, documents).to(META) for _ in range(count)]


@contextmanager
def claimed() -> Iterator[None]:
    """Within the ``with`` block tensors on the meta device are on CUDA."""
    importlib.import_module("torch._dynamo")  # shapes of some operations come from Python, which imports it: unpatched
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda t: t.device.type == "meta"))
        patch.setattr(aten, "_fused_rms_norm", _fused_rms_norm)
        patch.setattr(F, "rms_norm", lambda x, *named: aten._fused_rms_norm(x, *named)[0])
        patch.setattr(F, "scaled_dot_product_attention", _attention)
        patch.setattr(torch, "_scaled_mm", _scaled_mm)
        yield


def _fused_rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """One kernel, of which a product stands for reading and writing; and 1 / rms of each row."""
    assert tuple(shape) == x.shape[-1:] == weight.shape and x.dtype == weight.dtype and eps > 0
    return torch.mul(x, weight), x.new_empty((*x.shape[:-1], 1), dtype=accumulate_dtype(x.dtype))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, enable_gqa: bool = False
) -> Tensor:
    """Flash attention of 16 bits without a mask, else the memory-efficient kernel; both stop at 64 bits.

    A mask of booleans becomes one in q's format, in a pass of its own.
    """
    assert not enable_gqa or mask is None, "no fused kernel takes both"
    assert q.dtype in (*HALF, torch.float32), "no fused kernel"
    if mask is None and q.dtype in HALF:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    if enable_gqa:
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    if mask is not None and mask.dtype == torch.bool:
        zero, hidden = (torch.scalar_tensor(x, dtype=q.dtype, device=q.device) for x in (0.0, -torch.inf))
        mask = torch.where(mask, zero, hidden)
    if mask is not None:
        assert mask.dtype == q.dtype, f"a mask in {mask.dtype} for {q.dtype}"
        mask = mask.expand(q.shape[0], q.shape[1], -1, -1)
    train = torch.is_grad_enabled()
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, train, 0.0, is_causal)[0]


_plain_scaled_mm = torch._scaled_mm


def _scaled_mm(a: Tensor, b: Tensor, *, out: Tensor | None = None, **named: Any) -> Tensor:
    """With `out`, for which torch has no meta kernel, the shapes are those of the product without it."""
    assert a.is_contiguous() and b.t().is_contiguous(), "Hopper reads both operands along the sum"
    assert all(n % 16 == 0 for n in (*a.shape, b.shape[1])), (a.shape, b.shape)
    product = _plain_scaled_mm(a, b, **named)
    if out is None:
        return product
    assert (out.shape, out.dtype) == (product.shape, product.dtype)
    return out
