"""What the drivers of data_reading.py share; nothing of either system."""

from __future__ import annotations

import json
from pathlib import Path

SEQ_LENGTH, BATCH = 2048, 64
RUN_SAMPLES = 333_787 * 2048  # 1.4T tokens
SHARES = {
    "commoncrawl": 67.0, "c4": 15.0, "github": 4.5, "wikipedia": 4.5, "books": 4.5, "arxiv": 2.5, "stackexchange": 2.0
}  # fmt: skip


def resident_mib() -> float:
    """Memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def say(**values: float) -> None:
    """The result, as the line that the benchmark looks for."""
    print(json.dumps({key: round(value, 6) for key, value in values.items()}), flush=True)
