"""The first run, from text to text: `make quickstart`, or `python tools/quickstart.py [--text PATH]`.

It builds a corpus and a tokenizer, trains a small LLaMA on 4 ranks in tensor, sequence, pipeline and
data parallelism, stops the run half-way by a signal and resumes it, evaluates on held-out documents,
lets the model write, and asks it which of four texts goes on as its document does.  The ranks are
started as torchrun would start them, but by this program itself, so that every rank's exit status can
be seen and Ctrl-C leaves nothing behind.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn  # noqa: E402

from megallama.commands.exit import exit_status  # noqa: E402
from megallama.config.errors import MegallamaError, counted  # noqa: E402
from megallama.config.load import load  # noqa: E402
from megallama.data.indexed import IndexedDataset  # noqa: E402
from megallama.data.tokenizer import load_tokenizer  # noqa: E402
from megallama.text.preprocess import preprocess  # noqa: E402
from megallama.text.progress import ByteProgress  # noqa: E402
from megallama.text.train_tokenizer import build_corpus, train_tokenizer  # noqa: E402
from megallama.train.log import human_bytes, human_count  # noqa: E402
from megallama.train.metrics import plot_loss, read_metrics  # noqa: E402

CONFIG = "examples/quickstart.toml"
STEPS, BATCH_TOKENS, MAX_VOCABULARY = 200, 32 * 256, 4096
CORPUS_BYTES, TEXT_BYTES = 8_000_000, 16_000_000  # of the embedded corpus, of the reader's own
HELD_OUT = (0.02, 0.1, 0.3)  # share of documents: the first that holds out a batch of tokens
ITEMS, CONTEXT = 100, 96  # at most so many; tokens of one, a third of them in each continuation
MAX_EPOCHS = 10  # a small text is not repeated more often
FINISHED, SAVED = 0, 75  # exit statuses of pretrain
PROMPT = "def read_file(path"
MARKER = ".quickstart"  # in a folder that this program may empty
PR_SET_PDEATHSIG = 1


class StepFailed(Exception):
    """A step of the quickstart that failed: what, and what to do."""


@dataclass(frozen=True)
class Machine:
    """Where the ranks run: on CPU cores, or one on each of some GPUs."""

    ranks: int
    tp: int
    pp: int
    gpus: int
    dtype: str

    def describe(self) -> str:
        dp = self.ranks // (self.tp * self.pp)
        layout = f"tp={self.tp} with sequence parallelism, pp={self.pp}, dp={dp}, {self.dtype}"
        if self.gpus:
            unused = f" of {self.gpus}" if self.ranks < self.gpus else ""
            return f"{counted(f'{self.ranks}{unused}', 'GPU')} found: one rank on each: {layout}"
        return f"no GPU found: {self.ranks} ranks on {counted(len(os.sched_getaffinity(0)), 'CPU core')}: {layout}"


def layout(gpus: int) -> tuple[int, int, int]:
    """Ranks, tp and pp: 4 ranks without a GPU, else one on each GPU, up to the largest power of two not above 8."""
    ranks = min(8, 1 << (gpus.bit_length() - 1)) if gpus else 4
    return ranks, min(2, ranks), 2 if ranks >= 4 else 1


def find_machine() -> Machine:
    """Look for GPUs (importing torch only where there may be one) and for bf16 instructions."""
    gpus = 0
    if any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/dxg")):
        import torch

        gpus = torch.cuda.device_count()
    described = Path("/proc/cpuinfo")
    words = set(described.read_text().split()) if described.exists() else set()
    fast = gpus or words & {"amx_bf16", "avx512_bf16", "bf16"}
    return Machine(*layout(gpus), gpus, "bf16" if fast else "fp32")


def vocabulary_for(text_bytes: int) -> int:
    """4096 token ids from 1 MB of text on; fewer for less, so that each is seen often enough."""
    return max(512, min(MAX_VOCABULARY, text_bytes // 250 // 64 * 64))


def unigram_loss(train: np.ndarray, valid: np.ndarray, vocab_size: int) -> float:
    """Loss [nats per token] on `valid` of a model that knows only how often each token occurs in `train`, plus one."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[valid].mean())


