"""Results in lm-evaluation-harness's form, tables, and which differences are beyond noise."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megallama.config.errors import DataError

SIZES, PAPER = tomllib.loads(Path(__file__).with_name("paper.toml").read_text("utf-8")).values()
Results = dict[str, Any]


def take(results: Results, task: str, values: Mapping[str, np.ndarray], shots: int, seconds: float) -> None:
    """Add a task: the values of every item by metric, their means and standard errors."""
    out: dict[str, Any] = {"alias": task}
    for name, own in values.items():
        out[f"{name},none"] = float(own.mean())
        out[f"{name}_stderr,none"] = float(own.std(ddof=1) / math.sqrt(len(own))) if len(own) > 1 else math.nan
    results["results"][task], results["n-shot"][task], results["seconds"][task] = out, shots, seconds
    results["n-samples"][task] = dict.fromkeys(("original", "effective"), len(next(iter(values.values()))))
    results["items"][task] = {name: own.tolist() for name, own in values.items()}


def read_results(path: Path) -> Results:
    """Raises: DataError where it is no result of an evaluation."""
    try:
        found = json.loads(path.read_text("utf-8"))
        for own in (*found["results"].values(), *found.get("items", {}).values()):
            own.items()
    except (ValueError, KeyError, TypeError, AttributeError):
        what = f"{path} is no result of an evaluation"
        raise DataError(f"{what}; megallama evaluate ... --output {path} writes one") from None
    return found


def metrics_of(results: Results, task: str) -> dict[str, tuple[float, float | None]]:
    """Metric -> value and standard error, of a task."""
    out = {}
    for key, value in results["results"][task].items():
        name, _, kind = key.partition(",")
        if isinstance(value, (int, float)) and not name.endswith("_stderr") and kind:
            error = results["results"][task].get(f"{name}_stderr,{kind}")
            out[name] = float(value), float(error) if isinstance(error, (int, float)) else None
    return out


def table(results: Results) -> list[str]:
    """A line per task and metric; beside the paper's numbers where the task is the same."""
    rows = []
    for task in results["results"]:
        shots = results.get("n-shot", {}).get(task)
        for name, (value, error) in metrics_of(results, task).items():
            paper = PAPER.get(task)
            same = paper and name == paper["metric"] and shots in (None, paper["shots"])
            beside = [f"{x / 100:.3f}" for x in paper["percent"]] if paper and same else [""] * len(SIZES)
            rows.append([task, "" if shots is None else str(shots), name, _said(value, error), *beside])
    heads = ["task", "shots", "metric", "value", *(f"LLaMA {size}" for size in SIZES)]
    columns = None if any(any(row[4:]) for row in rows) else 4
    return aligned([row[:columns] for row in (heads, *rows)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def beyond_noise(a: Sequence[float], b: Sequence[float], rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Mean of b - a and its standard error, by the paired bootstrap (Efron and Tibshirani 1993)."""
    difference = np.asarray(b, float) - np.asarray(a, float)
    draw, count = np.random.default_rng(seed), len(difference)
    means = [difference[draw.integers(0, count, count)].mean() for _ in range(rounds)]
    return float(difference.mean()), float(np.std(means, ddof=1))


def compare(files: Mapping[str, Results]) -> list[str]:
    """A table: results, and differences to the first, by item where both have them."""
    (first, base), *others = files.items()
    tasks = [task for task in base["results"] if any(task in other["results"] for _, other in others)]
    if not tasks:
        raise DataError(f"{', '.join(files)} have no task in common")
    rows = [["task", "metric", first, *(part for name, _ in others for part in (name, "difference"))]]
    for task in tasks:
        for metric, (value, error) in metrics_of(base, task).items():
            row = [task, metric, _said(value, error)]
            for _, other in others:
                found = metrics_of(other, task).get(metric) if task in other["results"] else None
                row += [_said(*found), _difference(base, other, task, metric)] if found else ["-", ""]
            rows.append(row)
    left = {name: [t for t in r["results"] if t not in tasks] for name, r in files.items()}
    notes = [f"not in all: {', '.join(more)} of {name}" for name, more in left.items() if more]
    return [*aligned(rows), "* beyond two standard errors of the difference", *notes]


def _said(value: float, error: float | None, form: str = ".4f") -> str:
    return format(value, form) + ("" if error is None or math.isnan(error) else f" ± {error:.4f}")


def _difference(base: Results, other: Results, task: str, metric: str) -> str:
    (value, error), (its, its_error) = (metrics_of(r, task)[metric] for r in (base, other))
    items = [r.get("items", {}).get(task, {}).get(metric) for r in (base, other)]
    digests = [r.get("task_hashes", {}).get(task) for r in (base, other)]
    difference, spread = its - value, None if None in (error, its_error) else math.hypot(error or 0, its_error or 0)
    if all(items) and len(items[0]) == len(items[1]) and digests[0] == digests[1]:
        difference, spread = beyond_noise(items[0], items[1])
    return _said(difference, spread, "+.4f") + ("*" if spread is not None and abs(difference) > 2 * spread else "")
