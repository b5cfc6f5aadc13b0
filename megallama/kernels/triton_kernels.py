"""RMSNorm, RoPE, SwiGLU, the loss, and rounding to fp8 in Triton: operands are read and written once.

Sums and products are formed in fp32 and rounded once; without atomics a call repeated gives the same bits.
Rows are counted in 64 bits.  Checking a kernel before it is selected also compiles it: for operands' formats,
the constants in capitals, and which numbers are 1 or multiples of 16, but those not to be specialized.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megallama.kernels.candidate import Unsupported

COLUMNS = 1024  # of a row that one program of SwiGLU computes
PAIRS = 64  # of elements that one step of RoPE rotates in each head; a head of 128 is one step
HEADS = 16  # that one step of RoPE rotates
SUMS = 32, 32  # rows and columns of a step of the sum over programs
WIDEST = 8192  # row that a program of RMSNorm keeps in registers; wider ones spill
LANES, EACH = 256, 8  # a step of the loss's first kernel: 256 maxima and sums of eight columns
GRAD_COLUMNS = 2048  # of a row that one program of the second computes
ELEMENTS, PROGRAMS = 8192, 1024  # of the first kernel of fp8: in a step, at most
TILE = 64, 128  # rows and columns of the tensor that one program of the second rounds


@triton.jit
def _read(at, there):
    return tl.load(at, there, other=0.0).to(tl.float32)


@triton.jit
def _norm(x, branch, weight, total, out, eps, columns, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    there = at < columns
    start = tl.program_id(0).to(tl.int64) * columns
    row = _read(x + start + at, there)
    if branch is not None:
        added = (row + _read(branch + start + at, there)).to(out.dtype.element_ty)
        tl.store(total + start + at, added, there)
        row = added.to(tl.float32)  # the rounded sum, of which the backward forms the norm again
    rstd = tl.rsqrt(tl.sum(row * row, 0) / columns + eps)
    scale = _read(weight + at, there)
    tl.store(out + start + at, (row * rstd * scale).to(out.dtype.element_ty), there)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward(dy, x, weight, residual, dx, again, partial, eps, rows, columns, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    there = at < columns
    scale = _read(weight + at, there)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * columns
        normed = _read(x + start + at, there)
        grad = _read(dy + start + at, there)
        rstd = tl.rsqrt(tl.sum(normed * normed, 0) / columns + eps)
        normed = normed * rstd
        product = grad * normed
        mean = tl.sum(product * scale, 0) / columns
        if again is not None:
            tl.store(again + start + at, (normed * scale).to(dx.dtype.element_ty), there)
        grad = (grad * scale - normed * mean) * rstd
        if residual is not None:
            grad += _read(residual + start + at, there)
        tl.store(dx + start + at, grad.to(dx.dtype.element_ty), there)
        total += product
    tl.store(partial + tl.program_id(0).to(tl.int64) * columns + at, total, there)


@triton.jit(do_not_specialize=["main_grad", "programs", "overwrite"])
def _add_up(partial, main_grad, programs, overwrite, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at, rows = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, programs, ROWS):
        there = (first + rows < programs) & (at < columns)[None, :]
        total += tl.load(partial + (first + rows) * columns + at[None, :], there, other=0.0)
    before = tl.load(main_grad + at, (at < columns) & (overwrite == 0), other=0.0)
    tl.store(main_grad + at, before + tl.sum(total, 0), at < columns)


def add_norm(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What `pointwise.add_norm` does, on [T, h]; a program has a row in registers."""
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    total, out = x if branch is None else torch.empty_like(x), torch.empty_like(x)
    _norm[(x.shape[0],)](x, branch, weight, total, out, eps, x.shape[1], **_row(x.shape[1]))
    return total, out


