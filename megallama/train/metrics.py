"""The numbers of a step, and where they go: a console line, ``metrics.jsonl``, TensorBoard, wandb.

Metrics are for looking at: no failure of a sink (a full disk, a missing package, no network) ever
touches the training.  It costs one warning and the numbers that could not be written.
"""

from __future__ import annotations

import errno
import importlib
import io
import json
import math
import os
import resource
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import torch

from megallama.config.schema import LogConfig
from megallama.config.words import counted
from megallama.train.log import Logger, human_bytes, human_count, human_duration

_TAGS = {  # TensorBoard and wandb names of the scalars of a step
    "train": ("loss", "lr", "grad_norm", "loss_scale", "consumed_tokens", "skipped_steps"),
    "speed": (
        "tokens_per_second",
        "tokens_per_second_per_rank",
        "mfu_causal",
        "mfu_full",
        "step_seconds",
        "data_wait_seconds",
        "peak_memory_bytes",
    ),
}


@dataclass(frozen=True)
class StepMetrics:
    """A training step (or the `log.interval` steps that end with it), as all ranks see it."""

    step: int  # updates made, this one included
    loss: float  # mean over the global batch's counted tokens
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # of all ranks in step_seconds
    step_seconds: float  # since the previous line
    tokens_per_second: float
    tokens_per_second_per_rank: float
    mfu_causal: float | None  # counting the attention that a causal mask leaves; None: the device's peak is not known
    mfu_full: float | None  # counting the whole square, as most published figures do
    peak_memory_bytes: int  # of this rank so far
    consumed_tokens: int
    consumed_samples: int
    eta_seconds: float
    skipped: bool = False  # this step was not finite and changed nothing
    skipped_steps: int = 0  # so far
    loss_scale: float = 1.0
    data_wait_seconds: float = 0.0  # waited for data so far
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # name -> samples, tokens, epochs so far

    def line(self, steps: int) -> str:
        """The console line, of a run of `steps` steps: with the time before it, at most 120 columns."""
        loss, norm = f"loss {self.loss:.4f}", f"grad norm {self.grad_norm:.3f}"
        parts = [loss, f"lr {self.lr:.2e}", norm, f"{human_count(self.tokens_per_second)} tok/s"]
        if self.mfu_causal is not None:
            parts.append(f"MFU {100 * self.mfu_causal:.1f}%")
        if self.skipped:
            parts = [f"SKIPPED, not finite ({self.skipped_steps} so far)", loss, norm]
        return " | ".join([f"step {self.step}/{steps}", *parts, f"left {human_duration(self.eta_seconds)}"])

    def scalars(self) -> dict[str, float]:
        """Flat names and values, for TensorBoard and wandb."""
        tags = {f"{group}/{name}": getattr(self, name) for group, names in _TAGS.items() for name in names}
        values = {tag: float(value) for tag, value in tags.items() if value is not None}
        values |= {f"seconds/{name}": seconds for name, seconds in self.phase_seconds.items()}
        return values | {f"{x}/{name}": used[x] for name, used in self.sources.items() for x in ("tokens", "epochs")}


@dataclass(frozen=True)
class ValidMetrics:
    """An evaluation after `step` updates."""

    step: int
    loss: float  # mean over the counted tokens [nats per token]
    tokens: int
    seconds: float
    consumed_tokens: int
    name: str = "valid"
    bits_per_byte: float | None = None
    kind: Literal["valid", "test"] = "valid"

    @property
    def tag(self) -> str:
        """Its group in TensorBoard and wandb."""
        return self.kind if self.name == self.kind else f"{self.kind}/{self.name}"

    def line(self, steps: int) -> str:
        """The console line."""
        bits = "" if self.bits_per_byte is None else f" | {self.bits_per_byte:.4f} bits/byte"
        perplexity = f"{math.exp(self.loss):.2f}" if self.loss < 20 else "large"
        amount = f"{counted(human_count(self.tokens), 'token')} in {human_duration(self.seconds)}"
        name = self.tag.replace("/", " ") if self.kind == "test" else self.name
        return f"step {self.step}/{steps} | {name} loss {self.loss:.4f}{bits} | perplexity {perplexity} | {amount}"

    def scalars(self) -> dict[str, float]:
        """Flat names and values, for TensorBoard and wandb."""
        values = {f"{self.tag}/loss": self.loss}
        return values if self.bits_per_byte is None else values | {f"{self.tag}/bits_per_byte": self.bits_per_byte}


