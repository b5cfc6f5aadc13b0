"""How fast a run is and could be: phases of a step, rates, the device's peak."""

import resource
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from timeit import repeat

import torch

from megallama.comm.flight_record import PHASES, FlightRecord

# dense TFLOP/s by NVIDIA's data sheets: bf16 and fp16 (tf32: half of it), fp32 and fp64; the first name that fits
# counts. What is measured when a run starts would be the peak of a busy machine.
_TFLOPS = {
    "A100": (312.0, 19.5),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H200 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "H200": (989.0, 67.0),
}


class Timers:
    """Host seconds per phase since the last `lap`; of nested ones the inner counts."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, record: FlightRecord | None = None) -> None:
        self._clock, self._start = clock, clock()
        self._record, self._seconds = record or FlightRecord(), defaultdict[str, float](float)
        self._open = [("between steps", 0.0)]  # with the seconds spent in the phases inside it

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the ``with`` block under `name`; the same name adds up."""
        start = self._clock()
        outer, _ = self._open[-1]
        self._open.append((name if name in PHASES else outer, 0.0))
        self._record.at(phase=self._open[-1][0])
        try:
            yield
        finally:
            elapsed = self._clock() - start
            self._record.at(phase=outer)
            self._seconds[name] += elapsed - self._open.pop()[1]
            self._open[-1] = outer, self._open[-1][1] + elapsed

    def lap(self) -> tuple[float, dict[str, float]]:
        """(seconds since the last lap, seconds of each phase in it); starts the next one."""
        assert len(self._open) == 1, "lap() inside a phase"
        now = self._clock()
        total, phases = now - self._start, dict(self._seconds)
        self._start = now
        self._seconds.clear()
        return total, phases


class Meter:
    """Turns (tokens, seconds) into rates, utilisation and the time left."""

    def __init__(self, ranks: int, flops: tuple[float, float], peak_flops: float | None, total_tokens: int) -> None:
        self._ranks, self._total_tokens = ranks, total_tokens
        self._flops = flops  # of the model per token: with causal and with full attention
        self._peak = peak_flops  # of one rank
        self._laps: deque[tuple[int, float]] = deque(maxlen=20)
        self._count = 0

    def lap(self, tokens: int, seconds: float, consumed_tokens: int) -> dict[str, float | None]:
        if self._count == 1:
            self._laps.clear()  # the first step warms everything up: it tells nothing
        self._count += 1
        self._laps.append((tokens, seconds))
        rate = tokens / seconds
        causal, full = (flops * rate / self._ranks / self._peak if self._peak else None for flops in self._flops)
        recent = sum(n for n, _ in self._laps) / sum(s for _, s in self._laps)
        return {
            "tokens": tokens,
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "tokens_per_second_per_rank": rate / self._ranks,
            "mfu_causal": causal,
            "mfu_full": full,
            "eta_seconds": max(0, self._total_tokens - consumed_tokens) / recent,
        }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process ever held: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status", encoding="ascii") as status:  # ru_maxrss begins at the launcher's
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: torch.device, dtype: torch.dtype, given_tflops: float | None = None) -> float | None:
    """FLOP/s of matrix products: run.peak_tflops, else the table's; None: not known."""
    if given_tflops is not None:
        return given_tflops * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for part, (half, single) in _TFLOPS.items():
        if part in name:
            fp32 = single if torch.get_float32_matmul_precision() == "highest" else half / 2
            return 1e12 * {torch.bfloat16: half, torch.float16: half, torch.float32: fp32}.get(dtype, single)
    return None


def product_time_over_fp32(dtype: torch.dtype, n: int = 256) -> float:
    """How long n x n products take on a core of this processor, in times of fp32."""
    best, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for kind in (dtype, torch.float32):
        product = partial(torch.mm, *[torch.ones(n, n, dtype=kind)] * 2)
        # the first one warms up; what else runs on the machine counts little
        best.append(min(repeat(product, timer=time.thread_time, repeat=4, number=1)))
    torch.set_num_threads(threads)
    return best[0] / best[1]


def slow_format(device: torch.device, dtype: torch.dtype) -> str:
    """What is slow about a format without instructions in the processor, or nothing."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if device.type != "cpu" or name is None or (times := product_time_over_fp32(dtype)) <= 1.5:
        return ""
    return f"this processor has no instructions for {name}: a matrix product takes {times:.1f} times as long as in fp32"
