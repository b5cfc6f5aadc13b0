"""Random kills: does every run go on, and is its result that of a run to which nothing happened?

    python benchmarks/soak.py --kills 200 --seed 1
    python benchmarks/soak.py --kills 6 --layouts "tp 2" --keep      a quick look
    python benchmarks/soak.py --kills 40 --at-once 0.8               most of them while a run sets up

Runs of a tiny model in several layouts are started as a launcher does it: a shell starts a process per rank.  At
random moments something is killed, or stopped (SIGSTOP): a trainer, the process that makes the trainers of a rank, a
supervisor, all processes of a rank, the launcher.  A trainer stays stopped; the others go on after some seconds, for
nothing ends a supervisor that stands still.  When a run ends before its last step, the same command is started again.

At the end of every run its weights, moments and losses are compared, byte by byte, with those of an undisturbed run;
the samples of every step, written down where ranks get them (`drivers/soak_rank.py`), are counted: each exactly once;
and nothing of its session may be left.  What is wrong is described, its folder is kept, and the status is 1.
Results: `benchmarks/results/soak.json` and `soak.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import free_port
from report import header, median, save, table

HERE = Path(__file__).resolve().parent
LAYOUTS: dict[str, tuple[int, int, list[str]]] = {  # ranks, dp, settings
    "dp 2": (2, 2, []),
    "tp 2": (2, 1, ["parallel.tp=2"]),
    "pp 2": (2, 1, ["parallel.pp=2"]),
    "dp 2 x tp 2": (4, 2, ["parallel.tp=2"]),
}
STEPS, BATCH = 150, 4
SETTINGS = [
    "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4", "model.ffn_hidden_size=48",
    "model.vocab_size=61", "batch.seq_length=16", "batch.micro_batch_size=2", f"batch.global_batch_size={BATCH}",
    "data.synthetic=true", "data.timeout_seconds=6", "precision.dtype=fp32", f"train.steps={STEPS}",
    "checkpoint.memory_interval=1", "checkpoint.interval=5", "run.max_replacements=1000", "run.max_failed_starts=0",
    "run.timeout_seconds=6", "run.init_timeout_seconds=30", "run.threads=1",
    "run.device=cpu", "run.peak_tflops=1", "log.plot=false",
    "log.tensorboard=false", "log.interval=1",
]  # fmt: skip
TARGETS = {"trainer": 8, "maker of trainers": 2, "supervisor": 2, "all of a rank": 2, "launcher": 2}  # with weights
WHOLE_GAP, LATER, AT_ONCE = 30, 0.05, 3.0  # steps, and then seconds, to the next kill; seconds, where it comes at once
STOPPED = 0.25  # of the kills are a SIGSTOP
WAYS = ("in place", "again", "with the next", "with the last", "at the end")  # how a kill was got over
GONE, STUCK = 60.0, 150.0  # seconds: for all processes after the launcher's end; without a step
NOTE = f"""
A run has {STEPS} steps, copies in memory after every one, checkpoints after every fifth. *In place*: the same launch
went on. *Again*: the command was started again. *With the next*: the next kill came before this one was got over;
*with the last*: the kill before had ended that start already. *At the end*: the run had no step left to make.
*Bitwise*: kills in runs that ended with the bytes and losses of the undisturbed run. *Samples*: kills in runs that used
each sample exactly once. *Seconds* are from the kill to the end of the next step that was finished (median, worst),
where nothing else was killed meanwhile; a stopped rank is found after `run.timeout_seconds` = 6. Where the command was
started again, a part of them went by until the last process of the start before had left; the rest is the start of
Python, torch and the run. *Steps lost* are finished steps that were made again (median, worst).
"""


@dataclass
class Kill:
    """One kill, and what became of it."""

    layout: str
    run: int
    target: str
    signal: str
    rank: int
    moment: float  # [s], monotonic
    went_on: str = "at the end"  # or: in place, again, with the next, with the last
    seconds: float | None = None
    left: float | None = None  # where the command was started again: seconds until the last process had left
    steps_lost: int | None = None
    bitwise: bool = False
    samples: bool = False

    @property
    def ends(self) -> bool:
        """Whether nobody can take the place of what is killed: the command is started again."""
        return self.signal == "SIGKILL" and self.target in ("supervisor", "all of a rank", "launcher")


@dataclass(frozen=True)
class Process:
    """What /proc says of one."""

    pid: int
    parent: int
    rank: int  # -1: the launcher


def session(leader: int) -> list[Process]:
    """The processes that a launcher has started, and itself; none that is dead already."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent, _, own = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(own) == leader and state not in "ZX":
                words = (entry / "environ").read_bytes().split(b"\0")
                rank = next((int(word[5:]) for word in words if word.startswith(b"RANK=")), -1)
                found.append(Process(int(entry.name), int(parent), rank))
        except (OSError, ValueError):
            continue
    return found


