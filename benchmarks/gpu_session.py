"""Minutes on one GPU, used in the order in which they tell most: correctness, steps, one rank of 65B, parity.

    python benchmarks/gpu_session.py                            600 s, results into benchmarks/results
    python benchmarks/gpu_session.py --seconds 300 --out DIR    everything in half the time, results into DIR
    python benchmarks/gpu_session.py --device cpu --seconds 60 --out DIR     all of it at a tiny size, on the CPU

What runs when stands in STAGES.  A stage that ends early leaves its time to the next; one that is not done when its
time is over is told to end, and ended 5 s later.  Every benchmark writes its results as they come, what it prints goes
into DIR/NAME.log, and DIR/session.json says after every command when it ran and how it ended: whenever all of this is
cut off, what was found until then is there.  The exit status is 1 if any command failed or found something wrong.

On a machine without a package index: `make gpu-carry` where there is one puts what may be missing into .carry/, with
the commit; take that folder along.  It comes before what the machine has, and `.te/site/` before it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from report import add_place, choose_place, machine, replace_file

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "numpy", "pydantic")
WANTED = {"pytest": "no tests of kernels", "transformers": "nothing to compare with"}
NCCL, TESTS = "benchmarks/gpu_nccl.py", ("-m", "pytest", "-v", "-p", "no:cacheprovider", "--durations=5")
STAGES: tuple[tuple[str, float, dict[str, tuple[str, ...]]], ...] = (
    # name; the share of all time by which it ends; its commands, which run at once. {left}: seconds of the stage
    ("correctness", 1 / 6, {
        "tests": (*TESTS, "tests/gpu", "--deselect", "tests/gpu/test_nccl.py"),
        "nccl_first": (NCCL, "--rows", "4", "--dtypes", "bf16", "--seconds", "{left}"),
    }),
    ("steps", 0.7, {"gpu": ("benchmarks/gpu.py", "--seconds", "{left}")}),
    ("one rank of 65B", 0.87, {"gpu_rank": ("benchmarks/gpu_rank.py", "--seconds", "{left}")}),
    ("parity", 1.0, {"gpu_nccl": (NCCL, "--seconds", "{left}")}),
)  # fmt: skip
GRACE = 5.0  # seconds between being told to end and being ended


class Session:
    """The stages one after the other, and what is known of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.begin = args, time.monotonic()
        self.done: list[dict[str, Any]] = []
        self.running: dict[str, subprocess.Popen[str]] = {}
        paths = [ROOT / ".te" / "site", ROOT]
        kept = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        self.env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), *kept, *carried()])}

    def seconds(self) -> float:
        """Since the session began."""
        return time.monotonic() - self.begin

    def run(self) -> bool:
        """All stages; whether every command did well."""
        for name, share, commands in STAGES:
            self.stage(name, share * self.args.seconds, commands)
        return all(one["status"] == 0 for one in self.done)

    def stage(self, name: str, end: float, commands: dict[str, tuple[str, ...]]) -> None:
        """Run these at once, until second `end` of the session at the latest."""
        start = self.seconds()
        if end - start < 2 * GRACE and self.done:
            self.note(name, {"command": "", "status": "not begun, the time was over"})
            return
        for title, words in commands.items():
            if self.args.device == "cpu" and title == "nccl_first":  # there it is what comes last
                continue
            self.start(title, [word.format(left=int(max(1.0, end - start - GRACE))) for word in words])
        while self.running and self.seconds() < end:
            self.reap(name, start)
            time.sleep(0.1)
        for told in (signal.SIGTERM, signal.SIGKILL):
            for process in self.running.values():
                os.killpg(process.pid, told)
            limit = time.monotonic() + GRACE
            while self.running and time.monotonic() < limit:
                self.reap(name, start)
                time.sleep(0.1)

    def start(self, title: str, words: list[str]) -> None:
        """Begin a command in a group of processes of its own."""
        if words[0].endswith(".py"):
            words = [*words, "--device", self.args.device, "--out", str(self.out(title))]
        if self.args.device == "cpu" and NCCL in words:
            words += ["--rows", "1", "--dtypes", "bf16"]
        print(f"{self.seconds():6.1f} s: python {' '.join(words)}", flush=True)
        with (self.args.out / f"{title}.log").open("w") as log:
            self.running[title] = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env=self.env, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, text=True, start_new_session=True,
            )  # fmt: skip

    def out(self, title: str) -> Path:
        """Where a command puts its results: those of a first look do not replace the whole table."""
        return self.args.out / "first" if title == "nccl_first" else self.args.out

    def reap(self, stage: str, start: float) -> None:
        """Note the commands that have ended."""
        for title, process in [*self.running.items()]:
            if process.poll() is not None:
                del self.running[title]
                lines = (self.args.out / f"{title}.log").read_text(errors="replace").strip().splitlines()
                found = {"command": title, "status": process.returncode, "from": round(start, 1)}
                self.note(stage, found | {"last": lines[-1][:300] if lines else ""})

    def note(self, stage: str, found: dict[str, Any]) -> None:
        """Write down what is known, at once."""
        self.done.append({"stage": stage, **found, "until": round(self.seconds(), 1)})
        content = {**machine(), "command": sys.argv, "seconds": self.args.seconds, "stages": self.done}
        replace_file(self.args.out / "session.json", json.dumps(content, indent=1) + "\n")
        said = f"{stage}: {found['command']} {found['status']}  {found.get('last', '')}"
        print(f"{self.seconds():6.1f} s: {said}", flush=True)

    def close(self) -> None:
        """End whatever still runs."""
        for process in self.running.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def carried() -> list[str]:
    """The folder of packages that was taken along, if there is one."""
    return [str(ROOT / ".carry")] if (ROOT / ".carry").exists() else []


def missing() -> str:
    """What this machine lacks; ends the session where nothing could run."""
    sys.path += carried()
    lacks = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacks:
        sys.exit(
            f"error: {', '.join(lacks)} cannot be imported; run 'make gpu-carry' where there is a package index, "
            "and take .carry/ along"
        )
    lacks = [f"{name} is missing: {loss}" for name, loss in WANTED.items() if importlib.util.find_spec(name) is None]
    return "; ".join(lacks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="all of it ends by then")
    add_place(parser)
    args = parser.parse_args()
    choose_place(args)
    if args.out is None:
        parser.error("--device cpu needs --out")
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    if lacks := missing():
        print(f"note: {lacks}", flush=True)
    session = Session(args)
    try:
        return int(not session.run())
    finally:
        session.close()


if __name__ == "__main__":
    sys.exit(main())
