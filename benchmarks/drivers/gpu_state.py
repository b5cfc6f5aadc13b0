"""What a GPU did while it was measured: its clocks, power and temperature, and how long it waited between kernels."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import mean, median
from typing import Any

import torch

FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")  # MHz, MHz, W, degrees Celsius
EVERY_MS = 250


class State:
    """Samples of nvidia-smi, which runs beside the measurement; none where there is no nvidia-smi."""

    def __init__(self, device: torch.device) -> None:
        self._samples: list[list[float]] = []
        self._command: list[str] = []
        self._process: subprocess.Popen[str] | None = None
        if shutil.which("nvidia-smi"):
            which = "0"
            if device.type == "cuda":
                which = f"GPU-{str(torch.cuda.get_device_properties(device).uuid).removeprefix('GPU-')}"
            query = f"--query-gpu={','.join(FIELDS)}"
            self._command = ["nvidia-smi", "-i", which, query, "--format=csv,noheader,nounits"]
            looped = [*self._command, "-lms", str(EVERY_MS)]
            quiet = subprocess.DEVNULL
            self._process = subprocess.Popen(looped, stdout=subprocess.PIPE, stderr=quiet, stdin=quiet, text=True)
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._add(line)

    def _add(self, line: str) -> None:
        try:
            self._samples.append([float(word) for word in line.split(",")])
        except ValueError:  # "[N/A]", or a message
            return

    @contextmanager
    def during(self) -> Iterator[dict[str, float]]:
        """What is filled when the block ends: lowest and median clock, mean power, highest temperature within it."""
        out: dict[str, float] = {}
        before = len(self._samples)
        yield out
        if self._command and len(self._samples) == before:  # shorter than a sample, or kept back by a pipe
            done = subprocess.run(self._command, capture_output=True, text=True, timeout=20, check=False)
            self._add(done.stdout)
        if seen := [row for row in self._samples[before:] if len(row) == len(FIELDS)]:
            sm, memory, watts, celsius = zip(*seen, strict=True)
            out |= {"sm_mhz_least": min(sm), "sm_mhz": median(sm), "memory_mhz": median(memory)}
            out |= {"watts": round(mean(watts), 1), "celsius": max(celsius), "samples": len(seen)}

    def close(self) -> None:
        """End nvidia-smi."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def waits(intervals: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of kernels (start, end) in microseconds: how many, the share of time in which none ran, the longest such time."""
    gaps, end = [], float("-inf")
    for start, stop in sorted(intervals):
        if start > end > float("-inf"):
            gaps.append(start - end)
        end = max(end, stop)
    span = end - min(start for start, _ in intervals) if intervals else 0.0
    return {
        "kernels": len(intervals), "span_ms": span / 1e3, "idle_share": sum(gaps) / span if span else 0.0,
        "longest_gap_us": max(gaps, default=0.0),
    }  # fmt: skip


def profiled(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """`waits` of the kernels of one step (on a CPU of torch's operations); why not, where the profiler fails."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    try:
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
            step()
            if on_gpu:
                torch.cuda.synchronize(device)
        kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        events = [e for e in found.events() if e.device_type == kind and not getattr(e, "is_user_annotation", False)]
        ranges = [e.time_range for e in events]
        return waits([(r.start, r.end) for r in ranges])
    except Exception as error:  # noqa: BLE001 - the measurement goes on without it
        return {"failed": f"{type(error).__name__}: {error}"[:200]}
