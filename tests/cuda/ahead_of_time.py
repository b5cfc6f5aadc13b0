"""Every Triton kernel compiled for A100 and H100 where there is neither; run as a program, it prints triton_table.tsv.

The functions that launch kernels are called with the shapes of LLaMA models; a driver that only names a
GPU makes Triton specialise and compile as it would there, and nothing is launched.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from megallama.kernels.candidate import TRITON, Target
from megallama.kernels.gemm import FORWARD, FP8_PRODUCTS, GRADIENT
from megallama.kernels.select import OPERATIONS

COLUMNS = ("kernel", "format", "capability", "registers", "spilled", "shared", "narrow")
FORMATS = ((80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float32))
Compiled = tuple[str, Any]  # name, what Triton has compiled


def rows_of(columns: int) -> Callable[[ModuleType, torch.dtype], None]:
    """RMSNorm both ways, as layers do: a branch is added before it, a gradient after."""

    def call(k: ModuleType, dtype: torch.dtype) -> None:
        x, weight = torch.empty(16, columns, dtype=dtype), torch.empty(columns, dtype=dtype)
        total, normed = k.add_norm(x, x.clone(), weight, 1e-5)
        k.add_norm_backward(normed, total, weight, 1e-5, x, torch.empty(columns), True, True)

    return call


def swiglu(k: ModuleType, dtype: torch.dtype) -> None:
    """LLaMA-7B's."""
    packed = torch.empty(16, 2 * 11008, dtype=dtype)
    k.swiglu_backward(k.swiglu(packed), packed, True)


def rope(k: ModuleType, dtype: torch.dtype) -> None:
    """LLaMA-3-8B's: 32 + 2 x 8 heads of 128."""
    packed, tables = torch.empty(2, 16, 48, 128, dtype=dtype), torch.empty(16, 1, 64)
    k.apply_rope(packed[:, :, :40], tables, tables, packed[:, :, :40])
    parts = (torch.empty(2, 16, n, 128, dtype=dtype) for n in (32, 8, 8))
    k.rotate_parts(list(parts), tables, tables, packed.split([32, 8, 8], 2), True)


def loss(k: ModuleType, dtype: torch.dtype) -> None:
    """LLaMA-3's vocabulary over eight ranks."""
    logits, index, sums = torch.empty(16, 16032, dtype=dtype), torch.zeros(16, 1, dtype=torch.int64), torch.empty(2, 16)
    k.log_sums(logits, index, *sums, None)
    k.gradient_(logits, index, sums[0], sums[0], None, sums[1])


def fp8(k: ModuleType, dtype: torch.dtype) -> None:
    """Both layouts and each alone, of an activation, a gradient and a weight of LLaMA-7B."""
    x = torch.empty(4096, 11008, dtype=dtype)
    for rows, columns in ((True, True), (False, True), (True, False)):
        k.quantized(x, FORWARD, rows, columns)
        if columns:
            k.quantized(x, GRADIENT, rows, columns)


CALLS = {"": [swiglu, rope, loss], " 4096": [rows_of(4096)], " 8192": [rows_of(8192)]}


def compiled_for(capability: int, call: Callable[..., None], dtype: torch.dtype) -> list[Compiled]:
    """What `call` would launch on a GPU of this capability."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from megallama.kernels import triton_kernels

    found: list[Compiled] = []

    def launcher(self: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            found.append((self.__name__, self.run(*args, grid=grid, warmup=True, **constants)))

        return launch

    JITFunction.__getitem__ = launcher
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: capability,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
    )
    call(triton_kernels, dtype)
    return found


def check(k: ModuleType, dtype: torch.dtype) -> None:
    """The small problems on which kernels are compared before they are selected."""
    Target.need_cuda = lambda self: None  # type: ignore[method-assign]
    target = Target(torch.device("cpu"), dtype, width=4096)
    for operation in OPERATIONS.values():
        if make := dict(operation.candidates).get(TRITON):
            operation.results(make(target), target)
    torch.cuda.get_device_capability = lambda device: (9, 0)
    FP8_PRODUCTS.results(dict(FP8_PRODUCTS.candidates)[TRITON](target), target)


def steps(k: ModuleType, dtype: torch.dtype) -> None:
    """What steps may meet: a micro-batch of one sample or more, documents, one key head, a last chunk of few rows."""
    for call in (swiglu, rope, rows_of(4096), loss, fp8):
        call(k, dtype)
    for rows in (1, 7):
        logits, index = torch.empty(rows, 32000, dtype=dtype), torch.zeros(rows, 1, dtype=torch.int64)
        log_sum, (total, picked) = torch.empty(rows), torch.empty(2, rows)
        k.log_sums(logits, index, log_sum, picked, None)
        k.gradient_(logits, index, picked, log_sum, None, total)
        packed, tables = torch.empty(rows, 5, 9, 128, dtype=dtype), torch.empty(rows, 5, 1, 64)
        k.apply_rope(packed[:, :, :8], tables, tables, packed[:, :, :8])
        parts = (torch.empty(rows, n, 5, 128, dtype=dtype).transpose(1, 2) for n in (7, 1, 1))
        apart = [*parts]
        k.rotate_parts(apart, tables, tables, packed.split([7, 1, 1], 2), True)
        k.rotate_parts(packed.split([7, 1, 1], 2), tables, tables, [t.contiguous() for t in apart], False)
        x, weight = torch.empty(rows, 4096, dtype=dtype), torch.empty(4096, dtype=dtype)
        for branch, again in ((None, False), (x, False), (x, True)):
            stream, normed = k.add_norm(x, branch, weight, 1e-5)
            k.add_norm_backward(normed, stream, weight, 1e-6, branch, torch.empty(4096), rows == 1, again)
        wide = torch.empty(rows, 2 * 1024, dtype=dtype)
        k.swiglu_backward(k.swiglu(wide), wide, rows == 1)


def late() -> list[str]:
    """Kernels that are compiled in a step, because none that was checked at the same width is the same."""
    known = {kernel.hash for _, kernel in compiled_for(90, check, torch.bfloat16)}
    return [name for name, kernel in compiled_for(90, steps, torch.bfloat16) if kernel.hash not in known]


def used(kernel: Any) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack), where registers go that are too many."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"])


def table() -> Iterator[tuple[Any, ...]]:
    """A row per kernel, format and GPU; `narrow` are reads and writes of memory of less than 16 bytes a thread."""
    for capability, dtype in FORMATS:
        for suffix, calls in CALLS.items():
            if (capability, dtype, suffix) == (90, torch.bfloat16, ""):  # no A100 multiplies in it
                calls = [*calls, fp8]
            for name, kernel in (found for call in calls for found in compiled_for(capability, call, dtype)):
                ptx = kernel.asm["ptx"]
                banned = re.search(r"\b(atom|red|cvt\.r[zmp])\.|\.f64", ptx)  # atomics, fp64, directed rounding
                assert banned is None, f"{name}: {banned}"
                rounds = dtype == torch.bfloat16 and name not in ("_log_sums", "_add_up", "_largest")
                assert not rounds or re.search(r"cvt\.rn\.(bf16x2|satfinite\.e4m3x2|satfinite\.e5m2x2)\.f32", ptx), name
                narrow = len(re.findall(r"(?:ld|st)\.global(?!\S*\.v4\.b32)", ptx))
                yield name + suffix, str(dtype)[6:], capability, *used(kernel), kernel.metadata.shared, narrow


if __name__ == "__main__":
    for row in (COLUMNS, *table()):
        print(*row, sep="\t")
    if names := late():
        sys.exit(f"compiled in a step, not when kernels are selected: {names}")