def processes_of(found: Sequence[Process], rank: int) -> dict[str, list[int]]:
    """Who is what of a rank; kinds that are not there now are left out."""
    own = [p for p in found if p.rank == rank]
    pids = {p.pid for p in own}
    supervisors = [p.pid for p in own if p.parent not in pids]
    makers = sorted(p.pid for p in own if p.parent in supervisors)[:1]  # a younger one is its spare
    trainers = [p.pid for p in own if p.parent in makers]
    named = {"trainer": trainers, "maker of trainers": makers, "supervisor": supervisors, "all of a rank": [*pids]}
    return {name: numbers for name, numbers in named.items() if numbers}


def records(file: Path) -> list[tuple[float, int, list[int]]]:
    """(moment, steps finished before it, samples) of what a rank was given."""
    lines = file.read_text().splitlines() if file.exists() else []
    parts = [line.split() for line in lines]
    return [(float(at), int(step), [int(i) for i in ids.split(",")]) for at, step, ids in parts]


class Run:
    """One run, started as often as it takes."""

    def __init__(self, folder: Path, layout: str) -> None:
        self.folder, self.layout, self.starts, self.ends = folder, layout, list[float](), list[float]()
        self.ranks, self.dp, self.more = LAYOUTS[layout]
        folder.mkdir(parents=True)

    def start(self) -> None:
        """The launcher: a shell, in a session of its own."""
        settings = [*SETTINGS, *self.more, f"run.folder={self.folder / 'run'}"]
        command = " ".join([sys.executable, "-m", "megallama.pretrain", *settings])
        own = [f"RANK={r} LOCAL_RANK={r} SOAK_RECORDS={self.records(r)}" for r in range(self.ranks)]
        lines = [f"{words} {command} >>{self.folder}/out.{r} 2>&1 &" for r, words in enumerate(own)]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMI", "OMPI_", "RANK", "LOCAL_"))}
        env |= {"WORLD_SIZE": str(self.ranks), "LOCAL_WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = f"{HERE / 'drivers' / 'soak_site'}:{HERE.parent}"
        self.starts.append(time.monotonic())
        self.launcher = subprocess.Popen(["sh", "-c", "\n".join([*lines, "wait"])], env=env, start_new_session=True)

    def records(self, rank: int) -> Path:
        """What it writes down."""
        return self.folder / f"records.{rank}"

    def progress(self) -> int:
        """Grows with every step that any rank makes."""
        files = [self.records(rank) for rank in range(self.ranks)]
        return sum(file.stat().st_size for file in files if file.exists())

    def finished(self) -> bool:
        """Whether the last start made the last step."""
        try:
            end = json.loads((self.folder / "run" / "exit.json").read_text())
        except (OSError, ValueError):
            return False
        return bool(end["status"] == 0 and end["step"] == STEPS)

    def alive(self) -> list[Process]:
        """Of the last start."""
        self.launcher.poll()
        return session(self.launcher.pid)

    def end(self) -> None:
        """Kill whatever is there."""
        for process in self.alive():
            try:
                os.kill(process.pid, signal.SIGKILL)
            except OSError:
                continue
        self.launcher.wait()

    def describe(self) -> str:
        """Who is there and where it stands, for what is stuck."""
        lines = []
        for process in self.alive():
            proc, said = Path(f"/proc/{process.pid}"), []
            for name in ("wchan", "status"):
                try:
                    said.append((proc / name).read_text())
                except OSError:
                    said.append("?")
            state = next((line for line in said[1].splitlines() if line.startswith("State")), "")
            lines.append(f"  {process} {state} in {said[0]}")
        tails = [f"  rank {r}: {'; '.join(self.said(r).splitlines()[-3:])}" for r in range(self.ranks)]
        return "\n".join([*lines, *tails])

    def said(self, rank: int) -> str:
        """All that a rank has printed."""
        file = self.folder / f"out.{rank}"
        return file.read_text(errors="replace") if file.exists() else ""

    def state(self) -> tuple[dict[str, bytes], list[tuple[int, float]]]:
        """Bytes of the last checkpoint's tensors; loss of every step."""
        last = self.folder / "run" / "checkpoints" / f"step-{STEPS:08d}"
        found = {f"{file.parent.name}/{file.name}": file.read_bytes() for file in last.glob("*/*.safetensors")}
        lines = [json.loads(x) for x in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()]
        return found, [(x["step"], x["loss"]) for x in lines if x["kind"] == "train"]

    def wrong_samples(self) -> list[str]:
        """Steps whose samples, all ranks together, are not those of the step, each once per replica's rank."""
        own = [{step: ids for _, step, ids in records(self.records(rank))} for rank in range(self.ranks)]
        wrong = []
        for step in range(STEPS):
            used = Counter(number for given in own for number in given.get(step, []))
            want = dict.fromkeys(range(step * BATCH, (step + 1) * BATCH), self.ranks // self.dp)
            if used != want:
                wrong.append(f"step {step + 1} used {sorted(used.elements())}")
        return wrong


class Killer:
    """Chooses moments and targets."""

    def __init__(self, draw: random.Random, stops: bool, at_once: float) -> None:
        self.draw, self.stops, self.at_once = draw, stops, at_once
        self.asleep: list[tuple[float, int]] = []  # when it goes on; who

    def next(self, progress: int) -> tuple[int, float]:
        """Bytes of records, and a moment, behind which the next kill comes."""
        if self.draw.random() < self.at_once:
            return 0, time.monotonic() + self.draw.uniform(0, AT_ONCE)
        return progress + 40 * self.draw.randrange(WHOLE_GAP), time.monotonic() + self.draw.uniform(0, LATER)

    def strike(self, run: Run, number: int) -> Kill | None:
        """None where the target is not there."""
        target = self.draw.choices([*TARGETS], [*TARGETS.values()])[0]
        rank, kind = self.draw.randrange(run.ranks), signal.SIGKILL
        found, least = session(run.launcher.pid), 0.0
        if target == "launcher":
            victims, rank = [p.pid for p in found if p.pid == run.launcher.pid], 0
        else:
            victims = processes_of(found, rank).get(target, [])
            if self.stops and self.draw.random() < STOPPED:
                kind, least = signal.SIGSTOP, self.draw.uniform(1, 8)
        if not victims:
            return None
        kill = Kill(run.layout, number, target, kind.name, rank, time.monotonic())
        for pid in victims:
            try:
                os.kill(pid, kind)
            except OSError:
                continue
            if least and target != "trainer":
                self.asleep.append((kill.moment + least, pid))
        return kill

    def wake(self) -> None:
        """Those whose time has come."""
        now, due = time.monotonic(), self.asleep
        self.asleep = [(at, pid) for at, pid in due if at > now]
        for at, pid in due:
            if at <= now:
                try:
                    os.kill(pid, signal.SIGCONT)
                except OSError:
                    continue


def follow(run: Run, number: int, killer: Killer | None, most: int) -> tuple[list[Kill], str]:
    """Start the run until it has made its last step; the kills, at most so many, and what went wrong."""
    kills: list[Kill] = []
    failed = 0
    while failed < 5:
        before, ended, last, killed = run.progress(), 0.0, time.monotonic(), len(kills)
        size, next_kill = before, killer.next(before) if killer else (0, 0.0)
        run.start()
        while alive := run.alive():
            now, grown = time.monotonic(), run.progress()
            if grown > size:
                size, last = grown, now
            if killer:
                killer.wake()
                if len(kills) < most and grown >= next_kill[0] and now >= next_kill[1]:
                    kills += [kill] if (kill := killer.strike(run, number)) else []
                    next_kill = killer.next(grown)
            ended = ended or (now if all(p.pid != run.launcher.pid for p in alive) else 0.0)
            if (ended and now - ended > GONE) or now - last > STUCK:
                what = "processes are left behind" if ended else f"no step for {STUCK:g} s"
                text = f"{what}:\n{run.describe()}"
                run.end()
                return kills, text
            time.sleep(0.01 if killer and len(kills) < most else 0.1)
        run.launcher.wait()
        run.ends.append(time.monotonic())
        if run.finished():
            return kills, ""
        failed = 0 if size > before or len(kills) > killed else failed + 1
    return kills, f"{failed} starts in a row without a step; rank 0 said: {run.said(0)[-1500:]}"


def judge(run: Run, kills: Sequence[Kill]) -> None:
    """How each kill was got over: by the first break in what its rank was given, before the next kill."""
    moments = sorted(kill.moment for kill in kills)
    for kill in kills:
        own = records(run.records(kill.rank))
        nearest = next((at for at in moments if at > kill.moment), float("inf"))
        done = max((i for i, (at, _, _) in enumerate(own) if at <= kill.moment), default=-1)
        steps, later = (own[done][1] if done >= 0 else 0), own[done + 1 :]
        if not later:
            continue
        last, broken = kill.moment, -1 if done >= 0 else 0  # where what it was given is no longer the next step
        for index, (at, step, _) in enumerate(later):
            if broken < 0 and at < nearest and (step != steps + 1 or any(last < x < at for x in run.starts)):
                broken = index
            if broken < 0:
                steps, last = step, at
        first = later[max(broken, 0)]
        if broken < 0 and (kill.signal == "SIGKILL" or kill.target == "trainer"):
            kill.went_on = "with the next"
            continue
        kill.went_on = "again" if any(kill.moment < start < first[0] for start in run.starts) else "in place"
        began = max((start for start in run.starts if start < kill.moment), default=0.0)
        if kill.went_on == "again" and any(began < k.moment < kill.moment and k.ends for k in kills):
            kill.went_on = "with the last"
            continue
        kill.steps_lost = 0 if broken < 0 else max(0, steps - first[1])
        rest = later if broken < 0 else later[broken + 1 :]
        if rest and rest[0][0] < nearest:
            kill.seconds = rest[0][0] - kill.moment
            kill.left = next((x - kill.moment for x in run.ends if kill.moment < x < rest[0][0]), None)


def rows(kills: Sequence[Kill]) -> list[dict[str, str]]:
    """The table, by target and signal."""
    found = []
    for target in [*TARGETS, "all"]:
        for kind in ("SIGKILL", "SIGSTOP") if target != "all" else ("",):
            own = [k for k in kills if target == "all" or (k.target, k.signal) == (target, kind)]
            if not own:
                continue
            ways = Counter(k.went_on for k in own)
            seconds = [k.seconds for k in own if k.seconds is not None]
            left = [k.left for k in own if k.left is not None]
            lost = [k.steps_lost for k in own if k.steps_lost is not None]
            found.append({
                "target": target, "signal": kind, "kills": str(len(own)),
                **{way: str(ways[way]) for way in WAYS},
                "bitwise": str(sum(k.bitwise for k in own)), "samples": str(sum(k.samples for k in own)),
                "seconds": f"{median(seconds):.1f}, {max(seconds):.1f}" if seconds else "",
                "of them until all had left": f"{median(left):.1f}, {max(left):.1f}" if left else "",
                "steps lost": f"{median(lost)}, {max(lost)}" if lost else "",
            })  # fmt: skip
    return found


def soak(layout: str, number: int, killer: Killer, folder: Path, keep: bool) -> tuple[list[Kill], list[str]]:
    """`number` kills in runs of one layout; what went wrong."""
    plain = Run(folder / "plain", layout)
    _, problem = follow(plain, 0, None, 0)
    if problem:
        return [], [f"{layout}, undisturbed: {problem}; see {plain.folder}"]
    want, kills, wrong, count = plain.state(), list[Kill](), [f"undisturbed: {x}" for x in plain.wrong_samples()], 0
    while len(kills) < number:
        count += 1
        run = Run(folder / str(count), layout)
        own, problem = follow(run, count, killer, number - len(kills))
        judge(run, own)
        problems = [problem] if problem else []
        if not problem:
            same, samples = run.state() == want, run.wrong_samples()
            for kill in own:
                kill.bitwise, kill.samples = same, not samples
            problems += [] if same else ["the result is another than the undisturbed run's"]
            problems += samples[:3]
        kills += own
        what = ", ".join(f"{k.target} {k.signal} {k.rank} ({k.went_on})" for k in own)
        print(f"{layout}, run {count}: {len(run.starts)} starts; {what}; {problems or 'good'}", flush=True)
        if problems:
            wrong += [f"{layout}, run {count}: {text}; see {run.folder}" for text in problems]
        elif not keep:
            shutil.rmtree(run.folder)
    return kills, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="of: " + ", ".join(LAYOUTS))
    parser.add_argument("--at-once", type=float, default=0.25, help="share of kills within 3 s of the last or a start")
    parser.add_argument("--no-stops", action="store_true", help="SIGKILL alone")
    parser.add_argument("--keep", action="store_true", help="keep the folders of good runs too")
    args = parser.parse_args()
    names = args.layouts.split(",")
    if unknown := [name for name in names if name not in LAYOUTS]:
        raise SystemExit(f"error: --layouts {unknown[0]} is unknown; write some of {','.join(LAYOUTS)}")
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    killer = Killer(random.Random(args.seed), not args.no_stops, args.at_once)
    kills: list[Kill] = []
    wrong: list[str] = []
    began = time.monotonic()
    for index, name in enumerate(names):
        share = args.kills * (index + 1) // len(names) - args.kills * index // len(names)
        own, problems = soak(name, share, killer, folder / name.replace(" ", ""), args.keep)
        kills, wrong = kills + own, wrong + problems
    minutes = f"\n{len(kills)} kills in {(time.monotonic() - began) / 60:.0f} minutes; seed {args.seed}.\n"
    told = "\nWhat went wrong:\n\n" + "\n".join(f"- {text}" for text in wrong) + "\n" if wrong else ""
    data: list[Any] = kills
    save("soak", data, header("Random kills", args) + table(rows(kills)) + minutes + told + NOTE)
    if not wrong and not args.keep:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
