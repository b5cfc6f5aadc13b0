"""The peak of one rank's device, the denominator of model FLOP/s utilisation (MFU).

Data sheets give it for the GPUs on which LLaMAs are trained (dense, without sparsity). Of any other device it is not
known, and no MFU is shown: a rate measured when a run starts is one of a machine that does something else as well.
"""

from __future__ import annotations

import time

import torch

# TFLOP/s of (bf16 and fp16, tf32, fp32, fp64), NVIDIA data sheets; the first name contained in the device's name counts
_TFLOPS: dict[str, tuple[float, float, float, float]] = {
    "A100": (312.0, 156.0, 19.5, 19.5),
    "H100 PCIe": (756.0, 378.0, 51.0, 51.0),
    "H100 NVL": (835.0, 417.5, 60.0, 60.0),
    "H200 NVL": (835.0, 417.5, 60.0, 60.0),
    "H100": (989.0, 494.5, 67.0, 67.0),
    "H200": (989.0, 494.5, 67.0, 67.0),
}


def peak_flops(device: torch.device, dtype: torch.dtype, given_tflops: float | None = None) -> float | None:
    """FLOP/s of matrix products: run.peak_tflops if given, else the table's; None: not known."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type != "cuda":
        return None
    return known_peak(torch.cuda.get_device_name(device), dtype, torch.get_float32_matmul_precision() != "highest")


def known_peak(name: str, dtype: torch.dtype, tf32: bool) -> float | None:
    """Data-sheet FLOP/s of a GPU by its name, or None; `tf32`: fp32 products may round to it."""
    for part, (half, rounded, single, double) in _TFLOPS.items():
        if part in name:
            rates = {torch.bfloat16: half, torch.float16: half, torch.float64: double}
            return 1e12 * rates.get(dtype, rounded if tf32 else single)
    return None


def product_time_over_fp32(dtype: torch.dtype, n: int = 256) -> float:
    """How long n x n products take on a core of this processor, in times of fp32; takes 0.05 s.

    The best of a few, in processor time: what else runs on the machine counts little.
    """
    best, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for kind in (dtype, torch.float32):
        a, times = torch.ones(n, n, dtype=kind), []
        for _ in range(4):  # the first one warms up
            start = time.thread_time()
            torch.mm(a, a)
            times.append(time.thread_time() - start)
        best.append(min(times))
    torch.set_num_threads(threads)
    return best[0] / best[1]


def slow_format(device: torch.device, dtype: torch.dtype) -> str:
    """What is slow about a number format that the processor has no instructions for, or nothing."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return ""
    name, times = ("bf16" if dtype == torch.bfloat16 else "fp16"), product_time_over_fp32(dtype)
    slow = f"this processor has no instructions for {name}: a matrix product takes {times:.1f} times as long as in fp32"
    return slow if times > 1.5 else ""
