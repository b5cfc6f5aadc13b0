"""The peak of one rank's device, the denominator of model FLOP/s utilisation (MFU).

Data sheets give it for the GPUs on which LLaMAs are trained (dense, without sparsity); of any other
device it is measured once, as the best rate of a large square matrix product.
"""

from __future__ import annotations

import time
from typing import Literal

import torch

Origin = Literal["known", "measured", "given"]

# TFLOP/s of (bf16 and fp16, tf32, fp32, fp64), NVIDIA data sheets; the first name contained in the device's name counts
_TFLOPS: dict[str, tuple[float, float, float, float]] = {
    "A100": (312.0, 156.0, 19.5, 19.5),
    "H100 PCIe": (756.0, 378.0, 51.0, 51.0),
    "H100 NVL": (835.0, 417.5, 60.0, 60.0),
    "H200 NVL": (835.0, 417.5, 60.0, 60.0),
    "H100": (989.0, 494.5, 67.0, 67.0),
    "H200": (989.0, 494.5, 67.0, 67.0),
}


def peak_flops(device: torch.device, dtype: torch.dtype, given_tflops: float | None = None) -> tuple[float, Origin]:
    """(FLOP/s, where the number comes from) of matrix products in `dtype` on `device`.

    `given_tflops` is run.peak_tflops and comes first; then the table; then a measurement of about
    0.3 s with the threads that torch is set to, so ranks that share cores should measure together.
    """
    if given_tflops is not None:
        return given_tflops * 1e12, "given"
    if device.type == "cuda":
        known = known_peak(torch.cuda.get_device_name(device), dtype, torch.get_float32_matmul_precision() != "highest")
        if known is not None:
            return known, "known"
    return measure_peak(device, dtype), "measured"


def known_peak(name: str, dtype: torch.dtype, tf32: bool) -> float | None:
    """Data-sheet FLOP/s of a GPU by its CUDA device name, or None; `tf32`: fp32 products may round to it."""
    for part, (half, rounded, single, double) in _TFLOPS.items():
        if part in name:
            rates = {torch.bfloat16: half, torch.float16: half, torch.float64: double}
            return 1e12 * rates.get(dtype, rounded if tf32 else single)
    return None


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Best FLOP/s of repeated n x n products in about `seconds` (at least two after one to warm up)."""
    n = 8192 if device.type == "cuda" else 768
    generator = torch.Generator(device).manual_seed(0)  # random operands: constant ones let a GPU clock higher
    a = torch.rand(n, n, device=device, generator=generator).to(dtype)
    out = torch.empty_like(a)
    best, runs, begin = float("inf"), 0, time.perf_counter()
    while runs < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - start
        best, runs = min(best, elapsed) if runs else best, runs + 1
    return 2 * n**3 / best
