"""Predictions for a table of published or wanted layouts: CSV in, CSV out.

The columns are those of benchmarks/measurements/validate.csv; the measured ones may be empty or absent.  From the
columns it also follows which program ran (`stack_of`), as programs differ in what they fuse, overlap and keep.
A row that cannot be read is left out of the predictions and named with its line and the reason.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from megallama.config.errors import ConfigError
from megallama.plan.hardware import Machine, load_machine
from megallama.plan.job import Job
from megallama.plan.predict import Prediction, predict

NEEDED = ("gpu", "layers", "hidden", "heads", "seq", "tp", "pp", "micro_batch", "global_batch_seqs")
WRITTEN = ("step_time_s", "tok_s_gpu", "tflops", "mem_gb", "fits")
NETWORKS = {"50 (4x100 gb/s omni-path per 8 gpus)": 50.0, "efa v2 (3200 gb/s per node)": 400.0}
Row = Mapping[str, str]


class RowError(Exception):
    """Why one row cannot be predicted."""


@dataclass(frozen=True)
class Bad:
    """A row that was left out."""

    line: int
    reason: str


def predict_rows(text: str) -> tuple[str, list[Bad], list[tuple[Row, Prediction]]]:
    """The table with predictions, the rows left out, and the predictions in full.

    Raises: ConfigError if the text has no header or lacks columns that no row can do without.
    """
    reader = csv.DictReader(io.StringIO(text))
    have = list(reader.fieldnames or ())
    if missing := [c for c in NEEDED if c not in have]:
        raise ConfigError(f"the table has no column {', '.join(missing)}; it needs {', '.join(NEEDED)}")
    measured = [c for c in WRITTEN if c in have]
    head = [c if c not in measured else f"measured_{c}" for c in have] + list(WRITTEN) + ["flags"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    bad, good = [], []
    for row in reader:
        cells = [row[c] or "" for c in have]
        try:
            job, machine = job_of_row(row)
            p = predict(job, machine)
        except RowError as error:
            bad.append(Bad(reader.line_num, str(error)))
            writer.writerow([*cells, *[""] * len(WRITTEN), f"not predicted: {error}"])
            continue
        good.append((row, p))
        numbers = (p.step_seconds, p.tokens_per_second, p.mfu_full * machine.gpu.peak_tflops, p.memory.total / 1e9)
        writer.writerow([*cells, *(f"{v:.6g}" for v in numbers), int(p.fits), "; ".join(p.flags)])
    return out.getvalue(), bad, good


def job_of_row(row: Row) -> tuple[Job, Machine]:
    """The job and the machine that a row describes. Raises: RowError saying which column is wrong."""
    machine = machine_of(row)
    tp, pp, cp = (_count(row, k, 1) for k in ("tp", "pp", "cp"))
    gpus = _count(row, "gpus", 0) or tp * pp * cp * _count(row, "dp")
    dp = _count(row, "dp", 0) or gpus // (tp * pp * cp)
    if tp * pp * cp * dp != gpus:
        raise RowError(f"tp={tp} x pp={pp} x cp={cp} x dp={dp} is not gpus={gpus}")
    micro, batch = _count(row, "micro_batch"), _count(row, "global_batch_seqs")
    if not batch // (dp * micro):
        raise RowError(f"global_batch_seqs={batch} is less than micro_batch={micro} x dp={dp}")
    stack, schedule = stack_of(row), _word(row, "schedule").rstrip("?").split("/")[0]
    layers, hidden, chunks = _count(row, "layers"), _count(row, "hidden"), _count(row, "vpp", 1)
    heads = _count(row, "heads")
    split: tuple[int, ...] | None = None
    if stack == "zerobubble" and (layers + 2) % pp == 0 and schedule != "zb-v":
        each = (layers + 2) // pp  # embedding and head count as a layer there
        split = (each - 1, *[each] * (pp - 2), each - 1)
        if schedule == "interleaved":
            split, chunks = (0, *[1] * (pp * each - 2), 0), each
    job = Job(
        layers, hidden, _count(row, "ffn", 4 * hidden), _word(row, "gated") in ("1", "true"), heads,
        _count(row, "kv_heads", heads), _count(row, "vocab", 50304), _count(row, "seq"), gpus, tp, pp, dp, micro,
        round(batch / (dp * micro)), cp=cp, chunks=chunks,
        schedule={"interleaved": "1f1b", "tuned interleaved": "1f1b", "none": "1f1b", "": "1f1b"}.get(schedule, schedule),
        recompute=_recompute(row), sequence_parallel=_word(row, "sp") in ("1", "true") and tp > 1,
        sharding=_sharding(row), tied=_word(row, "gated") not in ("1", "true"), fp8=_word(row, "dtype") == "fp8",
        kernel=kernel_of(row), stack=stack, network_gbit=_network(row), stage_layers=split,
    )  # fmt: skip
    return job, machine


def machine_of(row: Row) -> Machine:
    """The kind of GPU that a row names. Raises: RowError if we have no constants for it."""
    name = _word(row, "gpu")
    for word, kind in (("a100-40", "a100-40g"), ("a100", "a100-80g"), ("h200", "h200"), ("h100", "h100")):
        if word in name:
            return _machine(kind)
    raise RowError(f"gpu={row.get('gpu')!r} is not among A100, H100, H200")


@cache
def _machine(kind: str) -> Machine:
    return load_machine(kind)


def stack_of(row: Row) -> str:
    """The program that ran, as a row of hardware.toml."""
    if _word(row, "group") == "megallama":
        return "megallama"
    mode, kernel, schedule = _word(row, "dp_mode"), _word(row, "attn_kernel"), _word(row, "schedule")
    if mode.startswith(("fsdp2",)):
        return "torchtitan"
    if mode.startswith("zero3") and "unfused" in kernel:
        return "deepspeed"
    if mode.startswith(("fsdp", "zero2", "zero3", "hsdp")):
        return "fsdp"
    if "te)" in kernel or mode.startswith("distopt overlap"):
        return "megatron-core"
    if "unfused" in kernel:
        return "megatron-deepspeed" if mode.startswith("zero1") or _word(row, "dtype")[:2] == "bf" else "megatron"
    if schedule.startswith("zb") or (mode == "none" and not kernel):
        return "zerobubble"
    if mode.startswith("distopt"):
        return "megatron-2024"
    if "rms kernel" in kernel:
        return "scaling-rms"
    return "scaling" if "flash_attention2" in kernel and "a100" in _word(row, "gpu") else "megatron-2024"


def kernel_of(row: Row) -> str:
    """The generation of the attention kernel."""
    name = _word(row, "attn_kernel")
    if "unfused" in name:
        return "unfused"
    if "flash_attention3" in name or "cudnn" in name:
        return "flash3"
    return "flash1" if "triton" in name or "xformers" in name else "flash2"


def _recompute(row: Row) -> str:
    word = _word(row, "recompute")
    return "full" if word.startswith("full") else "selective" if word.startswith(("selective", "llama")) else "none"


def _sharding(row: Row) -> str:
    mode = _word(row, "dp_mode")
    if mode.startswith(("fsdp", "zero3", "hsdp")):
        return "zero3"
    return mode[:5] if mode.startswith(("zero1", "zero2")) else "zero1" if mode.startswith("distopt") else "none"


def _network(row: Row) -> float | None:
    text = _word(row, "net_inter_gbit_per_gpu")
    try:
        return NETWORKS.get(text) or float(text)
    except ValueError:
        return None


def _word(row: Row, key: str) -> str:
    return (row.get(key) or "").strip().lower()


def _count(row: Row, key: str, default: int | None = None) -> int:
    text = _word(row, key)
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        raise RowError(f"{key} is empty" if not text else f"{key}={text!r} is no number") from None
    if value < 1 or value != int(value):
        raise RowError(f"{key}={text} is no whole number above 0")
    return int(value)