def bits_per_byte(loss: float, tokens: float, text_bytes: float) -> float:
    """Loss [nats per token] over `tokens` tokens of `text_bytes` bytes of text, comparable over tokenizers."""
    return loss * tokens / (text_bytes * math.log(2))


class Meter:
    """Turns (tokens, seconds) into rates, utilisation and the time left.

    `flops_causal` and `flops_full` are model FLOPs per token, forward and backward, without any
    recomputation; `peak_flops` is one rank's, or None.
    """

    def __init__(
        self,
        ranks: int,
        flops_causal: float,
        flops_full: float,
        peak_flops: float | None,
        total_tokens: int,
    ) -> None:
        self._ranks = ranks
        self._flops, self._peak = (flops_causal, flops_full), peak_flops
        self._total_tokens = total_tokens
        self._laps: deque[tuple[int, float]] = deque(maxlen=20)
        self._only_first: bool | None = None  # None before the first step

    def step(self, *, tokens: int, seconds: float, consumed_tokens: int, **values: Any) -> StepMetrics:
        """The metrics of `tokens` tokens in `seconds`; `values` are the other fields of `StepMetrics`."""
        if self._only_first:
            self._laps.clear()  # the first step warms everything up: it says nothing about the others
        self._only_first = self._only_first is None
        self._laps.append((tokens, seconds))
        rate = tokens / seconds
        causal, full = (flops * rate / self._ranks / self._peak if self._peak else None for flops in self._flops)
        recent = sum(n for n, _ in self._laps) / sum(s for _, s in self._laps)
        return StepMetrics(
            tokens=tokens,
            step_seconds=seconds,
            tokens_per_second=rate,
            tokens_per_second_per_rank=rate / self._ranks,
            mfu_causal=causal,
            mfu_full=full,
            consumed_tokens=consumed_tokens,
            eta_seconds=max(0, self._total_tokens - consumed_tokens) / recent,
            **values,
        )


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process ever held: allocated on a GPU, else resident.

    On Linux VmHWM, because ru_maxrss starts from the launcher's size.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MetricsWriter:
    """On rank 0 tells the log about every step and evaluation and writes them to the sinks.

    `step` is the number of updates already made: later lines of an earlier start, and a line that a
    kill cut short, are removed from ``metrics.jsonl``; TensorBoard is told to forget them.  Of a run
    that starts again from 0 the old file is kept as ``metrics.old.jsonl``.  A thread writes, so that a slow file system
    costs no step.
    """

    def __init__(
        self,
        folder: Path,
        log: Logger,
        config: LogConfig,
        *,
        steps: int,
        step: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._log = log
        self._steps = steps
        self._tells = config.every_rank or log.rank == 0
        self._memory, self._loss_scale = 0, 1.0  # said last
        self._sinks: dict[str, Any] = {}
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        if log.rank != 0:
            return
        self._thread.start()
        self._open("metrics.jsonl", lambda: JsonLines(folder / "metrics.jsonl", step))
        if config.tensorboard:
            self._open("TensorBoard", lambda: TensorBoard(folder / "tensorboard", step))
        if config.wandb:
            self._open("wandb", lambda: Wandb(folder, config.wandb_project, dict(settings or {})))

    def train(self, metrics: StepMetrics) -> None:
        """Write a training step, and say what has grown since it was said: too rarely to be on every line."""
        self._write("train", metrics)
        if metrics.peak_memory_bytes > 1.05 * self._memory:
            self._memory = metrics.peak_memory_bytes
            self._log.info(f"step {metrics.step}: peak memory of this rank {human_bytes(self._memory)}")
        if not self._tells:
            return
        if (metrics.mfu_causal or 0) > 1:
            self._log.warn_once("MFU above 100 %: this device does more than run.peak_tflops; raise it", key="MFU")
        if metrics.loss_scale > self._loss_scale:
            self._log.info(f"step {metrics.step}: loss scale {metrics.loss_scale:g}")
        self._loss_scale = metrics.loss_scale

    def valid(self, metrics: ValidMetrics) -> None:
        """Write an evaluation."""
        self._write(metrics.kind, metrics)

    def close(self) -> None:
        """Finish all files."""
        for name, sink in self._sinks.items():
            self._queue.put(partial(self._try, name, sink.close))
        self._queue.put(None)
        if self._thread.ident is not None:  # of a rank that writes
            self._thread.join()
        self._sinks = {}

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            work()

    def _write(self, kind: str, metrics: StepMetrics | ValidMetrics) -> None:
        if self._tells:
            self._log.info(metrics.line(self._steps))
        for name, sink in self._sinks.items():
            self._queue.put(partial(self._try, name, partial(sink.write, kind, metrics)))

    def _open(self, name: str, make: Callable[[], Any]) -> None:
        try:
            self._sinks[name] = make()
        except ImportError as error:
            package = (error.name or name).split(".")[0]
            self._log.warn_once(f"no {name} output: the package {package} is not installed; pip install {package}")
        except Exception as error:  # a sink may fail in any way
            self._log.warn_once(f"no {name} output: {error}; training goes on")

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._log.warn_once(f"{name} could not be written: {error}; training goes on", key=name)


class _Appender:
    """A file that grows by whole unbuffered writes: what a full disk cut short is taken back."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._file).st_size

    def append(self, data: bytes) -> None:
        """Write all of `data`, or nothing and raise OSError."""
        try:
            if os.write(self._file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size += len(data)
        except OSError:
            os.ftruncate(self._file, self._size)
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class JsonLines(_Appender):
    """One JSON object per line; numbers that are not finite are null."""

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            rewind(path, step)
        super().__init__(path)

    def write(self, kind: str, metrics: StepMetrics | ValidMetrics) -> None:
        """Append a line."""
        self.append((json.dumps(_finite({"kind": kind, **asdict(metrics)})) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rewind(path: Path, step: int) -> None:
    """Remove from a metrics file the lines after `step` and those that are no JSON; at step 0 put it aside."""
    if step == 0:
        os.replace(path, path.with_name("metrics.old.jsonl"))
        return
    part = path.with_name(path.name + ".tmp")
    dropped = False
    with path.open("rb") as old, part.open("wb") as new:
        for line in old:
            try:
                keep = line.endswith(b"\n") and json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                keep = False
            if keep:
                new.write(line)
            dropped |= not keep
    if dropped:
        os.replace(part, path)
    else:
        part.unlink()


def evaluated(path: Path, step: int) -> list[list[str]]:
    """[kind, name] of each evaluation after `step` that a metrics file holds; none where it cannot be read."""
    found = []
    with suppress(OSError), path.open("rb") as lines:
        for line in lines:
            if b'"kind": "train"' in line:
                continue
            with suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                found += [[record["kind"], record["name"]]] if record["step"] == step else []
    return found


class TensorBoard(_Appender):
    """Scalars as a TensorBoard event file, written at once; tensorflow is not needed."""

    def __init__(self, folder: Path, step: int) -> None:
        self._event = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        self._record = importlib.import_module("tensorboard.summary.writer.record_writer").RecordWriter
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}")
        self._put(file_version="brain.Event:2")
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._put(step=step + 1, session_log=start)  # forget steps from here on: an earlier start's

    def write(self, kind: str, metrics: StepMetrics | ValidMetrics) -> None:
        """Add the scalars of a step."""
        values = [self._summary.Value(tag=tag, simple_value=x) for tag, x in metrics.scalars().items()]
        self._put(step=metrics.step, summary=self._summary(value=values))

    def _put(self, **fields: Any) -> None:
        record = io.BytesIO()
        self._record(record).write(self._event.Event(wall_time=time.time(), **fields).SerializeToString())
        self.append(record.getvalue())


class Wandb:
    """Scalars to Weights & Biases; a resumed run continues the same one."""

    def __init__(self, folder: Path, project: str, settings: dict[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        name = folder / "wandb-id.txt"
        if not name.exists():
            name.write_text(os.urandom(6).hex() + "\n")
        self._run = wandb.init(
            project=project,
            dir=str(folder),
            name=folder.name,
            id=name.read_text().strip(),
            resume="allow",
            config=settings,
        )

    def write(self, kind: str, metrics: StepMetrics | ValidMetrics) -> None:
        """Log the scalars of a step."""
        self._run.log(metrics.scalars(), step=metrics.step)

    def close(self) -> None:
        """Finish the run there."""
        self._run.finish()
