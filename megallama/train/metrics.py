"""Where a step's numbers go: a console line, ``metrics.jsonl``, TensorBoard, wandb, a plot."""

import errno
import importlib
import io
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megallama.config.errors import counted
from megallama.config.schema import Config
from megallama.train.log import Logger, human_bytes, human_count, human_duration

Record = dict[str, Any]  # of metrics.jsonl: "kind" (train, valid, test, task), "step", numbers
_TRAIN, _VALID, _BASELINE = "#1f5fa8", "#d1495b", "#6b6b6b"  # colours of the plot

TAGS = {  # the numbers of a step that TensorBoard and wandb get, as group/name
    "train": "loss lr grad_norm loss_scale consumed_tokens skipped_steps".split(),
    "speed": [
        *"tokens_per_second tokens_per_second_per_rank mfu_causal mfu_full".split(),
        *"step_seconds data_wait_seconds slowest_excess peak_memory_bytes".split(),
    ],
}


def scalars(record: Record) -> dict[str, float]:
    """Flat names and values, for TensorBoard and wandb."""
    if record["kind"] != "train":
        own = record["metrics"] if "metrics" in record else {name: record[name] for name in ("loss", "bits_per_byte")}
        own = own | {f"by position/{name}": loss for name, loss in record.get("loss_by_position", {}).items()}
        values = {f"{_tag(record)}/{name}": value for name, value in own.items()}
    else:
        values = {f"{group}/{name}": record.get(name) for group, names in TAGS.items() for name in names}
        values |= {f"seconds/{name}": seconds for name, seconds in record["phase_seconds"].items()}
        values |= {f"{x}/{name}": used[x] for name, used in record["sources"].items() for x in ("tokens", "epochs")}
    return {tag: float(value) for tag, value in values.items() if value is not None}


def _tag(record: Record) -> str:
    kind, name = record["kind"], record["name"]
    return kind if name == kind else f"{kind}/{name}"


def line(record: Record, steps: int) -> str:
    """The console line, of a run of `steps` steps: with the time before it, at most 120 columns."""
    step, kind, loss = f"step {record['step']}/{steps}", record["kind"], record.get("loss", math.nan)
    if kind == "task":
        parts = [f"{name} {value:.4f}" for name, value in record["metrics"].items()]
        parts = parts or ["left out, eval.max_seconds are over; use more, or a smaller eval.limit"]
        amount = f"{counted(record['items'], 'item')} in {human_duration(record['seconds'])}"
        return " | ".join([step, record["name"], *parts, amount])
    if kind == "train":
        norm = f"grad norm {record['grad_norm']:.3f}"
        parts = [f"loss {loss:.4f}", f"lr {record['lr']:.2e}", norm]
        parts.append(f"{human_count(record['tokens_per_second'])} tok/s")
        if record["mfu_causal"] is not None:
            parts.append(f"MFU {100 * record['mfu_causal']:.1f}%")
        if record["skipped"]:
            why = "not finite" if math.isnan(loss) else "a spike"
            parts = [f"SKIPPED, {why} ({record['skipped_steps']} so far)", parts[0], norm]
        return " | ".join([step, *parts, f"left {human_duration(record['eta_seconds'])}"])
    name = _tag(record).replace("/", " ") if kind == "test" else record["name"]
    parts = [f"{name} loss {loss:.4f}", f"perplexity {math.exp(loss):.2f}" if loss < 20 else "perplexity large"]
    if record["bits_per_byte"] is not None:
        parts.insert(1, f"{record['bits_per_byte']:.4f} bits/byte")
    amount = counted(human_count(record["tokens"]), "token")
    return " | ".join([step, *parts, f"{amount} in {human_duration(record['seconds'])}"])


class MetricsWriter:
    """Tells the log about every step and evaluation, and on rank 0 writes them to the sinks.

    step: already made; what an earlier start wrote of later ones is removed, or kept as ``metrics.old.jsonl``.
    """

    def __init__(self, config: Config, log: Logger, step: int = 0) -> None:
        folder, self._log, self._steps = Path(config.run.folder), log, config.train.steps
        self._tells = config.log.every_rank or log.rank == 0
        self._memory, self._loss_scale = 0, 1.0  # said last
        self._sinks: dict[str, Any] = {}
        self._thread = ThreadPoolExecutor(1, "metrics")  # a slow file system costs no step
        if log.rank != 0:
            return
        self._open("metrics.jsonl", lambda: JsonLines(folder / "metrics.jsonl", step))
        if config.log.tensorboard:
            self._open("TensorBoard", lambda: TensorBoard(folder / "tensorboard", step))
        if config.log.wandb:
            self._open("wandb", lambda: Wandb(folder, config))

    def write(self, record: Record) -> None:
        if self._tells:
            self._log.info(line(record, self._steps))
            if longest := [*record.get("loss_by_position", {}).items()][-6:]:
                said = ", ".join(f"{before} {loss:.3f}" for before, loss in longest)
                self._log.info(f"{record['name']} loss by tokens before: {said}")
        for name, sink in self._sinks.items():
            self._thread.submit(self._try, name, sink.write, record)
        if record["kind"] != "train":
            return
        # what has grown since it was said: too rarely to be on every line
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

    def catch_up(self, seconds: float) -> None:
        """Wait so long for what is not written: nothing saved is ahead of the records."""
        with suppress(TimeoutError):
            if self._sinks:
                self._thread.submit(int).result(seconds)

    def close(self) -> None:
        for name, sink in self._sinks.items():
            self._thread.submit(self._try, name, sink.close)
        self._thread.shutdown()
        self._sinks = {}

    def _open(self, name: str, make: Callable[[], Any]) -> None:
        try:
            self._sinks[name] = make()
        except ImportError as error:
            package = (error.name or name).split(".")[0]
            self._log.warn_once(f"no {name} output: the package {package} is not installed; pip install {package}")
        except Exception as error:  # a sink may fail in any way: none costs more than a warning
            self._log.warn_once(f"no {name} output: {error}; training goes on")

    def _try(self, name: str, action: Callable[..., None], *arguments: Record) -> None:
        try:
            action(*arguments)
        except Exception as error:
            self._log.warn_once(f"{name} could not be written: {error}; training goes on", key=name)


