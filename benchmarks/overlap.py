"""Every overlap switch on and off: tokens/s, and the time in which ranks were blocked in communication.

    python benchmarks/overlap.py                                    shape M, five rounds of every case
    python benchmarks/overlap.py --shapes S --rounds 1 --steps 5    a quick look

A case is a layout (dp 2, tp 2, pp 2) and a setting that is run both ways, one after the other, in every round; what is
compared within a round met the same machine.  Speed is that of the median step after two warm-ups.  Exposed time is
what the traces of two further steps call blocked (`log.trace_steps`): per step and rank, by group.
Results: `benchmarks/results/overlap.json` and `overlap.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drivers.work import LAYOUTS, SHAPES, WARM_UP, Layout, result
from launch import launch, wait_for_calm
from report import header, median, save, table
from step import HERE, settings

TRACED = 2
PLACES = {
    "dp 2": replace(LAYOUTS["b"], microbatches=2),
    "tp 2": LAYOUTS["c"],
    "pp 2": LAYOUTS["d"],
    "pp 2 x dp 2": Layout(dp=2, pp=2, microbatches=4),
}
CHUNKS = {"parallel.chunks": 2}
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [  # layout, what, both, off, on
    ("dp 2", "gradients under the backward", {}, {"overlap.grad_reduce": "false"}, {"overlap.grad_reduce": "true"}),
    ("dp 2", "weights under the forward", {}, {"overlap.param_gather": "false"}, {"overlap.param_gather": "true"}),
    ("tp 2", "under input and weight gradients", {}, {"overlap.tensor_parallel": "false"},
     {"overlap.tensor_parallel": "true"}),
    ("tp 2", "forward in 2 pieces", {}, {"overlap.tensor_parallel_chunks": 1}, {"overlap.tensor_parallel_chunks": 2}),
    ("tp 2", "the same 2 pieces", {"overlap.tensor_parallel_chunks": 2}, {"overlap.tensor_parallel": "false"},
     {"overlap.tensor_parallel": "true"}),
    ("pp 2", "split backward (zb-h1 for 1f1b)", {}, {"parallel.schedule": "1f1b"}, {"parallel.schedule": "zb-h1"}),
    ("pp 2 x dp 2", "gradients per chunk", CHUNKS, {"overlap.grad_reduce": "false"}, {"overlap.grad_reduce": "true"}),
]  # fmt: skip
NOTE = """
*Off* and *on* are tokens/s, medians of the rounds; *ratio* is the median of on / off within a round. *Exposed* is the
time per step in which a rank was blocked in the communication of a group, mean over ranks, medians of the rounds. In
`pp` it contains the idle time of the pipeline, and everywhere the time by which another rank came later.

