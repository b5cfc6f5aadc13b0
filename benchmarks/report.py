"""Result files: runs as JSON, tables as Markdown, both with date, commit and machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Run:
    """One measurement of one system on one row."""

    system: str
    shape: str
    layout: str
    dtype: str
    keeps_master: bool  # fp32 weights are kept, as in our own training
    tokens_per_second: float
    best_tokens_per_second: float
    step_seconds: list[float]
    final_loss: float
    peak_rss_mib: list[int]
    other_load: float

    @property
    def row(self) -> str:
        """Name of the row."""
        return f"{self.shape} {self.dtype} {self.layout}"


def median(values: Sequence[float]) -> float:
    """Middle value, the upper one of two."""
    return sorted(values)[len(values) // 2]


def machine() -> dict[str, str]:
    """Where and when this was measured, and what."""
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit.stdout.strip() or "unknown",
        "machine": f"{cpu.split(':', 1)[1].strip()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "versions": f"Python {platform.python_version()}, torch {version('torch')}",
    }


def header(title: str, args: argparse.Namespace) -> str:
    """Title, machine and the command of a result file."""
    lines = [f"- {key}: {value}" for key, value in machine().items()]
    return "\n".join([f"# {title}", "", *lines, f"- command: python {' '.join(sys.argv)}", "", ""])


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows of equal keys as a Markdown table."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(row.values()) + " |" for row in rows]) + "\n"


def save(name: str, runs: Sequence[Any], text: str) -> None:
    """Write `results/name.json` (runs are dataclasses) and `results/name.md`, and show the table."""
    RESULTS.mkdir(exist_ok=True)
    content = {**machine(), "command": sys.argv, "runs": [asdict(run) for run in runs]}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
    print("\n" + text)
