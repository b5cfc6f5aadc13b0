"""The softmax of the loss as two Triton kernels, between which tensor-parallel ranks reduce.

The first reads the logits and writes two numbers a row, the second writes their gradient over them:
two reads and a write where torch's own make about twelve.  All is in fp32 and rounded once; offsets
have 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LANES, EACH = 256, 8  # a step of the first kernel: 256 maxima and sums, eight columns for each
COLUMNS = 2048  # of a row that one program of the second kernel computes


@triton.jit(do_not_specialize=["index", "log_sum", "picked"])
def _log_sums(logits, index, log_sum, picked, columns, stride, LANES: tl.constexpr, EACH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    # not -inf: in lanes beyond a short row the difference of two infinities would be no number
    top, total = tl.full([LANES], -3.0e38, tl.float32), tl.zeros([LANES], tl.float32)
    for first in range(0, columns, LANES * EACH):
        at = first + tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
        x = tl.load(start + at, at < columns, other=-float("inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 1))  # in a thread: one more exponential for eight columns
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new[:, None]), 1)
        top = new
    highest = tl.max(top, 0)
    tl.store(log_sum + row, highest + tl.log(tl.sum(total * tl.exp(top - highest), 0)))
    tl.store(picked + row, tl.load(start + tl.load(index + row)).to(tl.float32))


@triton.jit(do_not_specialize=["index", "at_label", "scale", "total"])
def _gradient(logits, index, at_label, scale, total, columns, stride, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there, place = at < columns, logits + row * stride + at
    x = tl.load(place, there, other=0.0).to(tl.float32)
    grad = tl.exp(x - tl.load(total + row)) * tl.load(scale + row)
    grad = tl.where(at == tl.load(index + row), grad - tl.load(at_label + row), grad)
    tl.store(place, grad.to(logits.dtype.element_ty), there)


def log_sums(logits: Tensor, index: Tensor, log_sum: Tensor, picked: Tensor, scale: Tensor | None) -> None:
    """The first pass of `pointwise.CrossEntropy`, which leaves logits [r, v] as they are."""
    shape = logits.shape[1], logits.stride(0)
    _log_sums[(len(logits),)](logits, index, log_sum, picked, *shape, LANES=LANES, EACH=EACH, num_warps=8)


def gradient_(
    logits: Tensor, index: Tensor, at_label: Tensor, scale: Tensor, log_sum: Tensor | None, total: Tensor
) -> None:
    """The second pass of `pointwise.CrossEntropy`: exp(logits - total) * scale, less `at_label` at the label."""
    grid, shape = (len(logits), triton.cdiv(logits.shape[1], COLUMNS)), (logits.shape[1], logits.stride(0))
    _gradient[grid](logits, index, at_label, scale, total, *shape, BLOCK=COLUMNS, num_warps=8)
