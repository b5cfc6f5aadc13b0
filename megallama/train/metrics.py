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
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from megallama.config.errors import counted
from megallama.config.schema import Config
from megallama.train.log import Logger, human_bytes, human_count, human_duration

Record = dict[str, Any]  # a line of metrics.jsonl: "kind" (train, valid, test), "step", numbers

TAGS = {  # the numbers of a step that TensorBoard and wandb get, as group/name
    "train": ["loss", "lr", "grad_norm", "loss_scale", "consumed_tokens", "skipped_steps"],
    "speed": [
        "tokens_per_second",
        "tokens_per_second_per_rank",
        "mfu_causal",
        "mfu_full",
        "step_seconds",
        "data_wait_seconds",
        "peak_memory_bytes",
    ],
}


def scalars(record: Record) -> dict[str, float]:
    """Flat names and values, for TensorBoard and wandb."""
    if record["kind"] != "train":
        tag = _tag(record)
        values = {f"{tag}/loss": record["loss"], f"{tag}/bits_per_byte": record["bits_per_byte"]}
    else:
        values = {f"{group}/{name}": record[name] for group, names in TAGS.items() for name in names}
        values |= {f"seconds/{name}": seconds for name, seconds in record["phase_seconds"].items()}
        values |= {f"{x}/{name}": used[x] for name, used in record["sources"].items() for x in ("tokens", "epochs")}
    return {tag: float(value) for tag, value in values.items() if value is not None}


def _tag(record: Record) -> str:
    kind, name = record["kind"], record["name"]
    return kind if name == kind else f"{kind}/{name}"


def line(record: Record, steps: int) -> str:
    """The console line, of a run of `steps` steps: with the time before it, at most 120 columns."""
    return f"step {record['step']}/{steps} | " + (_train_line if record["kind"] == "train" else _valid_line)(record)


def _train_line(record: Record) -> str:
    loss, norm = f"loss {record['loss']:.4f}", f"grad norm {record['grad_norm']:.3f}"
    parts = [loss, f"lr {record['lr']:.2e}", norm, f"{human_count(record['tokens_per_second'])} tok/s"]
    if record["mfu_causal"] is not None:
        parts.append(f"MFU {100 * record['mfu_causal']:.1f}%")
    if record["skipped"]:
        parts = [f"SKIPPED, not finite ({record['skipped_steps']} so far)", loss, norm]
    return " | ".join([*parts, f"left {human_duration(record['eta_seconds'])}"])


def _valid_line(record: Record) -> str:
    loss, bits = record["loss"], record["bits_per_byte"]
    name = _tag(record).replace("/", " ") if record["kind"] == "test" else record["name"]
    parts = [f"{name} loss {loss:.4f}", f"perplexity {math.exp(loss):.2f}" if loss < 20 else "perplexity large"]
    if bits is not None:
        parts.insert(1, f"{bits:.4f} bits/byte")
    amount = f"{counted(human_count(record['tokens']), 'token')} in {human_duration(record['seconds'])}"
    return " | ".join([*parts, amount])


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

    def __init__(self, config: Config, log: Logger, step: int = 0) -> None:
        folder, self._log, self._steps = Path(config.run.folder), log, config.train.steps
        self._tells = config.log.every_rank or log.rank == 0
        self._memory, self._loss_scale = 0, 1.0  # said last
        self._sinks: dict[str, Any] = {}
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        if log.rank != 0:
            return
        self._thread.start()
        self._open("metrics.jsonl", lambda: JsonLines(folder / "metrics.jsonl", step))
        if config.log.tensorboard:
            self._open("TensorBoard", lambda: TensorBoard(folder / "tensorboard", step))
        if config.log.wandb:
            self._open("wandb", lambda: Wandb(folder, config))

    def write(self, record: Record) -> None:
        """Write a training step or an evaluation."""
        if self._tells:
            self._log.info(line(record, self._steps))
        for name, sink in self._sinks.items():
            self._queue.put(partial(self._try, name, partial(sink.write, record)))
        if record["kind"] == "train":
            self._say_changes(record)

    def _say_changes(self, record: Record) -> None:
        """What has grown since it was said: too rarely to be on every line."""
        step, memory, scale = record["step"], record["peak_memory_bytes"], record["loss_scale"]
        if memory > 1.05 * self._memory:
            self._memory = memory
            self._log.info(f"step {step}: peak memory of this rank {human_bytes(memory)}")
        if not self._tells:
            return
        if (record["mfu_causal"] or 0) > 1:
            self._log.warn_once("MFU above 100 %: this device does more than run.peak_tflops; raise it", key="MFU")
        if scale > self._loss_scale:
            self._log.info(f"step {step}: loss scale {scale:g}")
        self._loss_scale = scale

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
        os.close(self._file)


class JsonLines(_Appender):
    """One JSON object per line; numbers that are not finite are null."""

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            rewind(path, step)
        super().__init__(path)

    def write(self, record: Record) -> None:
        self.append((json.dumps(_finite(record)) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rewind(path: Path, step: int) -> None:
    """Remove the lines after `step` and those that are no JSON; at step 0 put the file aside."""
    if step == 0:
        os.replace(path, path.with_name("metrics.old.jsonl"))
        return
    part = path.with_name(path.name + ".tmp")
    with path.open("rb") as old, part.open("wb") as new:
        for line in old:
            with suppress(ValueError, KeyError, TypeError):
                if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                    new.write(line)
    if part.stat().st_size < path.stat().st_size:
        os.replace(part, path)
    else:
        part.unlink()


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

    def write(self, record: Record) -> None:
        values = [self._summary.Value(tag=tag, simple_value=x) for tag, x in scalars(record).items()]
        self._put(step=record["step"], summary=self._summary(value=values))

    def _put(self, **fields: Any) -> None:
        record = io.BytesIO()
        self._record(record).write(self._event.Event(wall_time=time.time(), **fields).SerializeToString())
        self.append(record.getvalue())


class Wandb:
    """Scalars to Weights & Biases; a resumed run continues the same one."""

    def __init__(self, folder: Path, config: Config) -> None:
        wandb = importlib.import_module("wandb")
        name = folder / "wandb-id.txt"
        if not name.exists():
            name.write_text(os.urandom(6).hex() + "\n")
        self._run = wandb.init(
            project=config.log.wandb_project,
            dir=str(folder),
            name=folder.name,
            id=name.read_text().strip(),
            resume="allow",
            config=config.model_dump(mode="json"),
        )

    def write(self, record: Record) -> None:
        self._run.log(scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()
