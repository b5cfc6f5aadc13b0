"""Other trainers from the package index and ours, alternately, on the same work: a table of ratios.

    python benchmarks/peers.py --setup runs/peers         once: their environment (about 1.5 GB)
    python benchmarks/peers.py --python runs/peers/bin/python
    python benchmarks/peers.py --python ... --shapes S --layouts a,c --dtypes bf16 --rounds 3
    python benchmarks/peers.py --python ... --peers hf,megatron-core --record
    python benchmarks/peers.py --python ... --kept FILE --seconds 200       in pieces: again, while it ends with 75

Which peers, of which versions, each with the settings that are best for it: `peers.toml`.  Per row and round every
system runs once, one after the other, so that all of them see the machine in the same condition; the ratio is between
medians over an odd number of rounds.  Ours runs with `memory.recompute=none`, as the peers do, or as `--set` says; the
table says which.  torch.compile of plain PyTorch is a peer, in columns of its own beside the best eager one.

The rate of large products is measured in every round.  `--record` keeps, per processor and row, each peer's share of
it (`results/peer_shares.json`); a round in which a peer falls more than 5 % below its recorded share does not count,
and is made again, up to twice as many as asked for: a slow peer makes no good ratio.  A run beside which other
processes were busy is made again at once, at most twice.

With `--kept` every round is in a file as soon as it ends, and no round begins that would end later than `--seconds`;
the same command goes on with the file, and writes the results once no round of its rows is missing.

Results: `results/peers.json` and `peers.md`.  Rows that were measured before, on other processors too, stay there with
their processor and commit until they are measured again on the same one, with the same peers at least.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import step
from drivers.work import LAYOUTS, SHAPES
from launch import BenchmarkError, launch, wait_for_calm
from report import RESULTS, Run, header, machine, median, replace_file, table

DRIVERS = Path(__file__).resolve().parent / "drivers"
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
CALM = 0.15  # cores of others; with more of them busy a run says little
LEAST_SHARE = 0.95  # of a peer's recorded share of the rate of large products


@dataclass(frozen=True)
class Peer:
    """One way to run one other trainer, at its best."""

    name: str
    driver: str
    layouts: str
    variant: str = "default"
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    keeps_master: bool = True
    keep_memory: bool = False
    compiled: bool = False


SETTINGS = tomllib.loads((DRIVERS.parent / "peers.toml").read_text(encoding="utf-8"))
INSTALL: list[list[str]] = SETTINGS["install"]
PEERS = tuple(Peer(**{k: tuple(v) if isinstance(v, list) else v for k, v in p.items()}) for p in SETTINGS["peers"])


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
    env = KEEP_MEMORY if peer.keep_memory else {}
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


def one_round(row: tuple[str, str, str], chosen: list[Peer], args: argparse.Namespace) -> list[Run]:
    """Every system of a row once; a peer that fails is named and left out from here on."""
    shape, dtype, layout = row
    wait_for_calm(args.calm)
    rate = step.probe(layout, dtype)
    extra = [*([] if recompute_of(args.set) else ["memory.recompute=none"]), *args.set]
    ours = undisturbed(lambda: step.measure(shape, layout, dtype, args.steps, extra, args.timeout), args)
    runs = [replace(ours, recompute=recompute_of(extra), gemm_gflops=rate)]
    say(runs[-1])
    for peer in list(chosen):
        try:
            run = undisturbed(lambda peer=peer: run_peer(peer, row, args), args)  # type: ignore[misc]
            runs.append(replace(run, gemm_gflops=rate))
            say(runs[-1])
        except BenchmarkError as error:
            chosen.remove(peer)
            print(f"{peer.name} failed on {' '.join(row)}: {error}", file=sys.stderr)
    return runs


def undisturbed(make: Callable[[], Run], args: argparse.Namespace) -> Run:
    """A run; again, at most twice, where other processes were busy meanwhile."""
    for _ in range(3):
        wait_for_calm(args.calm)
        run = make()
        if run.other_load <= CALM:
            break
    return run


def recompute_of(settings: list[str]) -> str:
    """What memory.recompute is set to, if it is."""
    return next((x.partition("=")[2] for x in reversed(settings) if x.startswith("memory.recompute=")), "")


class Piece:
    """How long this command may measure, and what earlier ones have measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.file: Path | None = args.kept
        self.seconds: float = args.seconds
        self.began = time.monotonic()
        self.rounds = 0  # of this command
        if self.file and self.file.exists():
            self.session: dict[str, Any] = json.loads(self.file.read_text())
        else:
            self.session = {**machine(), "peers": peer_versions(args.python), "command": sys.argv}
            self.session |= {"runs": [], "longest": {}, "failed": {}}

    def of(self, row: str) -> list[Run]:
        """What is measured of a row."""
        return [run for run in (Run(**x) for x in self.session["runs"]) if run.row == row]

    def measured(self) -> dict[str, Any]:
        """What belongs into the results."""
        return {key: value for key, value in self.session.items() if key != "longest"}

    def time_left(self, row: str) -> bool:
        """If a round of the row fits. The first of this command always does; one of unknown length takes half of it."""
        longest = self.session["longest"].get(row, self.seconds / 2)
        return bool(not self.rounds or time.monotonic() - self.began + longest <= self.seconds)

    def add(self, row: str, runs: list[Run], failed: set[str], seconds: float) -> None:
        """Keep a round, and which peers failed in it."""
        self.rounds += 1
        self.session["runs"] += [asdict(run) for run in runs]
        self.session["longest"][row] = max(seconds, self.session["longest"].get(row, 0.0))
        self.session["failed"].setdefault(row, []).extend(sorted(failed))
        if self.file:
            replace_file(self.file, json.dumps(self.session, indent=1) + "\n")


