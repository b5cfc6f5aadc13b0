"""Checkpoints beside the disk's own speed and beside PyTorch's: saving, waiting, loading; and what damage and kills do.

    python benchmarks/checkpoint.py                          needs about 10 GB in --folder; about 25 minutes
    python benchmarks/checkpoint.py --rounds 3 --only speed  (or: cpu, flips, kills)

A model of 0.145 B parameters has 2.08 GB of state: bf16 weights, fp32 master weights and two moments. In one process
(and in two) every way to store it takes its turn, round after round, between barriers: a raw write with fsync, ours to
durable with all digests, torch.distributed.checkpoint (DCP) with one and two threads, safetensors and torch.save with
fsync. Then saves behind the back of training, beside one memcpy of the state. Then loads of what two ranks cut by
tensor parallelism have saved, by ranks cut in another way, with the page cache dropped. Flips: one bit at 1,000 random
places. Kills: SIGKILL at every system call of a save. Results: `benchmarks/results/checkpoint.json` and `.md`.

--only cpu: 0.5 GB of state in a file system in memory, where the processor alone sets the pace; results of its own,
`checkpoint_cpu.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import BenchmarkError, launch, wait_for_calm
from report import header, median, save, table

ROOT = Path(__file__).resolve().parent.parent
DRIVER = ROOT / "benchmarks" / "drivers" / "checkpoint_ranks.py"
MEMCPY, OTHERS = "one memcpy of the state", "raw write + fsync"
BY_DCP = "DCP, 2 threads", "DCP, into another layout"  # saving, loading
BASES = {"layout": "raw read", "waits": MEMCPY, "start": MEMCPY}  # what a row is compared with, by its last word


@dataclass
class Measurement:
    """One way, once."""

    row: str
    ranks: int
    round: int
    seconds: float
    bytes: float
    extra: int  # bytes of memory the rank needed beyond what it had
    other_load: float


def speed(folder: Path, rounds: int, *more: str) -> list[Measurement]:
    """All rows of saving and loading with one and two ranks; `more` for the driver: "small"."""
    found = []
    for ranks in (1, 2):
        for what in ("save", "load"):
            wait_for_calm(120)
            with tempfile.TemporaryDirectory(dir=folder) as place:
                command = [sys.executable, str(DRIVER), what, place, str(rounds), "1", *more]
                done = launch(command, ranks, 2 // ranks, timeout=3600)
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            found += [Measurement(**line, other_load=done.other_load) for line in lines]
            print(f"{what}, {ranks} ranks: others' load {done.other_load}", flush=True)
    return found


def speed_table(found: list[Measurement], bases: dict[str, str] = BASES, others: str = OTHERS) -> str:
    """Medians over rounds, and the median of the ratios to the base of the same round."""
    rows = []
    for ranks in (1, 2):
        for name in dict.fromkeys(m.row for m in found if m.ranks == ranks):
            base = bases.get(name.rpartition(" ")[2], others)
            own = sorted((m for m in found if m.row == name and m.ranks == ranks), key=lambda m: m.round)
            of = {m.round: m for m in found if m.row == base and m.ranks == ranks}
            ratios = [(of[m.round].seconds / of[m.round].bytes) / (m.seconds / m.bytes) for m in own if m.round in of]
            seconds = median([m.seconds for m in own])
            rows.append(
                {
                    "ranks": str(ranks),
                    "row": name,
                    "seconds": f"{seconds:.2f}",
                    "GB/s": f"{median([m.bytes for m in own]) / seconds / 1e9:.2f}",
                    "speed": f"{median(ratios):.2f} of {base}" if name not in (*bases.values(), others) else "-",
                    "rounds": " ".join(f"{m.seconds:.2f}" for m in own),
                    "most extra memory of a rank": f"{max(m.extra for m in own) / 1e6:.0f} MB",
                }
            )
    return table(rows)


FLIPS = """
import json, random, sys
from pathlib import Path
from tests.checkpoint.states import *
folder, count = Path(sys.argv[1]), int(sys.argv[2])
manager = make_manager(folder, make_config())
old, new = make_state(seed=1), make_state(seed=2)
manager.save(1, solo_shards(old), {"step": 1})
manager.save(2, solo_shards(new), {"step": 2})
step, dice, named, used = folder / "step-00000002", random.Random(0), 0, 0
sizes = {p: p.stat().st_size for p in sorted(step.rglob("*")) if p.is_file()}
for path in dice.choices(list(sizes), list(sizes.values()), k=count):
    original, at = path.read_bytes(), dice.randrange(sizes[path])
    damaged = bytearray(original)
    damaged[at] ^= 1 << dice.randrange(8)
    path.write_bytes(damaged)
    log, shards = [], empty_solo()
    counters = make_manager(folder, make_config(), log=log.append).resume(shards)
    assert_holds(shards, old)
    used += counters == {"step": 1}
    where = path.name if path.name == "manifest.json" else f"{path} is damaged in block {at // 4096} "
    named += where in log[0]
    (folder / "step-00000002.damaged").rename(step)
    path.write_bytes(original)