def add_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, main_grad: Tensor, overwrite: bool,
    again: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As `pointwise.add_norm_backward`: programs add up rows, a second kernel programs."""
    dy, x, residual = dy.contiguous(), x.contiguous(), None if residual is None else residual.contiguous()
    (rows, columns), dx, normed = x.shape, torch.empty_like(x), torch.empty_like(x) if again else None
    at_once = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 4
    programs = min(rows, at_once)
    partial = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    constants = _row(columns)
    _norm_backward[(programs,)](dy, x, weight, residual, dx, normed, partial, eps, rows, columns, **constants)
    grid = (triton.cdiv(columns, SUMS[1]),)
    _add_up[grid](partial, main_grad, programs, int(overwrite), columns, ROWS=SUMS[0], COLUMNS=SUMS[1])
    return dx, normed


def _row(columns: int) -> dict[str, int]:
    """Constants of a program with a row in registers: 16 elements in each thread."""
    if columns > WIDEST:
        raise Unsupported(f"rows of {columns} elements; at most {WIDEST} fit in registers")
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": min(32, max(1, block // 512))}


@triton.jit
def _swiglu(packed, out, columns, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < columns
    start = packed + row * 2 * columns
    gate = tl.load(start + at, there).to(tl.float32)
    up = tl.load(start + columns + at, there).to(tl.float32)
    tl.store(out + row * columns + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), there)


@triton.jit
def _swiglu_backward(dout, packed, grad, again, columns, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < columns
    start, to = packed + row * 2 * columns, grad + row * 2 * columns
    d = tl.load(dout + row * columns + at, there).to(tl.float32)
    gate = tl.load(start + at, there).to(tl.float32)
    up = tl.load(start + columns + at, there).to(tl.float32)
    prob = tl.sigmoid(gate)
    tl.store(to + at, (d * up * prob * (1 + gate * (1 - prob))).to(grad.dtype.element_ty), there)
    tl.store(to + columns + at, (d * gate * prob).to(grad.dtype.element_ty), there)
    if again is not None:
        tl.store(again + row * columns + at, (gate * prob * up).to(grad.dtype.element_ty), there)


def swiglu(gate_up: Tensor) -> Tensor:
    """What `pointwise.swiglu` does: [T, 2f] -> [T, f]."""
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, columns)
    _swiglu[(rows, triton.cdiv(columns, COLUMNS))](gate_up.contiguous(), out, columns, BLOCK=COLUMNS)
    return out


def swiglu_backward(dout: Tensor, gate_up: Tensor, again: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient [T, 2f], with `again` what `swiglu` made as well; `dout` stays."""
    rows, columns = dout.shape
    dout, gate_up = dout.contiguous(), gate_up.contiguous()
    grad, product = torch.empty_like(gate_up), torch.empty_like(dout) if again else None
    _swiglu_backward[(rows, triton.cdiv(columns, COLUMNS))](dout, gate_up, grad, product, columns, BLOCK=COLUMNS)
    return grad, product


