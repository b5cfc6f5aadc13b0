"""What it costs that a supervisor watches every rank: the same steps with and without it, in turns.

    python benchmarks/watching.py --shapes S,M --layouts a,c --rounds 15

CPU seconds are those of all processes of the run, their start included; tokens/s those of the median step after two
warm-ups. Medians over the rounds, and the ratio with / without. Results: `results/watching.json` and `watching.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from drivers.work import LAYOUTS, SHAPES, WARM_UP
from launch import free_port, wait_for_calm
from report import header, median, save, table
from step import settings

HERE = Path(__file__).resolve().parent


def cpu_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(shape: str, layout: str, steps: int, *, supervised: bool) -> tuple[float, float]:
    """CPU seconds of a run of `steps` steps, and the seconds of its median step. Raises: CalledProcessError."""
    place = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as folder:
        own = settings(SHAPES[shape], place, "fp32", folder)
        changed = [f"run.supervisor={str(supervised).lower()}", f"train.steps={steps}", "log.plot=false"]
        command = [sys.executable, "-m", "megallama.pretrain", *own, *changed]
        env = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": str(place.threads)}
        env |= {"WORLD_SIZE": str(place.ranks), "LOCAL_WORLD_SIZE": str(place.ranks), "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": str(free_port())}
        before, processes = cpu_seconds(), []
        for rank in range(place.ranks):
            which = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=env | which, stdout=subprocess.DEVNULL))
        statuses = [process.wait() for process in processes]
        if any(statuses):
            raise SystemExit(f"error: a run of shape {shape}, layout {layout} failed; its output is above")
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        seconds = [json.loads(line)["step_seconds"] for line in lines][WARM_UP:]
    return cpu_seconds() - before, median(seconds)


@dataclass(frozen=True)
class Row:
    """Medians of one shape in one layout; CPU seconds of the run, seconds of a step."""

    shape: str
    layout: str
    rounds: int
    cpu_with: float
    cpu_without: float
    step_with: float
    step_without: float

    def cells(self) -> dict[str, str]:
        """As the table has it."""
        return {
            "shape": self.shape,
            "layout": self.layout,
            "CPU s with": f"{self.cpu_with:.2f}",
            "without": f"{self.cpu_without:.2f}",
            "with / without": f"{self.cpu_with / self.cpu_without:.4f}",
            "step ms with": f"{1e3 * self.step_with:.1f}",
            "step ms without": f"{1e3 * self.step_without:.1f}",
            "step with / without": f"{self.step_with / self.step_without:.4f}",
        }


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="S,M")
    parser.add_argument("--layouts", default="a,c")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    rows = []
    for shape in args.shapes.split(","):
        for layout in args.layouts.split(","):
            wait_for_calm(20)
            found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
            for number in range(args.rounds):
                for supervised in (True, False) if number % 2 else (False, True):
                    found[supervised].append(measure(shape, layout, args.steps, supervised=supervised))
            cpu, step = ({on: median([one[i] for one in found[on]]) for on in found} for i in range(2))
            rows.append(Row(shape, layout, args.rounds, cpu[True], cpu[False], step[True], step[False]))
            print(rows[-1], flush=True)
    save("watching", rows, header("A supervisor beside every rank", args) + table([row.cells() for row in rows]))


if __name__ == "__main__":
    main()
