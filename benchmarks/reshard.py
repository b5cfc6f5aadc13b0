"""Conversion of a 1.1B model between formats: wall time with interpreter start, peak memory, exactness.

    python benchmarks/reshard.py                       needs about 10 GB in --folder and transformers for the peer row
    python benchmarks/reshard.py --folder /scratch --rounds 3 --small

Each round writes and reads the model's bytes raw, then runs every conversion once as the command a user types, and
transformers' from_pretrained + save_pretrained (which reshapes nothing and makes nothing durable).  Memory is the peak
of anonymous memory of the process, sampled every 5 ms.  Files are read from the page cache, as after a download.
Where more than a few seconds pass in waiting a line says for what: the disk, memory (what the kernel counts of all
processes), or that other programs are calm before a row begins.
Results: `benchmarks/results/reshard.json` and `reshard.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from launch import BenchmarkError, busy_seconds, stalled, wait_for_calm, waits
from report import RESULTS, header, machine, median, table

ROOT = Path(__file__).resolve().parent.parent
TOOL = [sys.executable, str(ROOT / "tools" / "reshard_checkpoint.py")]
MODELS = {"1.1B": (2048, 22, 32, 4, 5632, 32000), "0.1B": (768, 12, 12, 4, 2048, 32000)}
PEER = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2], max_shard_size="1GB")
"""
ROWS: dict[str, tuple[str, str, list[str]]] = {  # name -> source, target, options
    "HF -> megatron tp2 pp2": ("hf", "megatron", ["--to", "megatron", "--tp", "2", "--pp", "2"]),
    "megatron tp2 pp2 -> HF": ("megatron", "back", ["--to", "hf", "--shard-gb", "1"]),
    "HF -> meta mp2": ("hf", "meta", ["--to", "meta", "--tp", "2"]),
    "meta mp2 -> HF": ("meta", "back2", ["--to", "hf", "--shard-gb", "1"]),
    "HF -> megatron tp2 pp2, verified": ("hf", "checked", "--to megatron --tp 2 --pp 2 --compare-logits".split()),
}


@dataclass
class Measurement:
    """One run of one row."""

    row: str
    seconds: float
    peak_anonymous_bytes: int
    other_load: float


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Within, what is waited for is told of at the end."""
    before = stalled()
    try:
        yield
    finally:
        for line in waits(what, before, stalled()):
            print(line, flush=True)


def calm(what: str) -> None:
    """Wait until other programs are calm, and tell of it."""
    start = time.monotonic()
    wait_for_calm(90)
    for line in waits(what, {"other": start}, {"other": time.monotonic()}):
        print(line, flush=True)


def run(row: str, command: Sequence[str]) -> Measurement:
    """Run a command to its end. Raises: BenchmarkError if it fails."""
    calm(row)
    with telling(row):
        return _run(row, command)


def _run(row: str, command: Sequence[str]) -> Measurement:
    start, busy, peak = time.monotonic(), busy_seconds(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.005)
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        if process.returncode:
            raise BenchmarkError(f"{' '.join(command)}\nfailed:\n{output.read().decode(errors='replace')[-2000:]}")
    other = max(0.0, busy_seconds() - busy - usage.ru_utime - usage.ru_stime) / seconds
    print(f"{row}: {seconds:.2f} s, {peak / 1e6:.0f} MB, others' load {other:.2f}", flush=True)
    return Measurement(row, seconds, peak, round(other, 2))


def _anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def raw(folder: Path, size: int) -> list[Measurement]:
    """The same number of bytes written with fsync, and read."""
    calm("raw")
    block, path = memoryview(os.urandom(8 << 20)), folder / "raw"
    start, busy = time.monotonic(), busy_seconds()
    with path.open("wb", buffering=0) as file:
        for at in range(0, size, len(block)):
            file.write(block[: size - at])
        os.fsync(file.fileno())
    written = time.monotonic()
    buffer = memoryview(bytearray(8 << 20))
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    done = time.monotonic()
    path.unlink()
    other = round(max(0.0, (busy_seconds() - busy) / (done - start) - 1), 2)
    times = {"raw write + fsync": written - start, "raw read": done - written}
    return [Measurement(row, seconds, 0, other) for row, seconds in times.items()]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor file; both folders were cut into files by the same rule."""
    files = sorted(folder.glob("*.safetensors"))
    return {p.name: hashlib.file_digest(p.open("rb"), "sha256").hexdigest() for p in files}


def one_round(folder: Path, peer: str | None) -> list[Measurement]:
    """Every row once; results are removed as soon as no later row needs them."""
    size = sum(p.stat().st_size for p in (folder / "hf").iterdir())
    with telling("raw"):
        found = raw(folder, size)
    for row, (source, target, options) in ROWS.items():
        found.append(run(row, [*TOOL, str(folder / source), str(folder / target), *options]))
        if target.startswith("back"):
            if digests(folder / target) != digests(folder / "hf"):
                raise BenchmarkError(f"{row}: the round trip changed bytes")
            shutil.rmtree(folder / source)
        if target.startswith("back") or target == "checked":
            shutil.rmtree(folder / target)
    if peer:
        row = "transformers from_pretrained + save_pretrained"
        found.append(run(row, [peer, "-c", PEER, str(folder / "hf"), str(folder / "peer")]))
        shutil.rmtree(folder / "peer")
    return found


def summary(rounds: list[list[Measurement]], largest: int) -> list[dict[str, str]]:
    """A table row per measured row."""
    rows = []
    for name in [m.row for m in rounds[0]]:
        found = [m for one in rounds for m in one if m.row == name]
        peak = median([m.peak_anonymous_bytes for m in found])
        ratio = median([m.seconds / one[0].seconds for one in rounds for m in one if m.row == name])
        rows.append(
            {
                "row": name,
                "seconds": f"{median([m.seconds for m in found]):.2f}",
                "rounds": " ".join(f"{m.seconds:.2f}" for m in found),
                "of raw write + fsync": f"{ratio:.2f}",
                "peak anonymous MB": f"{peak / 1e6:.0f}" if peak else "-",
                "above the largest tensor": f"{(peak - largest) / 1e6:.0f}" if peak else "-",
                "others' load": " ".join(f"{m.other_load}" for m in found),
            }
        )
    return rows


def main() -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default a temporary folder")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every row (3)")
    parser.add_argument("--small", action="store_true", help="a 0.1B model, to try it out; writes no results")
    parser.add_argument("--peer", default=sys.executable, help='Python that has transformers; "" leaves it out')
    args = parser.parse_args()
    name = "0.1B" if args.small else "1.1B"
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        maker = [sys.executable, str(ROOT / "benchmarks/drivers/make_llama.py"), str(folder / "hf")]
        with telling("the model that is made first"):
            made = subprocess.run([*maker, *map(str, MODELS[name])], check=True, capture_output=True, text=True)
        rounds = [one_round(folder, args.peer) for _ in range(args.rounds)]
    largest = json.loads(made.stdout)["largest"]
    text = header(f"Conversion of a {name} model between formats", args) + table(summary(rounds, largest))
    text += (
        f"\nThe largest tensor has {largest / 1e6:.0f} MB; torch alone takes about 150 MB. Round trips are compared by "
        "SHA-256 of\nevery file. Others' load: cores that other processes kept busy; raw rows: what the disk gave "
        "in the same round.\n"
    )
    print("\n" + text)
    if not args.small:
        content = {**machine(), "command": sys.argv, "runs": [asdict(m) for one in rounds for m in one]}
        (RESULTS / "reshard.json").write_text(json.dumps(content, indent=1) + "\n")
        (RESULTS / "reshard.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