What this machine can show: its ranks communicate on the same cores that compute. Hiding communication there moves its
work under the products, which become slower by it: exposed time that falls need not be speed won. What can be won is
time in which a core only waits, for a message or for a rank that is late. On GPUs copy engines and a few
multiprocessors do the communication, and exposed time that is hidden is time won.
"""


@dataclass(frozen=True)
class OverlapRun:
    """One run of one side of a case."""

    shape: str
    layout: str
    what: str
    on: bool
    round: int
    tokens_per_second: float
    step_seconds: list[float]
    exposed: dict[str, float]  # group -> seconds per step and rank
    other_load: float


def exposed(traces: Sequence[Path]) -> dict[str, float]:
    """Blocked seconds of each group per step and rank, in the files of some traced steps of all pipelines."""
    sums: dict[str, float] = {}
    ranks = 0
    for file in traces:
        events = json.loads(file.read_text())["traceEvents"]
        lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
        ranks += sum(name.startswith("pipeline rank") for name in lanes.values())
        for e in events:
            if e.get("cat") == "blocked":
                group = lanes[e["tid"]].split()[2]
                sums[group] = sums.get(group, 0.0) + e["dur"] / 1e6
    return {group: total / ranks for group, total in sums.items()}


def measure(shape: str, place: str, values: dict[str, Any], steps: int, dtype: str) -> tuple[dict[str, Any], Any, Any]:
    """(speed, exposed seconds by group, load of others) of one run."""
    layout = PLACES[place]
    tokens = SHAPES[shape].micro_batch * SHAPES[shape].seq * layout.dp * layout.microbatches
    with tempfile.TemporaryDirectory() as folder:
        metrics, trace = Path(folder) / "metrics.jsonl", Path(folder) / "trace"

        def lines() -> list[dict[str, Any]]:
            text = metrics.read_text() if metrics.exists() else ""
            found = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
            return [x for x in found if x["kind"] == "train"]

        traced = {"log.trace_steps": f"[{steps + 1},{steps + TRACED}]"}
        more = [f"{key}={value}" for key, value in {**values, **traced}.items()]
        command = [sys.executable, "-m", "megallama.pretrain", *settings(SHAPES[shape], layout, dtype, folder), *more]
        outcome = launch(
            command, layout.ranks, 1, env={"PYTHONPATH": str(HERE.parent)}, done=lambda: len(lines()) > steps + TRACED
        )
        seconds = [x["step_seconds"] for x in lines()[:steps]]
        return result(tokens, seconds, 0.0), exposed(sorted(trace.iterdir())), outcome.other_load


def line(runs: Sequence[OverlapRun]) -> dict[str, str]:
    """The row of the table that a case's runs make."""
    off, on = ([r for r in runs if r.on is side] for side in (False, True))
    speeds = [median([r.tokens_per_second for r in side]) for side in (off, on)]
    ratios = [b.tokens_per_second / a.tokens_per_second for a, b in zip(off, on, strict=True)]
    groups = sorted({g for r in runs for g in r.exposed if g in ("tp", "dp", "pp")})
    waits = [[1e3 * median([r.exposed.get(g, 0.0) for r in side]) for side in (off, on)] for g in groups]
    return {
        "shape": runs[0].shape,
        "layout": runs[0].layout,
        "switch": runs[0].what,
        "off": f"{speeds[0]:.0f}",
        "on": f"{speeds[1]:.0f}",
        "ratio": f"{median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})",
        "exposed ms, off > on": ", ".join(f"{g} {a:.0f} > {b:.0f}" for g, (a, b) in zip(groups, waits, strict=True)),
        "others' load": f"{max(r.other_load for r in runs):.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="M")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=7, help="per run, before the traced ones; two are not counted")
    parser.add_argument("--layouts", default=",".join(PLACES), help="of: " + ", ".join(PLACES))
    parser.add_argument("--calm", type=float, default=0, help="wait at most this long for an idle machine [s]")
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        raise SystemExit(f"error: --steps {args.steps} leaves nothing to count after {WARM_UP} warm-up steps")
    if unknown := [x for x in args.layouts.split(",") if x not in PLACES]:
        raise SystemExit(f"error: --layouts {unknown[0]} is unknown; write some of {','.join(PLACES)}")
    runs: list[OverlapRun] = []
    rows = []
    for shape in args.shapes.split(","):
        for place, what, both, off, on in CASES:
            if place not in args.layouts.split(","):
                continue
            own = []
            for number in range(args.rounds):
                for side in (False, True) if number % 2 == 0 else (True, False):
                    wait_for_calm(args.calm)
                    values = {**both, **(on if side else off)}
                    speed, *rest = measure(shape, place, values, args.steps, args.dtype)
                    rates = speed["tokens_per_second"], speed["step_seconds"]
                    own.append(OverlapRun(shape, place, what, side, number, *rates, *rest))
            runs += own
            rows.append(line(own))
            print(json.dumps(rows[-1]), flush=True)
    save("overlap", runs, header("Communication under computation", args) + table(rows) + NOTE)


if __name__ == "__main__":
    main()
