"""Rounding to fp8 as two Triton kernels: the largest element, then all, by rows and transposed at once.

Values are those of `gemm.quantize`: a power of two scales a tensor, which rounds nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS, PROGRAMS = 8192, 1024  # of the first kernel: in a step, at most
ROWS, COLUMNS = 64, 128  # of the tensor that one program of the second kernel rounds


@triton.jit
def _largest(x, partial, count, BLOCK: tl.constexpr):
    top = tl.zeros([BLOCK], tl.float32)
    for step in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        at = tl.cast(step, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        size = tl.abs(tl.load(x + at, at < count, other=0.0).to(tl.float32))
        top = tl.maximum(top, tl.where(size != size, float("inf"), size))  # a maximum passes over NaN
    tl.store(partial + tl.program_id(0), tl.max(top, 0))


@triton.jit(do_not_specialize=["programs"])
def _quantize(
    x, partial, programs, limit, by_rows, by_columns, inverse, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    part = tl.arange(0, PARTS)
    largest = tl.max(tl.load(partial + part, part < programs, other=0.0), 0)
    # the exponent of the largest power of two by which it stays within the format
    bits = (limit / tl.maximum(largest, 1e-30)).to(tl.int32, bitcast=True)
    exponent = tl.minimum(tl.maximum((bits >> 23) - 127, -100), 100)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = (row < rows) & (column < columns)
    value = tl.load(x + row * columns + column, there, other=0.0).to(tl.float32) * scale
    if by_rows is not None:
        tl.store(by_rows + row * columns + column, value.to(by_rows.dtype.element_ty), there)
    if by_columns is not None:
        turned = tl.trans(value.to(by_columns.dtype.element_ty))
        tl.store(by_columns + tl.trans(column) * rows + tl.trans(row), turned, tl.trans(there))
    if tl.program_id(0) + tl.program_id(1) == 0:  # fp8 would hide an infinity
        back = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        tl.store(inverse, tl.where(largest < float("inf"), back, float("nan")))


def quantized(x: Tensor, dtype: torch.dtype, rows: bool, columns: bool) -> list[tuple[Tensor, Tensor]]:
    """x [r, c] in `dtype` as it lies and transposed, as asked, each with the inverse of the scale."""
    (r, c), x, new = x.shape, x.contiguous(), []
    partial, inverse = x.new_empty(PROGRAMS, dtype=torch.float32), x.new_empty((), dtype=torch.float32)
    programs = min(PROGRAMS, triton.cdiv(x.numel(), ELEMENTS))
    _largest[(programs,)](x, partial, x.numel(), BLOCK=ELEMENTS, num_warps=8)
    new = [x.new_empty(shape, dtype=dtype) if on else None for shape, on in (((r, c), rows), ((c, r), columns))]
    grid, limit = (triton.cdiv(r, ROWS), triton.cdiv(c, COLUMNS)), torch.finfo(dtype).max
    sizes = {"ROWS": ROWS, "COLUMNS": COLUMNS, "PARTS": PROGRAMS}
    _quantize[grid](x, partial, programs, limit, *new, inverse, r, c, **sizes, num_warps=8)
    return [(values, inverse) for values in new if values is not None]
