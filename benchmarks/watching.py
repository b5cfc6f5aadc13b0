"""What it costs that a supervisor watches every rank, and whether it finds a slow one.

    python benchmarks/watching.py times --shapes S,M --layouts a,c --rounds 15
    python benchmarks/watching.py times --kept /tmp/watching --seconds 220     in pieces: again, until it says so
    python benchmarks/watching.py instructions                                 needs valgrind
    python benchmarks/watching.py stragglers                                   1,000 steps of 4 ranks, 1.1 x slower

Times: the same steps with and without supervisors, in turns.  CPU seconds are those of all processes of a run, its
start included; step times those of the median step after two warm-ups.  Medians over the rounds, and with / without.

Instructions: cachegrind counts them for a look of the supervisor and for every kind of word that a rank writes
(`drivers/looks.py`); a run says how many words and seconds a step has.  A step itself has at least one instruction per
FLOPS floating-point operations of its matrix products, the widest that there is: so the share is an upper bound.

Stragglers: a tiny model on 4 ranks with 4 micro-batches each, for their parts of the optimizer's state are of unequal
work where a model is that small. Then one takes 1.1 times as long for its own work
(`drivers/slow_site`).  Results: `results/watching_*.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drivers.work import LAYOUTS, SHAPES, WARM_UP, Layout, Shape
from launch import free_port, wait_for_calm
from report import header, median, save, table
from step import settings

HERE = Path(__file__).resolve().parent
FLOPS, LOOKS = 32, 5  # of one instruction (16 fp32 numbers, multiplied and added); looks of a supervisor per second
WORDS = ("layer", "action", "at", "call")
TINY = [
    "model.hidden_size=64", "model.num_layers=2", "model.num_heads=4", "model.ffn_hidden_size=96",
    "model.vocab_size=61", "batch.seq_length=32", "batch.micro_batch_size=4", "batch.global_batch_size=64",
    "data.synthetic=true", "precision.dtype=fp32", "run.threads=1", "run.device=cpu", "run.peak_tflops=1",
    "log.plot=false", "log.tensorboard=false", "log.interval=1",
]  # fmt: skip
FOUND = re.compile(r"warning: rank (\d+) \(\S+\) is slow: its own work takes (\S+) times")


def cpu_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(arguments: list[str], ranks: int, threads: int, own: dict[int, dict[str, str]] | None = None) -> None:
    """`megallama.pretrain` on so many ranks, `own` environment of some. Raises: SystemExit where one fails."""
    command = [sys.executable, "-m", "megallama.pretrain", *arguments]
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": str(threads)}
    env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(ranks):
        which = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (own or {}).get(rank, {})
        processes.append(subprocess.Popen(command, env=env | which, stdout=subprocess.DEVNULL))
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise SystemExit(f"error: {' '.join(arguments)} failed; its output is above")


@dataclass(frozen=True)
class Sample:
    """One run; `calls`: communications of rank 0 in a step."""

    shape: str
    layout: str
    supervised: bool
    cpu: float
    step: float
    calls: float = 0.0


@dataclass(frozen=True)
class Row:
    """Of a table."""

    cells: dict[str, str]


def measure(shape: str, layout: str, steps: int, *, supervised: bool) -> Sample:
    """A run of `steps` steps."""
    place = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as folder:
        own = settings(SHAPES[shape], place, "fp32", folder)
        before = cpu_seconds()
        more = [f"run.supervisor={str(supervised).lower()}", f"train.steps={steps}", "log.plot=false"]
        run([*own, *more], place.ranks, place.threads)
        cpu = cpu_seconds() - before
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        step = median([json.loads(line)["step_seconds"] for line in lines][WARM_UP:])
        words: dict[str, Any] = {"counts": {}}
        for file in (Path(folder) / "status").glob("*.json") if supervised else ():
            words = json.loads(file.read_text()).get("ranks", {}).get("0", words)
    calls = sum(words["counts"].values()) / steps
    return Sample(shape, layout, supervised, cpu, step, calls)


def times(args: argparse.Namespace) -> int:
    """Measure what is missing among the samples kept, as long as there is time; the table, once nothing is."""
    kept = Path(args.kept) if args.kept else None
    samples = [Sample(**x) for x in json.loads(kept.read_text())] if kept and kept.exists() else []
    began, longest = time.monotonic(), 0.0
    for shape in args.shapes.split(","):
        for layout in args.layouts.split(","):
            if not kept:
                wait_for_calm(20)
            for number in range(args.rounds):
                for supervised in (True, False) if number % 2 else (False, True):
                    if sum((x.shape, x.layout, x.supervised) == (shape, layout, supervised) for x in samples) > number:
                        continue
                    if time.monotonic() - began + longest > args.seconds:
                        print(f"{len(samples)} samples in {kept}: the same command goes on")
                        return 75
                    since = time.monotonic()
                    samples.append(measure(shape, layout, args.steps, supervised=supervised))
                    longest = max(longest, time.monotonic() - since)
                    if kept:
                        kept.write_text(json.dumps([asdict(x) for x in samples]))
    rows = []
    for shape, layout in dict.fromkeys((x.shape, x.layout) for x in samples):
        row = {"shape": shape, "layout": layout, "ranks": str(LAYOUTS[layout].ranks)}
        for name, key, unit in (("CPU s", "cpu", 1.0), ("step ms", "step", 1e3)):
            own = [x for x in samples if (x.shape, x.layout) == (shape, layout)]
            on, off = (median([getattr(x, key) for x in own if x.supervised == s]) for s in (True, False))
            row |= {f"{name} with": f"{unit * on:.2f}", f"{name} without": f"{unit * off:.2f}"}
            row[f"{name}, ratio"] = f"{on / off:.4f}"
        rows.append(row)
    print(table(rows))
    save("watching_times", list(samples), header("A supervisor beside every rank: times", args) + table(rows))
    return 0


def instructions(*arguments: object) -> int:
    """Of `drivers/looks.py`, by cachegrind."""
    command = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    command += [sys.executable, "-S", "-s", str(HERE / "drivers" / "looks.py"), str(HERE.parent), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    found = re.findall(r"I\s+refs:\s+([\d,]+)", done.stderr)
    if not found:
        raise SystemExit(f"error: {' '.join(command)} counted nothing: {done.stderr[-500:]}")
    return max(int(text.replace(",", "")) for text in found)


def each(*arguments: object, few: int, many: int) -> float:
    """Instructions of one more."""
    return (instructions(*arguments, many) - instructions(*arguments, few)) / (many - few)


def products(shape: Shape, layout: Layout) -> float:
    """Floating-point operations of a rank's matrix products in a step, attention left out."""
    weights = shape.layers * (4 * shape.hidden**2 + 3 * shape.hidden * shape.ffn) + shape.vocab * shape.hidden
    return 6.0 * weights * shape.micro_batch * shape.seq * layout.microbatches / (layout.tp * layout.pp)