class _Appender:
    """A file of whole unbuffered writes: what a full disk cut short is taken back."""

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
        finite = json.loads(json.dumps(record), parse_constant=lambda name: None)
        self.append((json.dumps(finite) + "\n").encode())


def rewind(path: Path, step: int) -> None:
    """Remove lines after `step`, and one cut short; at 0 keep the file by another name."""
    if step == 0:
        names = ("metrics.old.jsonl", *(f"metrics.old-{n}.jsonl" for n in range(2, 10_000)))
        os.replace(path, next(p for p in map(path.with_name, names) if not p.exists()))
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
        own = {"dir": str(folder), "name": folder.name, "id": name.read_text().strip()}
        settings, project = config.model_dump(mode="json"), config.log.wandb_project
        self._run = wandb.init(project=project, config=settings, resume="allow", **own)

    def write(self, record: Record) -> None:
        self._run.log(scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def read_metrics(path: Path) -> Iterator[Record]:
    """The records of a metrics file, without lines that are no JSON (half written)."""
    with path.open("rb") as lines:
        for line in lines:
            with suppress(ValueError):
                if isinstance(record := json.loads(line), dict):
                    yield record


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean of the `width` values around each, fewer at the ends (as many on either side)."""
    total, i = np.cumsum([0.0, *values]), np.arange(len(values))
    reach = np.minimum(np.minimum(i, i[::-1]), width // 2)
    return ((total[i + reach + 1] - total[i - reach]) / (2 * reach + 1)).tolist()


def plot_loss(metrics: Path, png: Path, *, title: str = "", baseline: float | None = None) -> tuple[Path | None, str]:
    """Draw losses over tokens; (png, "") or (None, why not). baseline: the unigram loss."""
    try:
        records = [r for r in read_metrics(metrics) if "consumed_tokens" in r]
    except OSError as error:
        return None, f"{metrics} cannot be read: {error.strerror}"
    of = {k: [r | r.get("metrics", {}) for r in records if r.get("kind") == k] for k in ("train", "valid", "task")}
    train = [r for r in of["train"] if isinstance(r.get("loss"), float) and not r.get("skipped")]
    if len(train) < 2:
        return None, f"{metrics} holds fewer than 2 training steps"
    try:
        _draw(train, of["valid"], of["task"], png, title, baseline)
    except ImportError:
        return None, "matplotlib is not installed; pip install matplotlib"
    except OSError as error:
        return None, f"{png} cannot be written: {error.strerror}"
    return png, ""


def _draw(
    train: list[Record], valid: list[Record], tasks: list[Record], png: Path, title: str, baseline: float | None
) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    below = [name for name in ("acc", "bits_per_byte") if any(r.get(name) is not None for r in tasks)]
    figure = Figure(figsize=(8, 4.8 + 2.4 * len(below)), layout="constrained")
    heights = [2] + [1] * len(below)
    axes, *panels = figure.subplots(len(heights), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    tokens, losses = ([r[key] for r in train] for key in ("consumed_tokens", "loss"))
    axes.plot(tokens, losses, color=_TRAIN, linewidth=0.7, alpha=0.35)
    axes.plot(tokens, smooth(losses, max(3, len(losses) // 40)), color=_TRAIN, linewidth=1.8, label="training")
    if baseline is not None:
        axes.axhline(baseline, color=_BASELINE, linestyle="--", linewidth=1, label=f"unigram baseline ({baseline:.3f})")
    axes.set(ylabel="loss [nats per token]", title=title, xlim=(0, tokens[-1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human_count(x)))
    _curves(axes, valid, "loss", color=_VALID)
    for panel, metric in zip(panels, below, strict=True):
        panel.set(ylabel=metric.replace("_", " "))
        _curves(panel, tasks, metric)
    [axes, *panels][-1].set(xlabel="tokens")
    per_step = tokens[-1] / train[-1]["step"]
    above = axes.secondary_xaxis("top", functions=(lambda x: x / per_step, lambda x: x * per_step))
    ramped = train[0]["consumed_tokens"] * train[-1]["step"] != tokens[-1] * train[0]["step"]
    above.set_xlabel("step (mean tokens per step)" if ramped else "step")
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=150)


def _curves(axes: Any, records: list[Record], key: str, **look: str) -> None:
    """One per name, with its last value."""
    there = [r for r in records if r.get(key) is not None]
    for i, name in enumerate(sorted({r["name"] for r in there})):
        xs, ys = ([r[k] for r in there if r["name"] == name] for k in ("consumed_tokens", key))
        label = f"{'validation' if name == 'valid' else name} (last {ys[-1]:.3f})"
        axes.plot(xs, ys, marker="os^Dv"[i % 5], markersize=5, linewidth=1, label=label, clip_on=False, **look)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
