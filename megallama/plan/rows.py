"""Jobs from a table of published or wanted layouts, with the columns of benchmarks/measurements/validate.csv.

The measured columns may be empty or absent.  From the others it also follows which program ran (`stack_of`), as
programs differ in what they fuse, overlap and keep; a `stack` column with a row of hardware.toml says it outright.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from megallama.plan.hardware import Machine, load_machine
from megallama.plan.job import Job

NEEDED = ("gpu", "layers", "hidden", "heads", "seq", "gpus", "global_batch_seqs")
GPUS = {"a100-40": "a100-40g", "a100": "a100-80g", "h200": "h200", "h100": "h100"}
KERNELS = {"unfused": "unfused", "attention3": "flash3", "cudnn": "flash3", "triton": "flash1", "xformers": "flash1"}
ENDS = {"zerobubble": (1, 1), "scaling": (1, 2), "scaling-rms": (1, 2)}  # modules before and after the layers
Row = Mapping[str, str | None]
_machine = cache(load_machine)


class RowError(Exception):
    """Why one row cannot be predicted."""


def job_of_row(row: Row) -> tuple[Job, Machine]:
    """The job and the machine that a row describes. Raises: RowError saying which column is wrong."""
    machine = machine_of(row)
    tp, pp, cp, micro = (_count(row, k, 1) for k in ("tp", "pp", "cp", "micro_batch"))
    chunks = _count(row, "vpp", 2 if pp > 1 and _word(row, "schedule").endswith("interleaved") else 1)
    if not any(_word(row, k) for k in ("tp", "pp", "dp")):
        raise RowError("tp, pp and dp are empty: the layout is not known")
    gpus, batch = _count(row, "gpus", 0) or tp * pp * cp * _count(row, "dp"), _count(row, "global_batch_seqs")
    dp = _count(row, "dp", 0) or max(1, gpus // (tp * pp * cp))
    if tp * pp * cp * dp != gpus:
        raise RowError(f"tp={tp} x pp={pp} x cp={cp} x dp={dp} is not gpus={gpus}")
    if batch < dp * micro:
        raise RowError(f"global_batch_seqs={batch} is less than micro_batch={micro} x dp={dp}")
    layers, hidden, heads = (_count(row, k) for k in ("layers", "hidden", "heads"))
    if hidden % heads:
        raise RowError(f"hidden={hidden} is no multiple of heads={heads}")
    if pp * chunks > layers + 2:  # some count embedding and head as layers
        raise RowError(f"pp={pp} x vpp={chunks} stages are more than layers={layers} and two")
    stack, schedule = stack_of(row), _word(row, "schedule").rstrip("?").split("/")[0]
    if stack == "zerobubble" and schedule != "zb-v":
        chunks = (layers + 2) // pp if schedule == "interleaved" and (layers + 2) % pp == 0 else 1  # a layer per chunk
    split = evenly(layers, pp * chunks, *ENDS[stack]) if pp > 1 and stack in ENDS else None
    gated, recompute = _word(row, "gated") in ("1", "true"), _word(row, "recompute")
    job = Job(
        layers, hidden, _count(row, "ffn", 4 * hidden), gated, heads, _count(row, "kv_heads", heads), hidden // heads,
        _count(row, "vocab", 50304), _count(row, "seq"), gpus, tp, pp, dp, micro, batch // (dp * micro), cp, chunks,
        schedule=schedule if schedule in ("gpipe", "csv") or schedule[:2] in ("zb", "v-", "du") else "1f1b",
        recompute="full" if recompute == "full" else "selective" if recompute[:5] in ("selec", "llama") else "none",
        sequence_parallel=_word(row, "sp") in ("1", "true") and tp > 1, sharding=_sharding(row), tied=not gated,
        fp8=_word(row, "dtype") == "fp8", kernel=_first(KERNELS, _word(row, "attn_kernel")) or "flash2", stack=stack,
        network_gbit=_network(row), stage_layers=split,
    )  # fmt: skip
    return job, machine


def evenly(layers: int, stages: int, before: int, after: int) -> tuple[int, ...] | None:
    """Layers of each stage where a program shares out modules, surplus first: embedding, layers, norm and head."""
    low, surplus = divmod(layers + before + after, stages)
    first, *others, last = (low + (s < surplus) for s in range(stages))
    return (first - before, *others, last - after) if first >= before and last >= after else None


def assumed(row: Row) -> list[str]:
    """What a row leaves open and the prediction depends on."""
    vpp = {"vpp": 1 + _word(row, "schedule").endswith("interleaved")} if _count(row, "pp", 1) > 1 else {}
    used = ({"micro_batch": 1, "vocab": 50304} | vpp).items()
    return [f"{key}={value} is assumed" for key, value in used if not _word(row, key)]


def machine_of(row: Row) -> Machine:
    """The kind of GPU that a row names. Raises: RowError if we have no constants for it."""
    if (kind := _first(GPUS, _word(row, "gpu"))) is None:
        raise RowError(f"gpu={row.get('gpu')!r} is not among A100, H100, H200")
    return _machine(kind)


def stack_of(row: Row) -> str:
    """The program that ran, as a row of hardware.toml."""
    stacks = machine_of(row).stacks
    if said := _word(row, "stack"):
        if said not in stacks:
            raise RowError(f"stack={said} is unknown; use {', '.join(stacks)}")
        return said
    mode, kernel, schedule = (_word(row, k) for k in ("dp_mode", "attn_kernel", "schedule"))
    a100 = "a100" in _word(row, "gpu")
    rules = {
        "torchtitan": mode.startswith("fsdp2"),
        "deepspeed": mode.startswith("zero3") and "unfused" in kernel,
        "fsdp": mode.startswith(("fsdp", "zero2", "zero3", "hsdp")),
        "megatron-core": "te)" in kernel or mode.startswith("distopt overlap"),
        "megatron-deepspeed-numa": "date tag 02-25" <= _word(row, "note")[:14] <= "date tag 12-31",
        "megatron-deepspeed": "unfused" in kernel and (mode.startswith("zero1") or _word(row, "dtype")[:2] == "bf"),
        "megatron": "unfused" in kernel,
        "zerobubble": schedule.startswith("zb") or (mode == "none" and not kernel),
        "scaling-rms": "rms kernel" in kernel,
        "scaling" if a100 else "nanotron": "flash_attention2" in kernel and not mode.startswith("distopt"),
    }
    return next((name for name, yes in rules.items() if yes), "megatron-2024")


def _sharding(row: Row) -> str:
    known = {"fsdp": "zero3", "hsdp": "zero3", "zero3": "zero3", "zero2": "zero2", "zero1": "zero1", "distopt": "zero1"}
    found = _first(known, _word(row, "dp_mode")) or "none"
    return "zero1" if found == "zero3" and _count(row, "pp", 1) > 1 else found  # pipelines gather once a step


def _network(row: Row) -> float | None:
    number = re.match(r"\d+(\.\d+)?", _word(row, "net_inter_gbit_per_gpu"))  # or words, e.g. RoCE
    return float(number[0]) or None if number else None


def _first(known: Mapping[str, str], text: str) -> str | None:
    return next((value for word, value in known.items() if word in text), None)


def _word(row: Row, key: str) -> str:
    return (row.get(key) or "").strip().lower()


def _count(row: Row, key: str, default: int | None = None) -> int:
    text = _word(row, key)
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        raise RowError(f"{key}={text!r} is no number" if text else f"{key} is empty") from None
    if not 1 <= value < 1e9 or value != int(value):
        raise RowError(f"{key}={text} is no whole number above 0")
    return int(value)