def measure_row(row: tuple[str, str, str], args: argparse.Namespace, piece: Piece) -> bool:
    """Rounds until `args.rounds` count, at most twice as many. False: there is no time for the next one now."""
    shape, dtype, layout = row
    name = " ".join(row)
    asked = args.peers.split(",") if args.peers else [p.name for p in PEERS]
    able = [p for p in PEERS if p.name in asked and layout in p.layouts and dtype in p.dtypes]
    chosen = [p for p in able if p.name not in piece.session["failed"].get(name, ())]
    recorded = read_json("peer_shares", {}).get(processor(machine()["machine"]), {})
    while True:
        ours = [run for run in piece.of(name) if run.system == "megallama"]
        if sum(not run.void for run in ours) >= args.rounds or len(ours) >= 2 * args.rounds:
            return True
        if not piece.time_left(name):
            return False
        began, before = time.monotonic(), {p.name for p in chosen}
        newest = judged(one_round(row, chosen, args), recorded)
        piece.add(name, newest, before - {p.name for p in chosen}, time.monotonic() - began)
        if newest[0].void:
            print(f"{name}: this round does not count: {newest[0].void}", flush=True)


def share(run: Run) -> float:
    """Of the rate of large products in its round, as the operations of the model count."""
    return run.tokens_per_second * step.flops_per_token(SHAPES[run.shape]) / 1e9 / run.gemm_gflops


def judged(runs: list[Run], recorded: dict[str, dict[str, float]]) -> list[Run]:
    """The runs of a round, void where a peer of them was slower than it can be."""
    why = []
    for run in runs:
        usual = recorded.get(run.row, {}).get(run.system)
        if usual and run.system != "megallama" and share(run) < LEAST_SHARE * usual:
            why.append(f"{run.system} had {share(run):.3f} of the rate of products, {usual:.3f} is recorded")
    return [replace(run, void="; ".join(why)) for run in runs]


