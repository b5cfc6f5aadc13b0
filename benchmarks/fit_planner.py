"""Fit the constants of megallama/plan/hardware.toml, and report how well they predict.

    python benchmarks/fit_planner.py            # report with the constants as they stand -> benchmarks/results/planner.md
    python benchmarks/fit_planner.py --fit      # fit anew, write hardware.toml, then report with cross-validation

Reads benchmarks/measurements/validate.csv and aux_validate.csv and nothing else.  Errors are of log step time, the
loss is robust (Cauchy: single rows far off have no say), every constant has a prior in log space that keeps it physical.  Cross-validation
leaves out whole configurations (model, GPUs, sequence, layout), five folds; the constants in the file come from all.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
import tomllib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megallama.plan.hardware import TABLES, Machine, load_machine  # noqa: E402
from megallama.plan.job import Job  # noqa: E402
from megallama.plan.predict import step_seconds  # noqa: E402
from megallama.plan.rows import RowError, job_of_row  # noqa: E402

TOML: dict[str, Any] = tomllib.loads(TABLES.read_text(encoding="utf-8"))
MEASURED = ROOT / "benchmarks/measurements/validate.csv"
SIGMA, DELTA = 0.03, 0.04  # of log step time: noise, and where the loss turns flat

# constant -> standard deviation of its prior in log space, around the value in the file
GPU = dict(gemm=0.1, small=0.4, tp_bus=0.3, tp_latency_us=0.5, nic=0.2, hop_latency_us=0.7)
KERNEL = dict(forward=0.2, backward=0.2, passes=0.3, unaligned=0.5)
STACK = dict(speed=0.05, wide=0.4, inner=0.4, head=0.4, whole=0.7, launch_us=0.7, network=0.5, ring_ns=0.7, jitter=0.5, blocking=0.7, step_ms=0.7)
STACK |= dict(dp_overlap=0.3, tp_overlap=0.3, fp8=0.1)

FITTED: dict[str, tuple[str, ...]] = {
    "gpu.a100-80g": tuple(GPU),
    "kernel.unfused": ("forward", "backward", "passes", "unaligned"),
    "kernel.flash1": ("forward", "backward"),
    "kernel.flash2": ("forward", "backward"),
    "stack.deepspeed": ("network", "dp_overlap"),
    "stack.megatron": ("wide", "inner", "launch_us", "blocking", "ring_ns", "jitter"),
    "stack.megatron-2024": ("speed", "wide", "blocking"),
    "stack.megatron-deepspeed": ("speed", "network", "blocking", "launch_us"),
    "stack.zerobubble": ("speed", "wide", "blocking", "head"),
    "stack.scaling": ("speed", "wide", "inner", "launch_us", "network", "ring_ns", "blocking", "whole", "step_ms", "jitter"),
    "stack.scaling-rms": ("wide",),
    "stack.fsdp": ("speed", "wide", "inner", "head", "dp_overlap", "launch_us"),
}
FITTED_H100: dict[str, tuple[str, ...]] = {
    "gpu.h100": ("gemm", "small", "attention", "tp_bus"),
    "kernel.flash3": ("forward", "backward"),
    "stack.megatron-core": ("speed", "wide", "tp_overlap", "dp_overlap", "ring_ns", "fp8", "launch_us"),
    "stack.torchtitan": ("speed", "wide", "head", "fp8", "tp_overlap"),
}
Fit = tuple[dict[str, str], Job, float, str]


def measured(kinds: tuple[str, ...]) -> list[Fit]:
    """Rows with a measured step time on these kinds of GPU."""
    out = []
    with MEASURED.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["fits"] != "1" or not row["step_time_s"]:
                continue
            try:
                job, machine = job_of_row(row)
            except RowError:
                continue
            if machine.name in kinds:
                out.append((row, job, float(row["step_time_s"]), machine.name))
    return out


def configuration(row: dict[str, str]) -> str:
    """What a fold leaves out together: rows of one model, machine size and layout."""
    return "/".join(row[k] for k in ("group", "model", "gpus", "seq", "tp", "pp", "vpp", "dp"))


def followers(kind: str, row: str, key: str) -> list[str]:
    """The rows whose value of `key` is the one written in `row`."""
    rows = TOML[kind]

    def owner(name: str) -> str:
        return name if key in rows[name] or "base" not in rows[name] else owner(rows[name]["base"])

    return [name for name in rows if owner(name) == row]


class Model:
    """The constants under fit, as a vector of logarithms."""

    def __init__(self, fitted: dict[str, tuple[str, ...]]) -> None:
        self.names = [f"{section}.{key}" for section, keys in fitted.items() for key in keys]
        self.machines = {k: load_machine(k) for k in ("a100-80g", "a100-40g", "h100", "h200")}
        spread = {"gpu": GPU | {"attention": 0.3}, "kernel": KERNEL, "stack": STACK}
        self.spread = np.array([spread[n.split(".")[0]][n.rpartition(".")[2]] for n in self.names])
        self.start = np.log([self._value(n) for n in self.names])

    def _value(self, name: str) -> float:
        kind, row, key = name.split(".")
        machine = self.machines["a100-80g"]
        if kind == "gpu":
            return getattr(self.machines[row].gpu, key)
        return getattr((machine.kernels if kind == "kernel" else machine.stacks)[row], key)

    def at(self, x: np.ndarray) -> dict[str, Machine]:
        """The machines with these constants; rows without an own value follow their base."""
        gpus = {k: m.gpu for k, m in self.machines.items()}
        kernels, stacks = dict(self.machines["a100-80g"].kernels), dict(self.machines["a100-80g"].stacks)
        for name, value in zip(self.names, np.exp(x), strict=True):
            kind, row, key = name.split(".")
            for follower in followers(kind, row, key):
                table = {"gpu": gpus, "kernel": kernels, "stack": stacks}[kind]
                table[follower] = replace(table[follower], **{key: float(value)})
        return {k: Machine(k, gpus[k], kernels, stacks) for k in gpus}


def predicted(model: Model, x: np.ndarray, rows: list[Fit]) -> np.ndarray:
    """Log seconds of each row."""
    machines = model.at(x)
    return np.array([math.log(step_seconds(job, machines[kind])) for _, job, _, kind in rows])


def fit(model: Model, rows: list[Fit], rounds: int = 15) -> np.ndarray:
    """Gauss-Newton on the robust loss with priors."""
    x, target = model.start.copy(), np.log([t for _, _, t, _ in rows])
    for _ in range(rounds):
        now = predicted(model, x, rows)
        slopes = np.empty((len(rows), len(x)))
        for k in range(len(x)):
            moved = x.copy()
            moved[k] += 1e-3
            slopes[:, k] = (predicted(model, moved, rows) - now) / 1e-3
        error = now - target
        weight = 1 / (1 + (error / DELTA) ** 2) / SIGMA**2
        left = slopes.T @ (slopes * weight[:, None]) + np.diag(1 / model.spread**2)
        right = slopes.T @ (weight * error) + (x - model.start) / model.spread**2
        x = x - np.clip(np.linalg.solve(left + 1e-3 * np.diag(np.diag(left)), right), -0.5, 0.5)
    return x


def line(errors: np.ndarray) -> str:
    """Mean, median, 90th percentile and largest error in per cent."""
    e = np.abs(np.exp(errors) - 1) * 100
    return f"{len(e)} | {e.mean():.1f} | {np.median(e):.1f} | {np.percentile(e, 90):.1f} | {e.max():.1f}"


def write(model: Model, x: np.ndarray) -> None:
    """Put the constants into hardware.toml, each into its own line."""
    text = TABLES.read_text(encoding="utf-8")
    for name, value in zip(model.names, np.exp(x), strict=True):
        kind, row, key = name.split(".")
        start = text.index(f"[{kind}.{row}]")
        end = text.find("\n[", start + 1) % (len(text) + 1)
        section, count = re.subn(rf"(?m)^{key} = [^\s#]+", f"{key} = {value:.4g}", text[start:end])
        assert count == 1, name
        text = text[:start] + section + text[end:]
    TABLES.write_text(text, encoding="utf-8")