@triton.jit
def _turn(x, out, cos, sin, sign, heads, x_head, out_head, half, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """Rotate a token's heads, each at `x` + head * x_head, by its row of the tables."""
    for first in range(0, half, PAIRS):
        at = first + tl.arange(0, PAIRS)
        c = tl.load(cos + at, at < half, other=0.0)[None, :]
        s = tl.load(sin + at, at < half, other=0.0)[None, :] * sign
        for head in range(0, heads, HEADS):
            rows = head + tl.arange(0, HEADS)[:, None]
            there = (rows < heads) & (at < half)[None, :]
            source, to = x + rows * x_head + at[None, :], out + rows * out_head + at[None, :]
            a = _read(source, there)
            b = _read(source + half, there)
            tl.store(to, (a * c - b * s).to(out.dtype.element_ty), there)
            tl.store(to + half, (b * c + a * s).to(out.dtype.element_ty), there)


@triton.jit(do_not_specialize=["seq", "heads"])
def _rotate(
    x, out, cos, sin, seq, heads, half, x_sample, x_token, x_head, out_sample, out_token, out_head, table_sample,
    HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    sample, at = (tl.program_id(0) // seq).to(tl.int64), (tl.program_id(0) % seq).to(tl.int64)
    cos, sin = cos + sample * table_sample + at * half, sin + sample * table_sample + at * half
    start, to = x + sample * x_sample + at * x_token, out + sample * out_sample + at * out_token
    _turn(start, to, cos, sin, 1.0, heads, x_head, out_head, half, HEADS, PAIRS)


@triton.jit(do_not_specialize=["sign", "seq", "q_heads", "heads"])
def _rotate_apart(
    q, k, v, q_out, k_out, v_out, cos, sin, sign, seq, q_heads, heads, half,
    q_sample, q_token, q_head, k_sample, k_token, k_head, v_sample, v_token, v_head,
    q_sample_out, q_token_out, q_head_out, k_sample_out, k_token_out, k_head_out, v_sample_out, v_token_out, v_head_out,
    table_sample, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    sample, at = (tl.program_id(0) // seq).to(tl.int64), (tl.program_id(0) % seq).to(tl.int64)
    cos, sin = cos + sample * table_sample + at * half, sin + sample * table_sample + at * half
    start, to = q + sample * q_sample + at * q_token, q_out + sample * q_sample_out + at * q_token_out
    _turn(start, to, cos, sin, sign, q_heads, q_head, q_head_out, half, HEADS, PAIRS)
    start, to = k + sample * k_sample + at * k_token, k_out + sample * k_sample_out + at * k_token_out
    _turn(start, to, cos, sin, sign, heads, k_head, k_head_out, half, HEADS, PAIRS)
    start, to = v + sample * v_sample + at * v_token, v_out + sample * v_sample_out + at * v_token_out
    for first in range(0, 2 * half, 2 * PAIRS):
        column = first + tl.arange(0, 2 * PAIRS)[None, :]
        for head in range(0, heads, HEADS):
            rows = head + tl.arange(0, HEADS)[:, None]
            there = (rows < heads) & (column < 2 * half)
            tl.store(to + rows * v_head_out + column, tl.load(start + rows * v_head + column, there), there)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """As `pointwise.apply_rope`: x [b, s, heads, d] into `out`, perhaps x; contiguous along d."""
    b, s, heads, d = x.shape
    tables, per_sample = _tables(cos, sin)
    strides = *x.stride()[:3], *out.stride()[:3], per_sample
    _rotate[(b * s,)](x, out, *tables, s, heads, d // 2, *strides, HEADS=HEADS, PAIRS=PAIRS)


def rotate_parts(parts: Sequence[Tensor], cos: Tensor, sin: Tensor, out: Sequence[Tensor], back: bool) -> None:
    """What `pointwise.rotate_parts` does, in one launch."""
    (b, s, n, d), (tables, per_sample) = parts[0].shape, _tables(cos, sin)
    parts = [part if part.stride(3) == 1 else part.contiguous() for part in parts]
    strides = [stride for part in (*parts, *out) for stride in part.stride()[:3]]
    counts = -1.0 if back else 1.0, s, n, parts[1].shape[2], d // 2
    _rotate_apart[(b * s,)](*parts, *out, *tables, *counts, *strides, per_sample, HEADS=HEADS, PAIRS=PAIRS)


def _tables(cos: Tensor, sin: Tensor) -> tuple[list[Tensor], int]:
    """Angles [s, 1, d/2] or [b, s, 1, d/2], contiguous, and the distance between samples."""
    return [cos.contiguous(), sin.contiguous()], cos.numel() // len(cos) if cos.dim() == 4 else 0


# Tensor-parallel ranks reduce between the two kernels of the loss. The first reads the logits and writes two numbers a
# row, the second writes their gradient over them: two reads and a write where torch's own make about twelve.


@triton.jit(do_not_specialize=["index", "log_sum", "picked"])
def _log_sums(logits, index, log_sum, picked, columns, stride, LANES: tl.constexpr, EACH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    # not -inf: beyond a short row the difference of two would be no number
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
    """The first pass of `CrossEntropy`, which leaves logits [r, v] as they are."""
    shape = logits.shape[1], logits.stride(0)
    _log_sums[(len(logits),)](logits, index, log_sum, picked, *shape, LANES=LANES, EACH=EACH, num_warps=8)


def gradient_(
    logits: Tensor, index: Tensor, at_label: Tensor, scale: Tensor, log_sum: Tensor | None, total: Tensor
) -> None:
    """The second pass of `CrossEntropy`: exp(logits - total) * scale, less `at_label`."""
    grid, shape = (len(logits), triton.cdiv(logits.shape[1], GRAD_COLUMNS)), (logits.shape[1], logits.stride(0))
    _gradient[grid](logits, index, at_label, scale, total, *shape, BLOCK=GRAD_COLUMNS, num_warps=8)


# Rounding to fp8: the largest element, then all, by rows and transposed at once. Values are those of `gemm.quantize`:
# a power of two scales a tensor, which rounds nothing.


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
    # of the largest power of two by which it stays within the format
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
    """x [r, c] in `dtype` as it lies and transposed, as asked, each with its inverse scale."""
    (r, c), x, new = x.shape, x.contiguous(), []
    partial, inverse = x.new_empty(PROGRAMS, dtype=torch.float32), x.new_empty((), dtype=torch.float32)
    programs = min(PROGRAMS, triton.cdiv(x.numel(), ELEMENTS))
    _largest[(programs,)](x, partial, x.numel(), BLOCK=ELEMENTS, num_warps=8)
    new = [x.new_empty(shape, dtype=dtype) if on else None for shape, on in (((r, c), rows), ((c, r), columns))]
    grid, limit = (triton.cdiv(r, TILE[0]), triton.cdiv(c, TILE[1])), torch.finfo(dtype).max
    sizes = {"ROWS": TILE[0], "COLUMNS": TILE[1], "PARTS": PROGRAMS}
    _quantize[grid](x, partial, programs, limit, *new, inverse, r, c, **sizes, num_warps=8)
    return [(values, inverse) for values in new if values is not None]
