"""The peak of the device: the table, the override, the measurement."""

from __future__ import annotations

import pytest
import torch

from megallama.train.peak import known_peak, measure_peak, peak_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, False, 312),
        ("NVIDIA A100-SXM4-80GB", torch.float16, False, 312),
        ("NVIDIA A100-PCIE-40GB", torch.float32, True, 156),
        ("NVIDIA A100-SXM4-80GB", torch.float32, False, 19.5),
        ("NVIDIA A100-SXM4-80GB", torch.float64, True, 19.5),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756),
        ("NVIDIA H100 NVL", torch.bfloat16, False, 835),
        ("NVIDIA H200", torch.bfloat16, False, 989),
        ("NVIDIA H200", torch.float32, True, 494.5),
        ("NVIDIA H200", torch.float64, False, 67),
    ],
)
def test_known_devices(name: str, dtype: torch.dtype, tf32: bool, tflops: float) -> None:
    assert known_peak(name, dtype, tf32) == tflops * 1e12


def test_an_unknown_device_is_unknown() -> None:
    assert known_peak("NVIDIA GeForce RTX 4090", torch.bfloat16, False) is None


def test_given_comes_first() -> None:
    assert peak_flops(CPU, torch.float32, 1.5) == (1.5e12, "given")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_cpu_is_measured(dtype: torch.dtype) -> None:
    flops, origin = peak_flops(CPU, dtype)
    assert origin == "measured"
    assert 1e8 < flops < 1e15  # a core makes at least 0.1 GFLOP/s, no machine a PFLOP/s


def test_the_measurement_is_the_best_of_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.0, 9.0, 9.0, 11.0, 11.0, 12.0, 12.0])  # begin; start and end of three runs; the last look
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    # warm-up 9 s, then 2 s, then 1 s
    assert measure_peak(CPU, torch.float32, seconds=0.0) == 2 * 768**3 / 1.0