def claim(folder: Path) -> TextIO:
    """Empty the quickstart's own folder and hold it for this process.

    Raises: StepFailed for a folder with something else in it, or one that another quickstart is using.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise StepFailed(f"{folder} holds something that is not a quickstart's; move it away, or use --folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / MARKER).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise StepFailed(f"another quickstart is using {folder}; wait for it, or use --folder") from None
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARKER:
            entry.unlink()
    return lock


class Ranks(AbstractContextManager["Ranks"]):
    """The processes of one start: `command` once per rank in torchrun's environment, output to logs/start-N-rank-R.log.

    Leaving the `with` block ends whatever still runs; so does the death of this process.
    """

    def __init__(self, command: Sequence[str], count: int, logs: Path, start: int) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"start-{start}-rank-{rank}.log" for rank in range(count)]
        self.failed: int | None = None  # the first rank seen with a status that is neither FINISHED nor SAVED
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = f"WORLD_SIZE={count} LOCAL_WORLD_SIZE={count} MASTER_ADDR=127.0.0.1 MASTER_PORT={port}".split()
        self.processes: list[subprocess.Popen[bytes]] = []
        die_with_parent = partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, int(signal.SIGKILL))
        for rank, log in enumerate(self.logs):
            environment = ["env", f"RANK={rank}", f"LOCAL_RANK={rank}", *shared]
            with log.open("wb") as out:
                process = subprocess.Popen(
                    [*environment, *command], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
                    start_new_session=True, preexec_fn=die_with_parent,
                )  # fmt: skip
            self.processes.append(process)

    def statuses(self) -> list[int | None]:
        """Every rank's exit status; None while it runs."""
        found = [process.poll() for process in self.processes]
        if self.failed is None:
            self.failed = next((r for r, status in enumerate(found) if status not in (None, FINISHED, SAVED)), None)
        return found

    def running(self) -> bool:
        """Whether any rank still runs. Raises: StepFailed if one has failed; the others get 15 s to notice."""
        alive = None in self.statuses()
        if self.failed is not None:
            self.wait(15)
            raise StepFailed(self.report())
        return alive

    def wait(self, seconds: float) -> list[int | None]:
        """The statuses once all ranks have left, or after `seconds`."""
        end = time.monotonic() + seconds
        while None in self.statuses() and time.monotonic() < end:
            time.sleep(0.1)
        return self.statuses()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every rank."""
        for process in self.processes:
            process.send_signal(number)

    def report(self) -> str:
        """What is known about a failure: the first failed rank, all statuses, the end of that rank's log."""
        rank = self.failed or 0
        words = ", ".join("runs" if s is None else str(s) for s in self.statuses())
        lines = self.logs[rank].read_text(errors="replace").splitlines()[-15:]
        tail = "\n".join(f"    {line}" for line in lines) or "    (it wrote nothing)"
        return f"rank {rank} left first; exit statuses: {words}; the end of {shown(self.logs[rank])}:\n{tail}"

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def spoken_time(seconds: float) -> str:
    """40 s, 3 min 20 s."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def shown(path: Path) -> str:
    """A path as the reader would type it from the repository."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