def counted(args: argparse.Namespace) -> int:
    """The table of instructions."""
    words = {word: each("words", word, few=1000, many=21000) for word in WORDS}
    looks = {n: each("looks", n, few=10, many=60) for n in {LAYOUTS[x].ranks for x in args.layouts.split(",")}}
    rows = []
    for shape in args.shapes.split(","):
        for layout in args.layouts.split(","):
            one, place = measure(shape, layout, args.steps, supervised=True), LAYOUTS[layout]
            actions = 6.0 * place.microbatches + 1  # at most: forward, backward, and what each sends and receives
            layers = 2.0 * place.microbatches * SHAPES[shape].layers / place.pp
            written = {"action": actions, "layer": layers, "at": 10.0, "call": one.calls}
            own = sum(count * words[word] for word, count in written.items())
            look, least = LOOKS * one.step * looks[place.ranks], products(SHAPES[shape], place) / FLOPS
            rows.append({
                "shape": shape, "layout": layout, "ranks": str(place.ranks), "step ms": f"{1e3 * one.step:.0f}",
                "a step at least, 1e6": f"{least / 1e6:,.0f}", "looks, 1e6": f"{look / 1e6:.2f}",
                "words": ", ".join(f"{count:.0f} {word}" for word, count in written.items()),
                "words, 1e6": f"{own / 1e6:.3f}", "share at most": f"{(look + own) / least:.3%}",
            })  # fmt: skip
            print(rows[-1], flush=True)
    said = {**{f"a look at {n} ranks": looks[n] for n in sorted(looks)}, **{f"a word: {w}": words[w] for w in WORDS}}
    text = "\nInstructions of " + "; ".join(f"{what} {count:,.0f}" for what, count in said.items()) + ".\n"
    text = header("A supervisor beside every rank: instructions", args) + table(rows) + text
    save("watching_instructions", [Row(row) for row in rows], text)
    return 0


def stragglers(args: argparse.Namespace) -> int:
    """1,000 steps with nobody slow, and with one; 1 where anything is found wrongly, or not."""
    rows, wrong = [], 0
    for slow in (-1, args.slow):
        with tempfile.TemporaryDirectory() as folder:
            site = {"SLOWED": str(args.by), "PYTHONPATH": f"{HERE / 'drivers' / 'slow_site'}:{HERE.parent}"}
            began = time.monotonic()
            run([*TINY, f"run.folder={folder}", f"train.steps={args.steps}"], args.ranks, 1, {slow: site})
            seconds = time.monotonic() - began
            found = FOUND.findall((Path(folder) / "run.log").read_text())
            lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        excess = [line["slowest_excess"] for line in lines if "slowest_excess" in line]
        said = "; ".join(f"rank {rank}, {by} x" for rank, by in found)
        wrong += {int(rank) for rank, _ in found} != ({slow} if slow >= 0 else set())
        rows.append({
            "ranks": str(args.ranks), "steps": str(len(lines)), "seconds": f"{seconds:.0f}",
            "slowed": f"rank {slow}, {args.by:g} x" if slow >= 0 else "none", "found": said or "none",
            "largest excess of a comparison, median": f"{median(excess):.3f}" if excess else "",
        })  # fmt: skip
        print(rows[-1], flush=True)
    save("watching_stragglers", [Row(row) for row in rows], header("Slow ranks", args) + table(rows))
    return int(wrong > 0)


def main() -> int:
    """Measure and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(required=True)
    for name, work, steps in (("times", times, 6), ("instructions", counted, 4), ("stragglers", stragglers, 1000)):
        mode = modes.add_parser(name)
        mode.set_defaults(work=work)
        mode.add_argument("--steps", type=int, default=steps)
        if work is not stragglers:
            mode.add_argument("--shapes", default="S,M")
            mode.add_argument("--layouts", default="a,c")
        else:
            mode.add_argument("--ranks", type=int, default=4)
            mode.add_argument("--slow", type=int, default=2, help="the rank that is slowed")
            mode.add_argument("--by", type=float, default=1.1)
        if work is times:
            mode.add_argument("--rounds", type=int, default=15)
            mode.add_argument("--kept", help="a file of samples, with which the same command goes on")
            mode.add_argument("--seconds", type=float, default=1e9, help="end before so long, where samples are kept")
    args = parser.parse_args()
    return int(args.work(args))


if __name__ == "__main__":
    sys.exit(main())
