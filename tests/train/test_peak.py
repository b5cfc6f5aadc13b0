"""The peak of the device: the table, the override; and formats that a processor has no instructions for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megallama.train.speed import peak_flops, product_time_over_fp32, slow_format

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


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
def test_known_devices(
    name: str, dtype: torch.dtype, tf32: bool, tflops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high" if tf32 else "highest")
    assert peak_flops(torch.device("cuda"), dtype) == tflops * 1e12


def test_an_unknown_device_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) is None


def test_given_comes_first_and_a_processor_is_not_known() -> None:
    assert peak_flops(CPU, torch.float32, 1.5) == 1.5e12
    assert peak_flops(CPU, torch.float32) is None


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_format_without_instructions_is_told_with_numbers(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megallama.train.speed.product_time_over_fp32", lambda dtype: 5.23)
    output = f"this processor has no instructions for {name}: a matrix product takes 5.2 times as long as in fp32"
    assert slow_format(CPU, dtype) == output
    assert slow_format(CPU, torch.float32) == slow_format(torch.device("cuda"), dtype) == ""
    monkeypatch.setattr("megallama.train.speed.product_time_over_fp32", lambda dtype: 0.5)
    assert slow_format(CPU, dtype) == ""


def test_the_time_is_the_best_of_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    half, single = [0, 9, 9, 19, 20, 25, 30, 38], [0, 9, 10, 12, 20, 21, 30, 33]  # start and end of four runs each
    times = iter([*half, *single])
    monkeypatch.setattr("time.thread_time", lambda: next(times))
    assert product_time_over_fp32(torch.bfloat16, n=8) == 5.0


def test_without_bf16_instructions_it_is_measured_to_be_slow() -> None:
    """oneDNN told to leave such instructions alone stands for a processor that has none."""
    code = "import torch; from megallama.train.speed import slow_format; torch.set_num_threads(2); "
    code += "print(slow_format(torch.device('cpu'), torch.bfloat16))"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert "no instructions for bf16: a matrix product takes" in done.stdout, done.stderr


def test_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    assert product_time_over_fp32(torch.float32) < 1.5 and torch.get_num_threads() == before