class Quickstart:
    """The steps in order; each leaves what the next ones need in `self`."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.folder, self.text, self.console = options.folder.absolute(), options.text, console
        self.wanted_steps, self.max_bytes = options.steps, options.bytes
        self.data = self.folder / "data"
        self.tokenizer = self.data / "tokenizer.model"
        self.metrics = self.folder / "metrics.jsonl"
        self.machine = find_machine()
        self.vocabulary, self.steps, self.baseline, self.baseline_bits = MAX_VOCABULARY, STEPS, 0.0, 0.0
        self.facts: dict[str, dict[str, Any]] = {}
        self.began = time.monotonic()
        self.stage = self.told = 0  # steps begun, evaluations shown

    def run(self) -> None:
        """All of it."""
        self.say(f"[bold]megallama quickstart[/]: about 5 minutes on 2 cores; everything goes to {shown(self.folder)}/")
        self.say(self.machine.describe())
        if self.text and not self.text.exists():
            raise StepFailed(f"{self.text} does not exist; TEXT takes a text file, a .jsonl file or a folder of them")
        if self.text and self.text.resolve().is_relative_to(self.folder.resolve()):
            raise StepFailed(f"{self.text} lies in {self.folder}, which is emptied first; move it, or use --folder")
        first = (self.build_corpus, self.train_tokenizer, self.tokenize, self.train)
        with claim(self.folder):
            for step in (*first, self.generate, self.evaluate, self.summary):
                step()

    def say(self, text: str = "") -> None:
        """Print a line (rich markup)."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def begin(self, title: str, seconds: int) -> None:
        """Announce a step."""
        self.stage += 1
        at = spoken_time(time.monotonic() - self.began)
        self.say(f"\n[bold]\\[{self.stage}/7] {escape(title)}[/]  [dim]({at} so far; about {spoken_time(seconds)})[/]")

    def build_corpus(self) -> None:
        """Step 1: the documents."""
        self.begin(f"Text from {self.text}" if self.text else "Text from Python's own library and documentation", 3)
        limit = self.max_bytes or (TEXT_BYTES if self.text else CORPUS_BYTES)
        corpus = build_corpus(self.data / "corpus.jsonl", limit, self.text)
        self.vocabulary = vocabulary_for(corpus.text_bytes)
        documents = counted(corpus.documents, "document", ",")
        self.say(f"  {documents}, {human_bytes(corpus.text_bytes)}: {shown(corpus.path)}")
        for line in corpus.skipped:
            self.say(f"  {escape(line)}")
        if self.text and corpus.text_bytes > 0.95 * limit:
            self.say(f"  no more than {human_bytes(limit)} are used here; README.md tells how to train on all of it")

    def train_tokenizer(self) -> None:
        """Step 2: the vocabulary."""
        self.begin(f"A tokenizer of {self.vocabulary} pieces, in LLaMA's SentencePiece form", 15)
        with self.console.status("  counting pairs"):
            cores = len(os.sched_getaffinity(0))
            train_tokenizer([self.data / "corpus.jsonl"], self.tokenizer, self.vocabulary, threads=cores)
        self.say(f"  {shown(self.tokenizer)}")

    def tokenize(self) -> None:
        """Step 3: .bin/.idx with a few documents held out, and the unigram baseline."""
        self.begin("Tokens", 10)
        for share in HELD_OUT:
            with ByteProgress("  tokenizing") as bar:
                outputs = preprocess([self.data / "corpus.jsonl"], self.data / "tokens", self.tokenizer,
                                     split_valid=share, progress=bar.update).outputs  # fmt: skip
            if outputs[1].num_tokens >= BATCH_TOKENS:
                break
        tokens = {}
        for name, use in (("train", "training"), ("valid", "validation (held out)")):
            prefix = self.data / f"tokens_{name}"
            facts = self.facts[name] = json.loads(prefix.with_suffix(".json").read_text())
            dataset = IndexedDataset(prefix)
            tokens[name] = dataset.read(0, dataset.num_tokens)
            per_token = facts["bytes"] / facts["tokens"]
            size = f"{human_count(facts['tokens'])} tokens, {counted(facts['documents'], 'document')}"
            self.say(f"  {use}: {size}, {per_token:.2f} bytes/token: {shown(prefix)}.bin, .idx")
        self.baseline = unigram_loss(tokens["train"], tokens["valid"], self.vocabulary)
        held_out = self.facts["valid"]
        self.baseline_bits = self.baseline * held_out["tokens"] / held_out["bytes"] / math.log(2)
        self.say(f"  unigram baseline: {self.baseline:.3f} nats/token = {self.baseline_bits:.3f} bits/byte")
        available = self.facts["train"]["tokens"] * MAX_EPOCHS // BATCH_TOKENS
        self.steps = self.wanted_steps or max(20, min(STEPS, available))

    def overrides(self) -> list[str]:
        """What this machine, text and folder change in the configuration file."""
        values: dict[str, Any] = {
            "run.folder": shown(self.folder),
            "data.train": shown(self.data / "tokens_train"),
            "data.valid": shown(self.data / "tokens_valid"),
            "data.tokenizer": shown(self.tokenizer),
            "model.vocab_size": self.vocabulary,
            "parallel.tp": self.machine.tp,
            "parallel.pp": self.machine.pp,
            "precision.dtype": self.machine.dtype,
            "lr_schedule.warmup_steps": min(20, self.steps // 5),
            "train.steps": self.steps,
            "eval.interval": max(1, self.steps // 4),
            "eval.batches": min(16, -(-self.facts["valid"]["tokens"] // BATCH_TOKENS)),  # all of it, once
        }
        config = load(ROOT / CONFIG, ranks=4)
        usual = {key: attrgetter(key)(config) for key in values}
        usual |= {"data.train": config.data.train[0].path, "data.valid": config.data.valid[0].path}
        return [f"{key}={value}" for key, value in values.items() if usual[key] != value]

    def train(self) -> None:
        """Step 4: train, stop half-way, resume, evaluate."""
        title = f"Training, {counted(self.steps, 'step')} of {BATCH_TOKENS:,} tokens, with a stop half-way"
        self.begin(title, 30 + self.steps)
        count, overrides = self.machine.ranks, self.overrides()
        by_hand = ["torchrun", "--nproc-per-node", str(count), "-m", "megallama.pretrain", CONFIG, *overrides]
        self.say(f"  by hand:  {escape(shlex.join(by_hand))}")
        self.say(f"  logs:     {shown(self.folder)}/logs/, TensorBoard in {shown(self.folder)}/tensorboard/")
        command = [sys.executable, "-u", "-m", "megallama.pretrain", CONFIG, *overrides]
        with Ranks(command, count, self.folder / "logs", 1) as ranks:
            step = self.follow(ranks, self.steps // 2)
            self.say(f"  step {step}: SIGTERM to all {counted(count, 'rank')}, as Slurm does before it takes nodes")
            ranks.signal(signal.SIGTERM)
            statuses = ranks.wait(120)
            self.tell_evaluations()
            if set(statuses) != {SAVED}:
                raise StepFailed(f"after SIGTERM every rank should save and leave with {SAVED}; {ranks.report()}")
        saved = max((self.folder / "checkpoints").glob("step-" + "[0-9]" * 8), default=None)
        self.say(f"  all ranks saved {shown(saved) if saved else 'nothing'} and left with status {SAVED}")
        self.say("  the same command again, which resumes from there:")
        with Ranks(command, count, self.folder / "logs", 2) as ranks:
            self.follow(ranks, None)
            if set(ranks.statuses()) != {FINISHED}:
                raise StepFailed(f"training should have finished with status {FINISHED}; {ranks.report()}")

    def follow(self, ranks: Ranks, until: int | None) -> int:
        """Show the progress of the run until it has made `until` steps or its ranks have left; the step it is at."""
        state = TextColumn("{task.fields[state]}")
        columns = [TextColumn("  {task.description}"), BarColumn(), TimeElapsedColumn(), state]
        step = 0
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True) as bar:
            task = bar.add_task("starting", total=self.steps, state="the ranks load torch and meet")
            spoken, old = time.monotonic(), self.records("train")[-1:]
            while ranks.running():
                self.tell_evaluations()
                newest = self.records("train")[-1:]
                if newest and newest != old:
                    old, step = newest, newest[0]["step"]
                    spoken = self.show(bar, task, newest[0], spoken)
                if until is not None and step >= until:
                    break
                time.sleep(0.3)
        self.tell_evaluations()
        return step

    def tell_evaluations(self) -> None:
        """Print the evaluations that have not been printed yet."""
        for record in self.records("valid")[self.told :]:
            self.told += 1
            bits = f", {record['bits_per_byte']:.3f} bits/byte" if record.get("bits_per_byte") else ""
            self.say(f"  step {record['step']}: validation loss {record['loss']:.3f}{bits}")

    def show(self, bar: Progress, task: TaskID, record: dict[str, Any], spoken: float) -> float:
        """One record on the bar, or every 10 s as a line where there is no terminal; when the last line was."""
        rate, left = human_count(record["tokens_per_second"]), spoken_time(record["eta_seconds"])
        state = f"loss {record['loss']:.3f}  {rate} tokens/s  {left} left"
        title = f"step {record['step']}/{self.steps}"
        bar.update(task, description=title, completed=record["step"], state=state)
        if self.console.is_terminal or time.monotonic() - spoken < 10:
            return spoken
        self.say(f"  {title}  {state}")
        return time.monotonic()

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The run's metrics so far, of one kind ("train" or "valid")."""
        if not self.metrics.exists():
            return []
        return [r for r in read_metrics(self.metrics) if r.get("kind") == kind and r.get("loss") is not None]

    def prompt(self) -> str:
        """The beginning of a function, or of the first held-out document of the reader's own text."""
        if not self.text:
            return PROMPT
        opening = [int(i) for i in IndexedDataset(self.data / "tokens_valid").read(0, 16)]
        return load_tokenizer(self.tokenizer).decode(opening).split("\n")[0].strip()

    def generate(self) -> None:
        """Step 5: the model writes."""
        self.begin("Text from the trained model", 10)
        self.ask("generate", "--prompt", self.prompt(), "--max-tokens", "120")

    def ask(self, name: str, *options: str) -> None:
        """What a command says of the trained model."""
        command = [sys.executable, "-m", "megallama", name, str(self.folder), *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise StepFailed(f"{shlex.join(command)} left with status {done.returncode}:\n{done.stderr.strip()}")
        for line in done.stdout.rstrip().splitlines():
            self.say(f"  [cyan]│[/] {escape(line)}")

    def evaluate(self) -> None:
        """Step 6: items of held-out text; the wrong continuations are those of other places."""
        self.begin("Which of four continuations is the true one?", 10)
        data, tokenizer, parts = IndexedDataset(self.data / "tokens_valid"), load_tokenizer(self.tokenizer), []
        for start in range(0, data.num_tokens - CONTEXT, max(CONTEXT, data.num_tokens // ITEMS)):
            ids = [int(i) for i in data.read(start, CONTEXT)]
            context = tokenizer.decode(ids[: CONTEXT * 2 // 3])
            parts.append((context, tokenizer.decode(ids)[len(context) :]))
        file, count = self.data / "continuations.jsonl", len(parts)
        with file.open("w", encoding="utf-8") as out:
            for i, (context, _) in enumerate(parts):
                choices = [parts[(i + 17 * (place - i % 4)) % count][1] for place in range(4)]
                out.write(json.dumps({"context": context, "choices": choices, "gold": i % 4}) + "\n")
        self.say(f"  {counted(count, 'item')}; a guess is right in 1 of 4: {shown(file)}")
        self.ask("evaluate", "--items", str(file), "--output", str(self.folder / "evaluation.json"))

    def summary(self) -> None:
        """Step 7: the numbers, where everything is, and what to type next."""
        self.begin("Summary", 1)
        train, valid = self.records("train"), self.records("valid")
        if not train or not valid:
            raise StepFailed(f"{shown(self.metrics)} holds no training or no validation record")
        loss, bits = valid[-1]["loss"], valid[-1]["loss"] * self.facts["valid"]["tokens"] / self.facts["valid"]["bytes"]
        png, reason = plot_loss(self.metrics, self.folder / "loss.png", title="quickstart", baseline=self.baseline)
        speeds = sorted(r["tokens_per_second"] for r in train)
        checkpoint = max((self.folder / "checkpoints").glob("step-" + "[0-9]" * 8))
        python, count = shown(Path(sys.executable)), self.machine.ranks
        rows = (
            ("validation loss", f"{loss:.3f} nats/token = {bits / math.log(2):.3f} bits/byte"),
            ("unigram baseline", f"{self.baseline:.3f} nats/token = {self.baseline_bits:.3f} bits/byte"),
            ("speed", f"{human_count(speeds[len(speeds) // 2])} tokens/s on {counted(count, 'rank')} (median)"),
            ("loss curve", shown(png) if png else f"not drawn: {reason}"),
            ("metrics", shown(self.metrics)),
            ("TensorBoard", f"{shown(self.folder / 'tensorboard')}/"),
            ("checkpoint", f"{shown(checkpoint)}/ (its model/ opens with transformers' from_pretrained)"),
        )
        for name, value in rows:
            self.say(f"  {name:<17} {escape(value)}")
        again = shlex.join([python, "tools/generate.py", shown(self.folder), "--prompt", self.prompt()])
        self.say(f"\n[bold]Next[/]\n  {escape(again)}")
        self.say(f"  {python} -m tensorboard.main --logdir {shown(self.folder / 'tensorboard')}")
        self.say('  make quickstart TEXT=path/to/your/text\n  README.md, "Your own run"')
        self.say(f"Done in {spoken_time(time.monotonic() - self.began)}.")
        if loss >= self.baseline and self.steps >= STEPS:
            raise StepFailed("the model did not learn more than the frequencies of the tokens; that should not happen")


class Output(Console):
    """A console that leaves it to `exit_status` when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 where a step failed; 2 for a wrong argument; 130 after Ctrl-C."""
    return exit_status(lambda: run(arguments))


def run(arguments: Sequence[str] | None) -> int:
    """All steps; 0 or 1."""
    parser = argparse.ArgumentParser(prog="quickstart.py", description=__doc__.split("\n")[0])
    text = "file or folder of text to train on, instead of Python's own"
    parser.add_argument("--text", type=lambda name: Path(name).expanduser().absolute(), help=text)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "quickstart", help="what is emptied and filled")
    parser.add_argument("--steps", type=int, help=f"training steps ({STEPS}, fewer for little text)")
    parser.add_argument("--bytes", type=int, help="most text to use [bytes]")
    options = parser.parse_args(arguments)
    quickstart = Quickstart(options, Output(width=None if sys.stdout.isatty() else 160))
    try:
        quickstart.run()
    except (MegallamaError, StepFailed, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        where = f"Step {quickstart.stage}" if quickstart.stage else "The start"
        quickstart.say(f"\n[bold red]{where} failed:[/] {escape(str(error))}")
        quickstart.say(f"What was written so far is in {shown(quickstart.folder)}/; `make quickstart` starts over.")
        return 1
    except KeyboardInterrupt:
        quickstart.say("\nStopped; nothing is left running. `make quickstart` starts over.")
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
