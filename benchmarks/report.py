"""Result files: runs as JSON, tables as Markdown, both with date, commit and machine."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    recompute: str = ""  # of ours: memory.recompute
    gemm_gflops: float = 0.0  # the machine's rate of large products in the same round; 0: not measured
    void: str = ""  # why its round does not count

    @property
    def row(self) -> str:
        """Name of the row."""
        return f"{self.shape} {self.dtype} {self.layout}"


def median(values: Sequence[float]) -> float:
    """Middle value, the upper one of two."""
    return sorted(values)[len(values) // 2]


def machine() -> dict[str, str]:
    """Where and when this was measured, and what."""
    pairs = (line.partition(":") for line in reversed(Path("/proc/cpuinfo").read_text().splitlines()))
    about = {key.strip(): value.strip() for key, _, value in pairs}
    cpu = about.get("model name", platform.machine())
    if "cpu family" in about:  # generations differ more than their names: some hosts say "AMD EPYC" of each
        cpu += f" (family {about['cpu family']} model {about['model']})"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": f"{cpu}, {os.cpu_count()} cores, Linux {platform.release()}",
        "versions": f"Python {platform.python_version()}, torch {version('torch')}",
    }


def commit(root: Path = RESULTS.parents[1]) -> str:
    """The commit that is measured, "-dirty" if files differ; without git what .carry/COMMIT says, and the sources.

    `make gpu-carry` writes that file, before a copy without .git is taken away. The sources are the first 12 digits of
    the SHA-256 of all files in megallama/, in the order of their names.
    """
    if (root / ".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return done.stdout.strip()
        except OSError:
            pass
    note = root / ".carry" / "COMMIT"
    digest = hashlib.sha256()
    for file in sorted((root / "megallama").rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    said = note.read_text().strip() if note.exists() else "unknown"
    return f"{said} (without git; sources {digest.hexdigest()[:12]})"


def add_place(parser: argparse.ArgumentParser) -> None:
    """Options of where a GPU benchmark runs and where its results go."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a tiny model, to try it")
    parser.add_argument("--cpu-check", action="store_true", help="the same as --device cpu")
    parser.add_argument("--out", type=Path, help="folder for results (on a GPU: benchmarks/results)")


def choose_place(args: argparse.Namespace) -> str:
    """Settle what `add_place` asked: the device; args.out is None where nothing is written. SIGTERM exits."""
    args.device = "cpu" if args.cpu_check else args.device
    args.out = args.out or (RESULTS if args.device == "cuda" else None)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return str(args.device)


@contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[None]:
    """Whatever ends this block, the process does not outlive it."""
    try:
        yield
    except BaseException:
        process.kill()
        raise


def replace_file(path: Path, text: str) -> None:
    """Write a file whole: who is ended meanwhile leaves the old one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


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
