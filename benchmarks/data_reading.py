"""Reading training data: start-up, random samples, the seven sources of a long run; beside megatron-core's datasets.

    python benchmarks/data_reading.py --folder runs/data_reading
    python benchmarks/data_reading.py --folder runs/data_reading --peers-python runs/peers/bin/python --rounds 3

Makes a source of 5 billion tokens in 10 million documents in the folder (a sparse .bin, an .idx of 200 MB) and reads
it in a new process for every figure, the systems in turn; each process runs twice and the second one counts, so that
for both what they read is in the page cache (a mapped file's first faults cost far more than the work):

    open       from the files to the first batch of 64 samples, after all imports; memory it adds
    samples    random samples of 2049 tokens per second, as tensors in batches; memory it adds, opening included
    mixture    seven sources in LLaMA's shares (each the one above), a run of 1.4T tokens: until the first batch

megatron-core lays its sample order out in arrays as long as the run: its mixture is built for 1/100 of it. Results:
`benchmarks/results/data_reading.json` and `data_reading.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from drivers.reading import RUN_SAMPLES
from launch import BenchmarkError, busy_seconds, wait_for_calm
from report import header, median, save, table

HERE = Path(__file__).resolve().parent
DOCUMENTS = 10_000_000
ROWS = ("open", "samples", "mixture")


@dataclass(frozen=True)
class Reading:
    """One figure of one system."""

    system: str
    row: str
    samples: int  # read, or those the order was made for
    seconds: float | None
    rate: float | None
    mib: float
    other_load: float


def make_source(folder: Path) -> Path:
    """PREFIX of the source; written once."""
    prefix = folder / "source"
    if prefix.with_suffix(".idx").exists():
        return prefix
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.random.default_rng(0).lognormal(5.71, 1.0, DOCUMENTS).astype("<i4") + 1  # mean 500
    starts = np.concatenate(([0], np.cumsum(lengths[:-1], dtype="<i8") * 2)).astype("<i8")
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(2 * int(lengths.sum(dtype=np.int64)))
    with prefix.with_suffix(".tmp").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, DOCUMENTS, DOCUMENTS + 1))
        for part in (lengths, starts, np.arange(DOCUMENTS + 1, dtype="<i8")):
            file.write(part.tobytes())
    prefix.with_suffix(".tmp").rename(prefix.with_suffix(".idx"))
    return prefix


def measure(system: str, python: str, row: str, prefix: Path, samples: int) -> Reading:
    """One process. Raises: BenchmarkError."""
    command = [python, str(HERE / "drivers" / f"read_{system}.py"), row, str(prefix), str(samples)]
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    usage, busy = os.times(), busy_seconds()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    after, others = os.times(), busy_seconds() - busy
    own = after.children_user + after.children_system - usage.children_user - usage.children_system
    output = next((line for line in done.stdout.splitlines() if line.startswith("{")), "")
    if not output:
        raise BenchmarkError(f"{' '.join(command)}\nended without a result:\n{(done.stdout + done.stderr)[-1000:]}")
    found = json.loads(output)
    load = max(0.0, others - own) / max(after.elapsed - usage.elapsed, 1e-3)
    reading = Reading(system, row, int(found["samples"]), found.get("seconds"), found.get("rate"), found["mib"],
                      round(load, 2))  # fmt: skip
    print(reading, flush=True)
    return reading


def compare(runs: list[Reading]) -> list[dict[str, str]]:
    """A line for every row: medians of both systems and their ratio."""
    lines = []
    for row in ROWS:
        line, figures = {"row": row}, {}
        for system in ("megallama", "megatron"):
            of = [run for run in runs if (run.system, run.row) == (system, row)]
            if not of:
                line |= {system: "-", f"{system} MiB": "-", f"{system} samples": "-"}
                continue
            figures[system] = median([run.rate or run.seconds or 0.0 for run in of])
            shown = f"{figures[system]:,.0f} samples/s" if of[0].rate else f"{1000 * figures[system]:,.1f} ms"
            line |= {system: shown, f"{system} MiB": f"{median([run.mib for run in of]):,.1f}"}
            line |= {f"{system} samples": f"{of[0].samples:,}"}
        faster = None
        if len(figures) == 2:
            ours, theirs = figures["megallama"], figures["megatron"]
            faster = ours / theirs if row == "samples" else theirs / ours
        line |= {"ratio": f"{faster:,.1f}" if faster else "-"}
        line |= {"others' load": f"{max(run.other_load for run in runs if run.row == row):.2f}"}
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/data_reading"), help="where the source is made")
    parser.add_argument("--peers-python", metavar="PATH", help="interpreter with megatron-core (benchmarks/peers.py)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=19_200, help="samples read for a rate, a multiple of 64")
    parser.add_argument("--calm", type=float, default=60.0, help="longest wait for an idle machine [s]")
    args = parser.parse_args()
    prefix = make_source(args.folder)
    systems = [("megallama", sys.executable), ("megatron", args.peers_python)]
    runs: list[Reading] = []
    for _ in range(args.rounds):
        for row in ROWS:
            for system, python in systems:
                if python:
                    wait_for_calm(args.calm)
                    size = RUN_SAMPLES // 100 if (system, row) == ("megatron", "mixture") else args.samples
                    runs.append([measure(system, python, row, prefix, size) for _ in range(2)][-1])
    text = header("Reading training data", args) + table(compare(runs))
    text += "\nMedians over the rounds. MiB: what the process grew by. Ratio: how much faster megallama is; in the"
    text += "\nmixture against 1/100 of the run for megatron-core (its time and memory grow with the run's length).\n"
    save("data_reading", runs, text)


if __name__ == "__main__":
    main()
