"""The loss curve of a run as a PNG, drawn from ``metrics.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megallama.train.log import human_count

Record = dict[str, Any]
_TRAIN, _VALID, _BASELINE = "#1f5fa8", "#d1495b", "#6b6b6b"


def read_metrics(path: Path) -> Iterator[Record]:
    """The records of a metrics file, without lines that are no JSON (one may be half written)."""
    with path.open("rb") as lines:
        for line in lines:
            with suppress(ValueError):
                if isinstance(record := json.loads(line), dict):
                    yield record


def smooth(values: list[float], width: int) -> list[float]:
    """Mean over the `width` values around each one, fewer at the ends (as many on either side)."""
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    result = []
    for i in range(len(values)):
        reach = min(width // 2, i, len(values) - 1 - i)
        result.append((total[i + reach + 1] - total[i - reach]) / (2 * reach + 1))
    return result


def plot_loss(metrics: Path, png: Path, *, title: str = "", baseline: float | None = None) -> tuple[Path | None, str]:
    """Draw training and validation loss over tokens; `baseline` is the unigram loss of the corpus.

    Returns (png, "") or (None, why not): nothing to draw, matplotlib missing, folder not writable.
    """
    try:
        records = [r for r in read_metrics(metrics) if isinstance(r.get("loss"), float) and "consumed_tokens" in r]
    except OSError as error:
        return None, f"{metrics} cannot be read: {error.strerror}"
    train = [r for r in records if r.get("kind") == "train" and not r.get("skipped")]
    if len(train) < 2:
        return None, f"{metrics} holds fewer than 2 training steps"
    try:
        _draw(train, [r for r in records if r.get("kind") == "valid"], png, title, baseline)
    except ImportError:
        return None, "matplotlib is not installed; pip install matplotlib"
    except OSError as error:
        return None, f"{png} cannot be written: {error.strerror}"
    return png, ""


def _draw(train: list[Record], valid: list[Record], png: Path, title: str, baseline: float | None) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tokens, losses = [r["consumed_tokens"] for r in train], [r["loss"] for r in train]
    axes.plot(tokens, losses, color=_TRAIN, linewidth=0.7, alpha=0.35)
    axes.plot(tokens, smooth(losses, max(3, len(losses) // 40)), color=_TRAIN, linewidth=1.8, label="training")
    for i, name in enumerate(sorted({r["name"] for r in valid})):
        points = [r for r in valid if r["name"] == name]
        label = f"{'validation' if name == 'valid' else name} (last {points[-1]['loss']:.3f})"
        xs, ys = [r["consumed_tokens"] for r in points], [r["loss"] for r in points]
        axes.plot(xs, ys, color=_VALID, marker="os^Dv"[i % 5], markersize=5, linewidth=1, label=label, clip_on=False)
    if baseline is not None:
        axes.axhline(baseline, color=_BASELINE, linestyle="--", linewidth=1, label=f"unigram baseline ({baseline:.3f})")
    axes.set(xlabel="tokens", ylabel="loss [nats per token]", title=title, xlim=(0, tokens[-1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human_count(x)))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    per_step = tokens[-1] / train[-1]["step"]
    above = axes.secondary_xaxis("top", functions=(lambda x: x / per_step, lambda x: x * per_step))
    above.set_xlabel("step (mean tokens per step)" if _ramped(train) else "step")
    axes.legend(frameon=False)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=150)


def _ramped(train: list[Record]) -> bool:
    """The number of tokens per step was not the same all along."""
    first, last = train[0], train[-1]
    return first["consumed_tokens"] * last["step"] != last["consumed_tokens"] * first["step"]
