"""Every Triton kernel on a CPU, in Triton's interpreter, beside float64; run as a program, it prints its findings.

Triton decides when it is imported whether kernels are interpreted (TRITON_INTERPRET=1), so this has a
process of its own: `python -m tests.cuda.interpreted FOLDER`, with a folder that sparse files may lie in.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megallama.kernels import gemm
from megallama.kernels import pointwise as plain
from megallama.kernels.candidate import Target, Unsupported, accumulate_dtype
from megallama.kernels.gemm import FP8_PRODUCTS
from megallama.kernels.select import OPERATIONS, select_kernels
from tests import small

CPU = torch.device("cpu")
FORMATS = (torch.bfloat16, torch.float32)
FAR = 2**30 + 16  # elements between rows, so that the third one begins beyond 2^31

Errors = Iterator[tuple[str, float]]  # what was compared, and how far it is from what it should be


def error(own: Tensor, want: Tensor) -> float:
    """Relative to the norm of what should be."""
    return float((own.double() - want.double()).norm() / want.double().norm())


def unless(true: bool) -> float:
    """An error for what is right or wrong."""
    return 0.0 if true else float("inf")


def rand(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def as_selected(name: str, made: Any, dtype: torch.dtype) -> Errors:
    """The comparison before which no kernel is selected; rows of 80 columns do not fill a program."""
    operation, target = OPERATIONS[name], Target(CPU, dtype, documents=True, width=80)
    exact = replace(target, exact=True)
    wanted = operation.results(operation.last[1](exact), exact)
    for (what, result), (_, want) in zip(operation.results(made, target), wanted, strict=True):
        yield what, error(result, want)


def norms(ops: Any, args: Any, again: bool, rounded: torch.dtype | None = None) -> list[Tensor]:
    """(sum, its norm; gradients without and with another one, the norm again, the weight's gradient).

    The sum is rounded once, and what follows is of that.
    """
    x, branch, dy, weight = args
    total, normed = ops.add_norm(x, branch, weight, 1e-5)
    of = total if rounded is None else total.to(rounded).double()
    normed = normed if rounded is None else ops.add_norm(of, None, weight, 1e-5)[1]
    grad = torch.full(weight.shape, 7.0, dtype=accumulate_dtype(x.dtype))
    first = ops.add_norm_backward(dy, of, weight, 1e-5, None, grad, True, not again)
    second = ops.add_norm_backward(dy, of, weight, 1e-5, branch, grad, False, again)
    return [total, normed, first[0], second[0], (second if again else first)[1], grad]


def norm(k: ModuleType, dtype: torch.dtype) -> Errors:
    """Rows that programs do not share evenly, fewer rows than programs, columns that fill no block.

    Alone, after a sum and before one, with the norm made again; the weight's gradient written and added.
    """
    for rows, columns, added, again in ((7, 100, True, True), (3, 2, False, True), (9, 513, True, False)):
        x, dy, branch = (rand(rows, columns, dtype=dtype, seed=seed) for seed in range(3))
        args = [x, branch if added else None, dy, rand(columns, dtype=dtype)]
        own, repeated = norms(k, args, again), norms(k, args, again)
        want = norms(plain, [t if t is None else t.double() for t in args], again, dtype)
        for what, a, b in zip(("sum", "y", "dx", "dx and more", "y again", "dweight"), own, want, strict=True):
            yield f"{what} of {rows} x {columns}", error(a, b)
        yield "y and y again", unless(torch.equal(own[1], own[4]))
        yield "nothing to add", unless(added or own[0] is x)
        yield "the same bits again", unless(all(map(torch.equal, own, repeated)))
        yield "formats", unless([t.dtype for t in own] == [*[dtype] * 5, torch.float32])
    weight = args[3]
    x[1, 300], grad = torch.inf, torch.zeros(columns)
    bad, _ = k.add_norm_backward(dy, x, weight, 1e-5, None, grad, True, False)
    seen = bad[1].isnan().any() and grad.isnan().any() and bad[0].isfinite().all()
    yield "infinity is seen", unless(bool(seen))
    yield from as_selected("RMSNorm", (k.add_norm, k.add_norm_backward), dtype)


def swiglu(k: ModuleType, dtype: torch.dtype) -> Errors:
    """One column, fewer than a program computes, and a few more."""
    for rows, columns in ((3, 37), (2, 3), (2, 1027)):
        packed, dout = rand(rows, 2 * columns, dtype=dtype) * 4, rand(rows, columns, dtype=dtype, seed=1)
        kept, own = dout.clone(), (k.swiglu(packed), *k.swiglu_backward(dout, packed, True))
        want = plain.swiglu(packed.double()), plain.swiglu_backward(dout.double(), packed.double())
        alone, nothing = k.swiglu_backward(dout, packed, False)
        yield "y and y again", unless(torch.equal(own[0], own[2]))
        yield "no y", unless(nothing is None and torch.equal(alone, own[1]))
        for what, a, b in zip(("y", "gradient"), own[:2], want, strict=True):
            yield f"{what} of {rows} x {columns}", error(a, b)
        yield "the gradient above stays", unless(torch.equal(dout, kept))
    yield from as_selected("SwiGLU", (k.swiglu, k.swiglu_backward), dtype)


def rope(k: ModuleType, dtype: torch.dtype) -> Errors:
    """More heads than a step takes, heads of odd halves and of two steps, gradients that lie head by head."""
    for n, kv, d in ((17, 1, 10), (2, 2, 160)):
        packed, angles = rand(2, 2, n + 2 * kv, d, dtype=dtype), rand(2, 1, d // 2, dtype=torch.float32) * 9
        angles = angles if n == 2 else torch.stack([angles, angles.flip(0)])  # documents: tables of each sample
        cos, sin = angles.cos(), angles.sin()
        own, elsewhere, heads = packed.clone(), torch.empty_like(packed), n + kv
        k.apply_rope(own[:, :, :heads], cos, sin, own[:, :, :heads])
        k.apply_rope(packed[:, :, :heads], cos, sin, elsewhere[:, :, :heads])
        want = packed.double()
        plain.apply_rope(want[:, :, :heads], cos.double(), sin.double(), want[:, :, :heads])
        yield f"{n} + {kv} heads of {d}", error(own[:, :, :heads], want[:, :, :heads])
        yield "in place as elsewhere", unless(torch.equal(own[:, :, :heads], elsewhere[:, :, :heads]))
        yield "values stay", unless(torch.equal(own[:, :, heads:], packed[:, :, heads:]))
        parts = [rand(2, m, 2, d, dtype=dtype, seed=m).transpose(1, 2) for m in (n, kv, kv)]
        back, exact = torch.empty_like(packed), torch.empty_like(packed, dtype=torch.float64)
        into = [t.split([n, kv, kv], 2) for t in (back, exact)]
        k.rotate_parts(parts, cos, sin, into[0], True)
        plain.rotate_parts([part.double() for part in parts], cos.double(), sin.double(), into[1], True)
        apart = [torch.empty(2, 2, m, d, dtype=dtype) for m in (n, kv, kv)]
        k.rotate_parts(packed.split([n, kv, kv], 2), cos, sin, apart, False)
        yield f"{n}, {kv} and {kv} heads of {d} apart", unless(torch.equal(torch.cat(apart, 2), own))
        yield f"gradients of {n} + {kv} heads of {d}", error(back, exact)
        yield "gradients of values are copied", unless(torch.equal(back[:, :, heads:], parts[2]))
    yield from as_selected("RoPE", (k.apply_rope, k.rotate_parts), dtype)


def loss(k: ModuleType, dtype: torch.dtype) -> Errors:
    """Fewer columns than a step, just as many, one more; a part of the vocabulary; rows that count for nothing."""
    for columns in (5, 2048, 2049):
        wide, scale = rand(3, columns + 3, dtype=dtype) * 3, torch.tensor([0.5, 0.0, 2.0])
        logits, index = wide[:, :columns], torch.tensor([[columns - 1], [0], [columns // 2]])
        kept, (log_sum, picked) = wide.clone(), torch.empty(2, 3)
        k.log_sums(logits, index, log_sum, picked, None)
        yield "the first pass leaves logits", unless(torch.equal(wide, kept))
        yield f"sums of {columns}", error(log_sum, logits.double().logsumexp(1))
        yield f"picked of {columns}", unless(torch.equal(picked, logits.gather(1, index)[:, 0].float()))
        total, at_label = log_sum + torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 0.0, 0.0])
        want = (logits.double() - total.double()[:, None]).exp() * scale[:, None]
        want.scatter_add_(1, index, -at_label.double()[:, None])
        k.gradient_(logits, index, at_label, scale, log_sum, total)
        yield f"gradient of {columns}", max(error(logits[i], want[i]) for i in (0, 2))
        yield "a row that counts for nothing", unless(bool((logits[1] == 0).all()))
        yield "padding stays", unless(torch.equal(wide[:, columns:], kept[:, columns:]))
    for value, seen in ((torch.inf, True), (torch.nan, True), (-torch.inf, False)):
        logits = rand(1, 70, dtype=dtype)
        logits[0, 69] = value
        k.log_sums(logits, torch.zeros(1, 1, dtype=torch.int64), log_sum, picked, None)
        yield f"{value} is seen", unless(bool(log_sum[0].isnan()) is seen)
    yield from as_selected("cross entropy", (k.log_sums, k.gradient_), dtype)


def fp8(k: ModuleType, dtype: torch.dtype) -> Errors:
    """Bitwise what torch rounds, which is compared with arithmetic in tests/kernels; sizes that fill no program."""
    for kind in (gemm.FORWARD, gemm.GRADIENT):
        for rows, columns, size in ((70, 200, 1.0), (3, 5, 3e-3), (130, 129, 1e20), (64, 128, 1e-20), (9, 1000, 0.0)):
            x = rand(rows, columns, dtype=torch.float32) * size
            x[-1, -1] = 5 * size  # the largest is read last
            x = x.to(dtype)
            (by_rows, inverse), (by_columns, same) = k.quantized(x, kind, True, True)
            ((values, want),) = gemm.quantize(x, kind)
            yield f"{rows} x {columns} of {size}", unless(torch.equal(by_rows.float(), values.float()))
            yield "transposed", unless(torch.equal(by_columns.float(), values.float().t()) and same is inverse)
            yield "the inverse of the scale", unless(torch.equal(inverse, want))
            for layout, both in enumerate((by_rows, by_columns)):
                ((alone, _),) = k.quantized(x, kind, layout == 0, layout == 1)
                yield "one layout alone", unless(torch.equal(alone.float(), both.float()))
        x[0, 0], partial = 99.0, torch.zeros(2)
        k._largest[(2,)](x, partial, x.numel(), BLOCK=16)  # many steps of two programs
        yield "the largest, met early", unless(partial.max() == 99)
        for bad in (torch.inf, -torch.inf, torch.nan):
            x[5, 77] = bad
            yield f"{bad} is seen", unless(bool(k.quantized(x, kind, True, False)[0][1].isnan()))
    if dtype == torch.bfloat16:
        FP8_PRODUCTS.check(gemm.fp8_gemms(k.quantized), Target(CPU, dtype))


CASES: dict[str, Callable[[ModuleType, torch.dtype], Errors]] = {
    "RMSNorm": norm,
    "SwiGLU": swiglu,
    "RoPE": rope,
    "cross entropy": loss,
    "fp8 products": fp8,
}


def sparse(folder: Path, name: str, elements: int) -> Tensor:
    """Elements of bf16 in a file that has pages only where something was written."""
    path = str(folder / name)
    with open(path, "wb") as file:
        file.truncate(2 * elements)
    return torch.from_file(path, shared=True, size=elements, dtype=torch.bfloat16)


def far_loss(k: ModuleType, folder: Path) -> Errors:
    """Logits whose third row begins beyond 2^31 elements."""
    near = rand(3, 40, dtype=torch.bfloat16)
    logits = sparse(folder, "logits", 3 * FAR).as_strided((3, 40), (FAR, 1)).copy_(near)
    index, scale, (log_sum, picked) = torch.tensor([[1], [2], [39]]), torch.ones(3), torch.empty(2, 3)
    k.log_sums(logits, index, log_sum, picked, None)
    yield "sums", error(log_sum, near.double().logsumexp(1))
    k.gradient_(logits, index, scale, scale, None, log_sum)
    want = near.double().softmax(1)
    yield "gradient", error(logits, want.scatter_add_(1, index, -torch.ones(3, 1).double()))


def far_rope(k: ModuleType, folder: Path) -> Errors:
    """Heads whose third token lies beyond 2^31 elements."""
    near, angles = rand(1, 3, 3, 32, dtype=torch.bfloat16), rand(3, 1, 16, dtype=torch.float32)
    x = sparse(folder, "heads", 3 * FAR).as_strided(near.shape, (3 * FAR, FAR, 32, 1)).copy_(near)
    own, want, cos, sin = torch.empty_like(near), near.double(), angles.cos(), angles.sin()
    k.rotate_parts(x.split(1, 2), cos, sin, own.split(1, 2), True)
    plain.apply_rope(want[:, :, :2], cos.double(), -sin.double(), want[:, :, :2])
    yield "gradients", error(own, want)
    k.rotate_parts(own.split(1, 2), cos, sin, x.split(1, 2), False)
    yield "and back again", error(x, near)
    x.copy_(near)
    k.apply_rope(x, cos, sin, x)
    plain.apply_rope(exact := near.double(), cos.double(), sin.double(), exact)
    yield "rotated", error(x, exact)


def far_norm(k: ModuleType, folder: Path) -> Errors:
    """Rows of 2^30 columns, of which a program that is told of 64 sees these."""
    near, weight = rand(3, 64, dtype=torch.bfloat16), rand(64, dtype=torch.bfloat16)
    x, out, total = (sparse(folder, name, 3 * FAR).view(3, FAR) for name in ("x", "out", "total"))
    x[:, :64] = near
    k._norm[(3,)](x, None, weight, x, out, 1e-5, FAR, BLOCK=64)
    scale = (near.double().square().sum(1, keepdim=True) / FAR + 1e-5).rsqrt()
    yield "rows", error(out[:, :64], near.double() * scale * weight)
    k._norm[(3,)](x, x, weight, total, out, 1e-5, FAR, BLOCK=64)
    yield "sums", error(total[:, :64], near.double() * 2)
    partial = torch.zeros(1, 64)
    k._norm_backward[(1,)](x, x, weight, x, out, total, partial, 1e-5, 3, FAR, BLOCK=64)
    yield "weight", error(partial[0], (near.double().square() * scale).sum(0))
    yield "again", error(total[:, :64], near.double() * scale * weight)
    mean = (near.double().square() * scale * weight).sum(1, keepdim=True) / FAR
    yield (
        "gradient and more",
        error(out[:, :64], (near * weight.double() - near.double() * scale * mean) * scale + near),
    )


def far_swiglu(k: ModuleType, folder: Path) -> Errors:
    """Five rows of 2^29 columns, of which programs compute the first 1024."""
    columns, near = FAR // 2, rand(5, 2, 1024, dtype=torch.bfloat16)
    files = (("p", 2), ("o", 1), ("g", 2), ("a", 1))
    packed, out, grad, again = (sparse(folder, name, 5 * n * columns) for name, n in files)
    packed.view(5, 2, columns)[:, :, :1024] = near
    want = plain.swiglu(near.double().flatten(1))
    k._swiglu[(5, 1)](packed, out, columns, BLOCK=1024)
    yield "rows", error(out.view(5, columns)[:, :1024], want)
    k._swiglu_backward[(5, 1)](out, packed, grad, again, columns, BLOCK=1024)
    yield "rows again", error(again.view(5, columns)[:, :1024], want)
    want = plain.swiglu_backward(out.view(5, columns)[:, :1024].double(), near.double().flatten(1))
    yield "gradient", error(grad.view(5, 2, columns)[:, :, :1024].flatten(1), want)


def far_fp8(k: ModuleType, folder: Path) -> Errors:
    """Rows of 2^30 columns, of which one program rounds the first 128."""
    near = rand(3, 128, dtype=torch.bfloat16)
    x, out = sparse(folder, "x8", 3 * FAR).view(3, FAR), sparse(folder, "out8", 2 * FAR).view(gemm.FORWARD)
    x[:, :128] = near
    partial, inverse = near.abs().max().float().view(1), torch.empty(())
    sizes = {"ROWS": 64, "COLUMNS": 128, "PARTS": 2}
    k._quantize[(1, 1)](x, partial, 1, 448.0, out, None, inverse, 3, FAR, **sizes)
    ((values, want),) = gemm.quantize(near, gemm.FORWARD)
    own = out[: 3 * FAR].view(3, FAR)[:, :128]
    yield "rows", unless(torch.equal(own.float(), values.float()) and torch.equal(inverse, want))


FAR_CASES = {
    "RMSNorm": far_norm,
    "SwiGLU": far_swiglu,
    "RoPE": far_rope,
    "cross entropy": far_loss,
    "fp8 products": far_fp8,
}

FAULTS = [  # operation, what stands there, what stands there instead
    ("RMSNorm", "normed * mean) * rstd", "mean) * rstd"),
    ("RMSNorm", "row = added.to(tl.float32)", "row = row"),
    ("RMSNorm", "(normed * scale).to(dx", "normed.to(dx"),
    ("RMSNorm", "_read(residual +", "0 * _read(residual +"),
    ("RMSNorm", "range(0, programs, ROWS)", "range(ROWS, programs, ROWS)"),
    ("RMSNorm", "& (overwrite == 0)", "& (overwrite != 0)"),
    ("RMSNorm", "(first + rows < programs) &", ""),
    ("RMSNorm", "total += product", "total = product"),
    ("RMSNorm", "tl.sum(row * row, 0) / columns", "tl.sum(row * row, 0) / BLOCK"),
    ("RMSNorm", "tl.num_programs(0)):", "2 * tl.num_programs(0)):"),
    ("SwiGLU", "(1 - prob)", "prob"),
    ("SwiGLU", "to + columns + at, (d * gate", "to + columns + at, (d * up"),
    ("SwiGLU", "(gate * prob * up).to(grad", "(prob * up).to(grad"),
    ("SwiGLU", "triton.cdiv(columns, COLUMNS))](dout", "max(1, columns // COLUMNS))](dout"),
    ("RoPE", "a * c - b * s", "a * c + b * s"),
    ("RoPE", "sign, heads, k_head", "1.0, heads, k_head"),
    ("RoPE", "v_out + sample * v_sample_out", "v_out + sample * k_sample"),
    ("RoPE", "rows * v_head_out", "rows * v_head"),
    ("RoPE", "sin + sample * table_sample + at", "sin + at"),
    ("RoPE", "for first in range(0, half, PAIRS)", "for first in range(0, PAIRS, PAIRS)"),
    ("cross entropy", "total * tl.exp(top - new)", "total"),
    ("cross entropy", "(start + at, at < columns,", "(start + at, at <= columns,"),
    ("cross entropy", "grad - tl.load(at_label + row)", "grad - tl.load(scale + row)"),
    ("cross entropy", "logits + row * stride + at", "logits + row * columns + at"),
    ("cross entropy", " * tl.load(scale + row)", ""),
    ("fp8 products", 'tl.where(size != size, float("inf"), size)', "size"),
    ("fp8 products", "top = tl.maximum(top,", "top = tl.maximum(0.0,"),
    ("fp8 products", "(bits >> 23) - 127", "(bits >> 23) - 126"),
    ("fp8 products", "tl.trans(column) * rows", "tl.trans(column) * columns"),
    ("fp8 products", 'tl.where(largest < float("inf"), back, float("nan"))', "back"),
    ("fp8 products", "triton.cdiv(c, TILE[1]))", "max(1, c // TILE[1]))"),
]


def changed(source: str, old: str, new: str, folder: Path, number: int) -> ModuleType:
    """A module of this source with one passage changed."""
    assert old in source, old
    path = folder / f"fault_{number}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def survives(errors: Callable[[], Errors]) -> bool:
    """Whether a process of its own ends with small errors; one that writes anywhere may be killed."""
    if (pid := os.fork()) == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            status = 1
            try:
                status = int(not all(e < 1e-4 for _, e in errors()))
            finally:
                os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


def curve_of(tp: int, ops: plain.PointwiseOps | None, in_place: bool) -> Any:
    """Loss and norm of a step within documents; with other operations than torch's, with heads rotated as on a GPU."""
    config = small.small_config(
        precision={"dtype": "fp32"},
        batch={"global_batch_size": 1, "seq_length": 8},
        model={"num_layers": 1, "num_kv_heads": 2},
        parallel={"tp": tp},
    )
    data, starts = small.tokens(config, 1), small.documents(config, 1)
    chosen = select_kernels(Target(CPU, torch.float32))
    small.select_kernels = lambda *args: replace(chosen, pointwise=ops or chosen.pointwise)

    def run(rank: Any) -> Any:
        return small.curve(small.train(rank, data, starts=starts))

    if in_place:
        torch.Tensor.is_cuda = property(lambda self: True)
    try:
        return run(small.solo_rank(config)) if tp == 1 else small.on_threads(config, tp, run)[0]
    finally:
        if in_place:
            del torch.Tensor.is_cuda


def models(kernels: ModuleType) -> dict[str, float]:
    """How far a step with these kernels is from one with torch's; how far torch's in place are from elsewhere."""
    lock = threading.Lock()

    def one_at_a_time(call: Callable[..., Any]) -> Callable[..., Any]:
        def locked(*args: Any) -> Any:
            with lock:  # the interpreter has one program at a time
                return call(*args)

        return locked

    k = kernels
    calls = [k.add_norm, k.add_norm_backward, k.swiglu, k.swiglu_backward, k.apply_rope, k.rotate_parts]
    ours = plain.PointwiseOps(*map(one_at_a_time, [*calls, k.log_sums, k.gradient_]))
    found = {}
    for tp in (1, 2):
        want = curve_of(tp, None, False)
        found[f"torch's in place, tp={tp}"] = unless(curve_of(tp, None, True) == want)
        found[f"ours, tp={tp}"] = small.deviation(curve_of(tp, ours, True), want)
        found[f"ours elsewhere, tp={tp}"] = small.deviation(curve_of(tp, ours, False), want)
    return found


def rounded_to_fp8(convert: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter's conversion, which forgets the carry where an fp8 number is rounded up to a power of two."""
    import triton.language as tl

    kinds = {tl.float8e4nv: gemm.FORWARD, tl.float8e5: gemm.GRADIENT}

    def converted(values: Any, of: Any, to: Any, mode: Any) -> Any:
        if to not in kinds:
            return convert(values, of, to, mode)
        return torch.from_numpy(values.copy()).to(kinds[to]).view(torch.uint8).numpy()

    return converted


def main(folder: Path) -> dict[str, Any]:
    """Errors of every kernel and case; of every fault, whether anything showed it."""
    from triton.runtime import interpreter

    from megallama.kernels import triton_kernels

    interpreter._convert_float = rounded_to_fp8(interpreter._convert_float)
    # tensors are on the CPU already: no copies of them, which would fill the files
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None
    torch.set_num_threads(1)
    errors = {n: {str(d)[6:]: list(case(triton_kernels, d)) for d in FORMATS} for n, case in CASES.items()}
    source, survivors = inspect.getsource(triton_kernels), []
    for number, (name, old, new) in enumerate(FAULTS):
        module = changed(source, old, new, folder, number)
        if survives(partial(CASES[name], module, torch.float32)):
            survivors.append(f"{name}: {old} is {new or 'not there'}")
    far = {name: list(case(triton_kernels, folder)) for name, case in FAR_CASES.items()}
    for name, case in FAR_CASES.items():
        if survives(partial(case, changed(source, "tl.int64", "tl.int32", folder, -1), folder)):
            survivors.append(f"{name}: 32 bits")
    try:
        triton_kernels.add_norm(torch.ones(1, 8193), None, torch.ones(8193), 1e-5)
    except Unsupported as reason:
        wide = str(reason)
    return {
        "too wide": wide,
        "errors": errors,
        "survivors": survivors,
        "far": far,
        "models": models(triton_kernels),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
