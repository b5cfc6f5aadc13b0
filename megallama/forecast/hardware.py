"""Constants of GPU kinds, attention kernels and training programs: `hardware.toml`, or a file of the same form.

A user's own file names the kind that it starts from and what differs: ``base = "h100"``, ``nic_gbit = 800.0``.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megallama.config.errors import ConfigError
from megallama.config.load import read_toml

TABLES = Path(__file__).with_name("hardware.toml")


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in its node and network: facts, then fitted constants (fractions of the facts)."""

    peak_tflops: float
    memory_gib: float
    memory_gb_per_s: float
    nvlink_gb_per_s: float  # one way
    nic_gbit: float  # per GPU
    gpus_per_node: int
    watts: float
    gemm: float  # of peak: matrix products without a small dimension
    small: float  # a dimension that alone halves the rate
    attention: float  # of the attention kernels' own fractions
    bandwidth: float  # of memory bandwidth: elementwise kernels
    tp_bus: float  # of NVLink: collectives within a node
    tp_latency_us: float
    nic: float  # of the NIC: collectives between nodes
    leaf_nodes: int
    hop_latency_us: float


@dataclass(frozen=True)
class Kernel:
    """One generation of attention kernels."""

    forward: float  # of peak
    backward: float
    passes: float = 0.0  # of the score matrix through memory
    unaligned: float = 2.0  # times slower with heads that are no multiple of 8
    causal: bool = True  # leaves out what the mask hides


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What a training program does, in numbers: time first, then bytes."""

    speed: float = 1.0  # of matrix products, against gpu.gemm
    fp8: float = 1.5  # speed of fp8 products over bf16's
    residual: float  # elementwise bytes per token and element of the residual stream in a layer's forward
    inner: float  # the same per element inside attention and the feed-forward network
    head: float  # the same per logit of this rank, forward and backward
    whole: float = 0.0  # the same per logit of the whole vocabulary (programs that gather it)
    accumulate: float  # bytes per parameter of adding a micro-batch's weight gradients to the others'
    tp_overlap: float = 0.0  # share of tensor-parallel communication hidden under computation
    cp_overlap: float = 0.0  # share of the exchange of keys and values that may hide under attention
    dp_overlap: float = 0.0  # share of gradients and parameters that may hide, if the backward is long enough
    blocking: float  # transfers between stages during which a rank waits, per forward and per backward
    scatter_gather: bool  # a transfer is cut over tp
    launch_us: float  # one layer's forward, input or weight gradient outside its kernels
    network: float = 1.0  # of what gpu.nic lets through
    ring_ns: float  # per parameter and doubling of a data-parallel ring's nodes beyond gpu.leaf_nodes
    step_ms: float  # per step
    jitter: float  # share of a step per doubling of the nodes, where stages wait for one another
    grad_bytes: float  # per parameter, reduced
    param_bytes: float  # per parameter, gathered
    state_bytes: float  # held per parameter by every rank
    shard_bytes: float  # held per parameter, divided by dp
    keep_residual: float  # kept per token and residual element (recompute none)
    keep_heads: float  # ... per element of q, k, v and the attention output
    keep_ffn: float  # ... per element of the feed-forward network
    keep_logits: float  # per logit of this rank
    keep_whole: float = 0.0  # per logit of the whole vocabulary
    reserve_gb: float  # context, communicators, workspaces


@dataclass(frozen=True)
class Hardware:
    """All that a prediction needs besides the job."""

    name: str
    gpu: Gpu
    kernels: dict[str, Kernel]
    stacks: dict[str, Stack]


def load_hardware(name: str) -> Hardware:
    """The GPU kind `name`, or in that file. Raises: ConfigError for unknown kinds and bad files."""
    tables, own, base, where = _tables(), {}, name, f"hardware={name}"
    kinds = tables["gpu"]
    if name.endswith(".toml"):
        own = read_toml(Path(name), "the hardware")
        base = str(own.pop("base", ""))
        where = f'{name}: base="{base}"'
    if base not in kinds:
        raise ConfigError(f"{where} is no known kind of GPU; {_near(base, kinds)}, or a .toml file with a base")
    known = kinds[base]
    for key, value in own.items():
        if key not in known:
            raise ConfigError(f"{name}: {key} is no constant of a GPU; {_near(key, known)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ConfigError(f"{name}: {key}={value!r} must be a number above 0, like {known[key]}")
    kernels = {k: Kernel(**v) for k, v in tables["kernel"].items()}
    stacks = {k: Stack(**v) for k, v in tables["stack"].items()}
    return Hardware(name, Gpu(**{**known, **own}), kernels, stacks)


def _near(word: str, known: Iterable[str]) -> str:
    near = [k for k in known if word and k.startswith(word)] or difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}?" if near else f"use {', '.join(known)}"


@cache
def _tables() -> dict[str, Any]:
    """Every row with what it takes over from its base, which stands above it."""
    tables = tomllib.loads(TABLES.read_text(encoding="utf-8"))
    for rows in tables.values():
        for name, row in rows.items():
            rows[name] = rows.get(row.pop("base", None), {}) | row
    return tables