print(json.dumps({"named": named, "used": used}))
"""


def flips(folder: Path, count: int) -> str:
    """One flipped bit at random places: who notices."""
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file, save_file

    command = [sys.executable, "-c", FLIPS, str(folder / "ours"), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=single())
    if done.returncode:
        raise BenchmarkError(done.stderr[-2000:])
    ours = json.loads(done.stdout)
    rows = [{"format": "ours", "noticed": f"{ours['used']} of {count}, previous checkpoint used",
             "file and block named": f"{ours['named']} of {count}"}]  # fmt: skip
    state = {f"{i}": torch.randn(64, 64) for i in range(8)}
    ways: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
        "safetensors": (lambda p: save_file(state, p), load_file),
        "torch.save": (lambda p: torch.save(state, p), lambda p: torch.load(p, weights_only=True)),
        "DCP": (lambda p: dcp.save(state, checkpoint_id=str(p)), lambda p: dcp.load(dict(state), checkpoint_id=str(p))),
    }
    for name, (write, read) in ways.items():
        path, dice, noticed = folder / name, random.Random(0), 0
        write(path)
        file = max((p for p in path.iterdir()), key=lambda p: p.stat().st_size) if path.is_dir() else path
        original = file.read_bytes()
        start = original.find(next(iter(state.values())).numpy().tobytes()[:64])  # the data, not the headers
        for _ in range(count):
            damaged = bytearray(original)
            damaged[dice.randrange(start, start + 8 * 64 * 64 * 4)] ^= 1 << dice.randrange(8)
            file.write_bytes(damaged)
            try:
                read(path)
            except BaseException:  # noqa: BLE001 - DCP's errors are no Exceptions
                noticed += 1
        rows.append({"format": name, "noticed": f"{noticed} of {count}", "file and block named": "-"})
    return table(rows)


def single() -> dict[str, str]:
    """The environment of a process of one thread that finds the tests."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def kills(folder: Path) -> str:
    """SIGKILL at every call that changes files, in saves by one to four ranks."""
    rows = []
    for ranks in (1, 2, 3, 4):
        for again in (0, 1):
            numbers = [str(ranks), str(again), "1"]
            command = [sys.executable, "-m", "tests.checkpoint.crashes", str(folder / "kill"), *numbers]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=single())
            if done.returncode:
                raise BenchmarkError(done.stderr[-2000:])
            found = json.loads(done.stdout)
            rows.append(
                {
                    "ranks": str(ranks),
                    "the step was": "saved again" if again else "new",
                    "kills": str(found["killed"]),
                    "resumed the old one": str(found["old"]),
                    "resumed the new one": str(found["new"]),
                    "anything else": str(found["MIXED"]),
                }
            )
            print(rows[-1], flush=True)
    return table(rows)


def main() -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default a temporary folder")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of every row (5)")
    parser.add_argument("--only", choices=("speed", "cpu", "flips", "kills"), help="one part; no results but of cpu")
    args = parser.parse_args()
    if args.only == "cpu":
        with tempfile.TemporaryDirectory(dir=args.folder or "/dev/shm") as temporary:
            found = speed(Path(temporary), args.rounds, "small")
        text = speed_table(found, {"layout": BY_DCP[1], "read": BY_DCP[1]}, BY_DCP[0])
        title = "Checkpoints of 0.5 GB in memory: the processor sets the pace"
        save("checkpoint_cpu", found, header(title, args) + text)
        return 0
    found: list[Measurement] = []
    parts = []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        if args.only in (None, "speed"):
            found = speed(folder, args.rounds)
            loads = ", ".join(sorted({str(m.other_load) for m in found}))
            parts += [speed_table(found) + f"\nOthers' load (cores kept busy by other programs): {loads}.\n"]
        if args.only in (None, "flips"):
            parts += ["## One flipped bit at 1,000 random places\n\n" + flips(folder, 1000)]
        if args.only in (None, "kills"):
            parts += ["## SIGKILL at every system call of a save\n\n" + kills(folder)]
    text = header("Checkpoints: saving, waiting, loading; damage and kills", args) + "\n".join(parts)
    if args.only:
        print("\n" + text)
    else:
        save("checkpoint", found, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
