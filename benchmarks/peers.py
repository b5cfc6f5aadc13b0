"""Other trainers from the package index and ours, alternately, on the same work: a table of ratios.

    python benchmarks/peers.py --setup runs/peers         once: their environment (about 1.5 GB)
    python benchmarks/peers.py --python runs/peers/bin/python
    python benchmarks/peers.py --python ... --shapes S --layouts a,c --dtypes bf16 --rounds 3
    python benchmarks/peers.py --python ... --peers hf,megatron-core --keep-memory

Per row and round every system runs once, one after the other, so that all of them see the machine in
the same condition; the ratio is between medians over the rounds.  A peer that cannot do a layout is left
out there (`PEERS`).  `--keep-memory` gives the peers, too, an allocator that does not return memory to
the kernel.  Results: `benchmarks/results/peers.json` and `peers.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import step
from drivers.work import LAYOUTS
from launch import BenchmarkError, launch, wait_for_calm
from report import Run, header, median, save, table

DRIVERS = Path(__file__).resolve().parent / "drivers"
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
TORCH = "torch==2.13.0"
INSTALL = (  # torch first and alone, so that nothing replaces it; then each peer with what it needs here
    (TORCH,),
    ("numpy", "transformers==5.23.0", TORCH),
    ("litgpt==0.5.13", TORCH),
    ("huggingface-hub>=1.31", "einops", TORCH),  # litgpt asks for an older one than transformers needs
    ("--no-deps", "megatron-core==0.16.1"),
    ("--no-deps", "torchtitan==0.3.0"),
    ("sentencepiece==0.2.3",),
    ("tyro", "spmd_types==0.2.3", "torchdata", "torch_checkpointing", "tensorboard", "datasets", TORCH),
)


@dataclass(frozen=True)
class Peer:
    """One way to run one other trainer."""

    name: str
    driver: str
    variant: str
    layouts: str
    dtypes: tuple[str, ...]
    keeps_master: bool


BOTH = ("bf16", "fp32")
PEERS = (
    Peer("hf", "run_hf.py", "sdpa", "ab", BOTH, True),
    Peer("hf eager attention", "run_hf.py", "eager", "ab", BOTH, True),
    Peer("litgpt", "run_litgpt.py", "mixed", "ab", BOTH, True),
    Peer("litgpt bf16-true", "run_litgpt.py", "true", "ab", ("bf16",), False),
    Peer("megatron-core", "run_megatron.py", "default", "abcde", BOTH, True),
    Peer("torchtitan", "run_torchtitan.py", "default", "ab", BOTH, True),
)


def setup(folder: Path) -> None:
    """Make the environment the peers run in."""
    venv.create(folder, with_pip=True)
    for packages in INSTALL:
        subprocess.run([str(folder / "bin" / "pip"), "install", *packages], check=True)
    print(f"peers are installed; now: python benchmarks/peers.py --python {folder}/bin/python")


def run_peer(peer: Peer, row: tuple[str, str, str], args: argparse.Namespace) -> Run:
    """One run of a peer. Raises: BenchmarkError."""
    shape, dtype, layout = row
    place = LAYOUTS[layout]
    command = [args.python, str(DRIVERS / peer.driver), "--shape", shape, "--dtype", dtype, "--layout", layout]
    command += ["--steps", str(args.steps), "--variant", peer.variant]
    env = KEEP_MEMORY if args.keep_memory else {}
    outcome = launch(command, place.ranks, place.threads, env=env, timeout=args.timeout)
    output = next((line for line in outcome.stdout.splitlines() if line.startswith("{")), "")
    if not output:
        raise BenchmarkError(f"{' '.join(command)}\nended without a result:\n{outcome.stdout[-1000:]}")
    return Run(
        system=peer.name,
        shape=shape,
        layout=layout,
        dtype=dtype,
        keeps_master=peer.keeps_master,
        peak_rss_mib=outcome.peak_rss_mib,
        other_load=outcome.other_load,
        **json.loads(output),
    )


def measure_row(row: tuple[str, str, str], args: argparse.Namespace) -> list[Run]:
    """Every system of a row, `args.rounds` times in turn; a peer that fails is named and left out."""
    shape, dtype, layout = row
    chosen = [p for p in PEERS if layout in p.layouts and dtype in p.dtypes]
    if args.peers:
        chosen = [p for p in chosen if p.name in args.peers.split(",")]
    runs: list[Run] = []
    for _ in range(args.rounds):
        wait_for_calm(args.calm)
        runs.append(step.measure(shape, layout, dtype, args.steps, args.set, args.timeout))
        say(runs[-1])
        for peer in list(chosen):
            try:
                wait_for_calm(args.calm)
                runs.append(run_peer(peer, row, args))
                say(runs[-1])
            except BenchmarkError as error:
                chosen.remove(peer)
                print(f"{peer.name} failed on {' '.join(row)}: {error}", file=sys.stderr)
    return runs


def peer_versions(python: str) -> str:
    """What is installed where the peers run."""
    names = ("torch", "transformers", "litgpt", "lightning", "megatron-core", "torchtitan")
    code = f"import importlib.metadata as m; print(', '.join(n + ' ' + m.version(n) for n in {names}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def say(run: Run) -> None:
    """One line of progress."""
    memory = " ".join(str(x) for x in run.peak_rss_mib)
    print(
        f"{run.row}  {run.system:20} {run.tokens_per_second:9.1f} tok/s  {memory} MiB  others {run.other_load}",
        flush=True,
    )


def speed(runs: list[Run]) -> float:
    """Median tokens/s over rounds, of the undisturbed ones if there are any."""
    calm = [r.tokens_per_second for r in runs if r.other_load <= 0.15]
    return median(calm or [r.tokens_per_second for r in runs])


def compare(runs: list[Run]) -> dict[str, str]:
    """The line of the ratio table for the runs of one row."""
    by_system: dict[str, list[Run]] = {}
    for run in runs:
        by_system.setdefault(run.system, []).append(run)
    ours = by_system.pop("megallama")
    memory = {name: max(max(r.peak_rss_mib) for r in of) for name, of in by_system.items() if of[0].keeps_master}
    line = {"row": ours[0].row, "ours tok/s": f"{speed(ours):.0f}"}
    best = max(by_system, key=lambda name: speed(by_system[name]), default="")
    own = max(max(r.peak_rss_mib) for r in ours)
    if best:
        each = [a.tokens_per_second / b.tokens_per_second for a, b in zip(ours, by_system[best], strict=False)]
        line |= {
            "best peer tok/s": f"{speed(by_system[best]):.0f}",
            "best peer": best,
            "ratio": f"{speed(ours) / speed(by_system[best]):.2f}",
            "of each round": " ".join(f"{x:.2f}" for x in each),
        }
    else:
        line |= dict.fromkeys(("best peer tok/s", "best peer", "ratio", "of each round"), "-")
    least = min(memory.values(), default=0)
    line |= {"ours MiB/rank": str(own), "least peer MiB/rank": str(least or "-")}
    line |= {"memory ratio": f"{own / least:.2f}" if least else "-"}
    return line | {"others' load": f"{max(r.other_load for r in runs):.2f}"}


def all_systems(runs: list[Run]) -> list[dict[str, str]]:
    """Every system of every row: medians."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.row, run.system), []).append(run)
    return [
        {
            "row": row,
            "system": system,
            "tok/s": f"{speed(of):.0f}",
            "rounds": " ".join(f"{r.tokens_per_second:.0f}" for r in of),
            "MiB of each rank": " ".join(str(x) for x in of[0].peak_rss_mib),
            "fp32 master": "yes" if of[0].keeps_master else "no",
        }
        for (row, system), of in groups.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    step.add_row_options(parser)
    parser.add_argument("--setup", type=Path, metavar="FOLDER", help="install the peers there and stop")
    parser.add_argument("--python", help="the interpreter of the peers' environment")
    parser.add_argument("--peers", help=f"names, comma-separated: {', '.join(p.name for p in PEERS)}")
    parser.add_argument("--keep-memory", action="store_true", help="give the peers a memory-keeping allocator")
    parser.add_argument("--timeout", type=float, default=900.0, help="for one run [s]")
    args = parser.parse_args()
    if args.setup:
        return setup(args.setup)
    if not args.python:
        parser.error("--python is missing; first: python benchmarks/peers.py --setup runs/peers")
    runs: list[Run] = []
    lines: list[dict[str, str]] = []
    for row in step.rows(args):
        try:
            of_row = measure_row(row, args)
        except BenchmarkError as error:
            print(f"megallama failed on {' '.join(row)}: {error}", file=sys.stderr)
            continue
        runs += of_row
        lines.append(compare(of_row))
        text = header("megallama and its peers", args) + table(lines)
        text += (
            "\nRatio: median of ours / median of the best peer. Least peer: of those that keep fp32 master weights.\n"
        )
        text += "Others' load: cores that other processes kept busy meanwhile; above 0.15 little can be concluded.\n"
        save("peers", runs, text + "\n## Every system\n\n" + table(all_systems(runs)))


if __name__ == "__main__":
    main()