def record(runs: list[Run]) -> None:
    """Keep each peer's median share on this processor, where it is more than what is recorded."""
    known = read_json("peer_shares", {})
    here = known.setdefault(processor(machine()["machine"]), {})
    for (row, system), of in grouped(counting(runs)).items():
        if system != "megallama":
            best = here.setdefault(row, {})
            best[system] = max(best.get(system, 0.0), round(median([share(run) for run in of]), 4))
    replace_file(RESULTS / "peer_shares.json", json.dumps(known, indent=1, sort_keys=True) + "\n")


def read_json(name: str, default: Any) -> Any:
    """A file of `results/`, if there is one."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else default


def counting(runs: list[Run]) -> list[Run]:
    """Those of rounds that count, of each system an odd number: a median then is one of them."""
    out: list[Run] = []
    for of in grouped([run for run in runs if not run.void]).values():
        out += odd(of)
    return out


def odd(values: list[Any]) -> list[Any]:
    """All of them, or all but the last."""
    return values[: len(values) - 1 + len(values) % 2]


def processor(where: str) -> str:
    """Of what `report.machine` says: the processor and its cores, without the kernel's version."""
    return ", ".join(where.split(", ")[:2])


def grouped(runs: list[Run]) -> dict[tuple[str, str], list[Run]]:
    """By row and system, in order."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.row, run.system), []).append(run)
    return groups


def peer_versions(python: str) -> str:
    """What is installed where the peers run."""
    names = ("torch", "transformers", "litgpt", "lightning", "megatron-core", "torchtitan")
    code = (
        "import importlib.metadata as m; found = {d.name.lower(): d.version for d in m.distributions()}; "
        f"print(', '.join(n + ' ' + found.get(n, 'missing') for n in {names}))"
    )
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
    calm = odd([r.tokens_per_second for r in runs if r.other_load <= CALM])
    return median(calm or odd([r.tokens_per_second for r in runs]))


def compare(runs: list[Run]) -> dict[str, str]:
    """The line of the ratio table for the runs of one row that count."""
    by_system = {system: of for (_, system), of in grouped(runs).items()}
    ours = by_system.pop("megallama")
    masters = {name: of for name, of in by_system.items() if of[0].keeps_master}
    memory = {name: max(max(r.peak_rss_mib) for r in of) for name, of in masters.items()}
    compiled = {peer.name for peer in PEERS if peer.compiled} & set(by_system)
    line = {"row": ours[0].row, "ours tok/s": f"{speed(ours):.0f}", "recompute": ours[0].recompute or "selective"}
    best = max(set(by_system) - compiled, key=lambda name: speed(by_system[name]), default="")
    own = max(max(r.peak_rss_mib) for r in ours)
    missing = ("best peer tok/s", "best peer", "ratio", "of each round", "torch.compile", "ratio to it")
    line |= dict.fromkeys(missing, "-")
    if best:
        each = [
            f"{a.tokens_per_second / b.tokens_per_second:.2f}"
            if max(a.other_load, b.other_load) <= CALM
            else "disturbed"
            for a, b in zip(ours, by_system[best], strict=False)
        ]
        line |= {
            "best peer tok/s": f"{speed(by_system[best]):.0f}",
            "best peer": best,
            "ratio": f"{speed(ours) / speed(by_system[best]):.2f}",
            "of each round": " ".join(each),
        }
    for name in compiled:
        rate = speed(by_system[name])
        line |= {"torch.compile": f"{rate:.0f}", "ratio to it": f"{speed(ours) / rate:.2f}"}
    least = min(memory.values(), default=0)
    line |= {"ours MiB/rank": str(own), "least peer MiB/rank": str(least or "-")}
    line |= {"memory ratio": f"{own / least:.2f}" if least else "-", "peers that ran": ", ".join(sorted(by_system))}
    return line | {"others' load": f"{max(r.other_load for r in runs):.2f}"}


def all_systems(runs: list[Run]) -> list[dict[str, str]]:
    """Every system of every row: medians."""
    return [
        {
            "row": row,
            "system": system,
            "tok/s": f"{speed(of):.0f}",
            "rounds": " ".join(f"{r.tokens_per_second:.0f}" for r in of),
            "of the rate of products": f"{median([*map(share, of)]):.2f}" if all(r.gemm_gflops for r in of) else "-",
            "MiB of each rank": " ".join(str(x) for x in of[0].peak_rss_mib),
            "fp32 master": "yes" if of[0].keeps_master else "no",
        }
        for (row, system), of in grouped(runs).items()
    ]


def report(sessions: list[dict[str, Any]]) -> str:
    """Tables of all rows ever measured, without those measured again on the same processor with the same systems."""
    kept: list[tuple[str, str, dict[str, Any], list[Run]]] = []
    for session in sessions:
        runs = [Run(**run) for run in session["runs"]]
        for name in dict.fromkeys(run.row for run in runs):
            place = processor(session["machine"])
            if found := counting([run for run in runs if run.row == name]):
                systems = {run.system for run in found}
                kept = [k for k in kept if k[:2] != (place, name) or not {r.system for r in k[3]} <= systems]
                kept.append((place, name, session, found))
    lines, everything = [], []
    for place, _, session, runs in kept:
        where = {"processor": place, "commit": session["commit"].replace("-dirty", "*")}
        lines += [compare(runs) | where] if any(r.system == "megallama" for r in runs) else []
        everything += [line | where for line in all_systems(runs)]
    text = table(lines) + (
        "\nRatio: median of ours / median of the best eager peer. Least peer: of those that keep fp32 master weights. "
        "Ratios hold on the processor of their row.\n"
        "Others' load: cores that other processes kept busy meanwhile; a run with more than 0.15 "
        "does not count where another one of its system does.\n"
    )
    text += "".join(f"- {note}\n" for note in SETTINGS["notes"])
    return text + "\n## Every system\n\n" + table(everything)


def keep(sessions: list[dict[str, Any]], newest: dict[str, Any], args: argparse.Namespace) -> None:
    """Write what was measured before, and now."""
    RESULTS.mkdir(exist_ok=True)
    replace_file(RESULTS / "peers.json", json.dumps([*sessions, newest], indent=1) + "\n")
    text = header("megallama and its peers", args) + report([*sessions, newest])
    replace_file(RESULTS / "peers.md", text)
    print("\n" + text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    step.add_row_options(parser)
    parser.add_argument("--setup", type=Path, metavar="FOLDER", help="install the peers there and stop")
    parser.add_argument("--python", help="the interpreter of the peers' environment")
    parser.add_argument("--peers", help=f"names, comma-separated: {', '.join(p.name for p in PEERS)}")
    parser.add_argument("--record", action="store_true", help="keep the peers' shares of the rate of products")
    parser.add_argument("--kept", type=Path, help="a file of rounds, with which the same command goes on")
    parser.add_argument("--seconds", type=float, default=1e9, help="end before so long, with 75 where more is to do")
    parser.add_argument("--timeout", type=float, default=900.0, help="for one run [s]")
    args = parser.parse_args()
    if args.setup:
        setup(args.setup)
        return 0
    if not args.python:
        parser.error("--python is missing; first: python benchmarks/peers.py --setup runs/peers")
    if args.rounds % 2 == 0:
        parser.error(f"--rounds {args.rounds}: a median is of an odd number of rounds")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    before = read_json("peers", [])
    sessions: list[dict[str, Any]] = before if isinstance(before, list) else [before]
    piece = Piece(args)
    for row in step.rows(args):
        try:
            if not measure_row(row, args, piece):
                print(f"{len(piece.session['runs'])} runs in {piece.file}: the same command goes on")
                return 75
        except BenchmarkError as error:
            print(f"megallama failed on {' '.join(row)}: {error}", file=sys.stderr)
            continue
        if args.record:
            record(piece.of(" ".join(row)))
        if not piece.file:
            keep(sessions, piece.measured(), args)
    if piece.file:
        keep(sessions, piece.measured(), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
