"""Predict a table of layouts, published or wanted, with the columns of benchmarks/measurements/validate.csv.

    python benchmarks/planner_rows.py FILE.csv -o OUT.csv

The measured columns may be empty or absent; in the output they are called measured_*.  From the others it also follows
which program ran (`stack_of`), as programs differ in what they fuse, overlap and keep; a `stack` column with a row of
hardware.toml says it outright.  Rows that cannot be predicted are named on standard error, and the others still are.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megallama.commands.exit import exit_status  # noqa: E402
from megallama.config.errors import ConfigError  # noqa: E402
from megallama.forecast.forecast import job_bytes, predict  # noqa: E402
from megallama.forecast.hardware import Hardware, load_hardware  # noqa: E402
from megallama.forecast.job import Job  # noqa: E402

NEEDED = ("gpu", "layers", "hidden", "heads", "seq", "gpus", "global_batch_seqs")
WRITTEN = ("step_time_s", "tok_s_gpu", "tflops", "mem_gb", "fits", "flags")
GPUS = {"a100-40": "a100-40g", "a100": "a100-80g", "h200": "h200", "h100": "h100"}
KERNELS = {"unfused": "unfused", "attention3": "flash3", "cudnn": "flash3", "triton": "flash1", "xformers": "flash1"}
ENDS = {"zerobubble": (1, 1), "scaling": (1, 2), "scaling-rms": (1, 2)}  # modules before and after the layers
Row = Mapping[str, str | None]
_hardware = cache(load_hardware)


class RowError(Exception):
    """Why one row cannot be predicted."""


def main(argv: Sequence[str]) -> int:
    """Predict the table; 0, or 2 with the error on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, metavar="FILE.csv")
    parser.add_argument("-o", metavar="FILE", dest="out", help="default: standard output")
    args = parser.parse_args(argv)
    return exit_status(lambda: predict_table(args.table, args.out))


def predict_table(path: Path, out: str | None) -> int:
    """Predict every row of a table; 0. Raises: ConfigError if it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
            have = [c for c in reader.fieldnames or () if c]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if missing := [c for c in NEEDED if c not in have]:
        raise ConfigError(f"{path} has no column {', '.join(missing)}; it needs {', '.join(NEEDED)}")
    written = [[f"measured_{c}" if c in WRITTEN else c for c in have] + list(WRITTEN)]
    bad = 0
    for line, row in rows:
        try:
            job, hardware = job_of_row(row)
            p = predict(job, hardware)
            memory, tflops = job_bytes(job, hardware), p.mfu_full * hardware.gpu.peak_tflops
            numbers = (p.step_seconds, p.tokens_per_second, tflops, memory / 1e9)
            fits = str(int(memory <= p.memory_limit))
            new = [*(f"{v:.6g}" for v in numbers), fits, "; ".join([*assumed(row), *p.flags])]
        except RowError as error:
            bad += 1
            print(f"{path}, line {line}: not predicted: {error}", file=sys.stderr)
            new = [""] * (len(WRITTEN) - 1) + [f"not predicted: {error}"]
        written.append([row[c] or "" for c in have] + new)
    target = open(out, "w", encoding="utf-8", newline="") if out else sys.stdout
    csv.writer(target, lineterminator="\n").writerows(written)
    if out:
        target.close()
    print(f"{len(rows) - bad} of {len(rows)} rows predicted", file=sys.stderr)
    return 0


def job_of_row(row: Row) -> tuple[Job, Hardware]:
    """The job and the hardware that a row describes. Raises: RowError saying which column is wrong."""
    hardware = hardware_of(row)
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
    ends = ENDS.get(stack, (0, 0)) if pp > 1 else (0, 0)
    split = evenly(layers, pp * chunks, *ends) or evenly(layers, pp * chunks)
    gated, recompute = _word(row, "gated") in ("1", "true"), _word(row, "recompute")
    job = Job(
        layers, hidden, _count(row, "ffn", 4 * hidden), gated, heads, hidden,
        _count(row, "kv_heads", heads) * (hidden // heads),
        _count(row, "vocab", 50304), _count(row, "seq"), gpus, tp, pp, dp, micro, batch // (dp * micro), split,
        cp=cp, chunks=chunks,
        schedule=schedule if schedule in ("gpipe", "csv") or schedule[:2] in ("zb", "v-", "du") else "1f1b",
        recompute="full" if recompute == "full" else "selective" if recompute[:5] in ("selec", "llama") else "none",
        sequence_parallel=_word(row, "sp") in ("1", "true") and tp > 1, sharding=_sharding(row), tied=not gated,
        fp8=_word(row, "dtype") == "fp8", kernel=_first(KERNELS, _word(row, "attn_kernel")) or "flash2", stack=stack,
        network_gbit=_network(row),
    )  # fmt: skip
    return job, hardware


def evenly(layers: int, stages: int, before: int = 0, after: int = 0) -> tuple[int, ...]:
    """Layers of each stage where a program shares out modules, surplus first: embedding, layers, norm and head.

    None at all where the first or the last stage has less than `before` or `after` modules.
    """
    low, surplus = divmod(layers + before + after, stages)
    modules = [low + (s < surplus) for s in range(stages)]
    if modules[0] < before or modules[-1] < after:
        return ()
    modules[0] -= before
    modules[-1] -= after
    return tuple(modules)


def assumed(row: Row) -> list[str]:
    """What a row leaves open and the prediction depends on."""
    vpp = {"vpp": 1 + _word(row, "schedule").endswith("interleaved")} if _count(row, "pp", 1) > 1 else {}
    used = ({"micro_batch": 1, "vocab": 50304} | vpp).items()
    return [f"{key}={value} is assumed" for key, value in used if not _word(row, key)]


def hardware_of(row: Row) -> Hardware:
    """The kind of GPU that a row names. Raises: RowError if we have no constants for it."""
    if (kind := _first(GPUS, _word(row, "gpu"))) is None:
        raise RowError(f"gpu={row.get('gpu')!r} is not among A100, H100, H200")
    return _hardware(kind)


def stack_of(row: Row) -> str:
    """The program that ran, as a row of hardware.toml."""
    stacks = hardware_of(row).stacks
    if named := _word(row, "stack"):
        if named not in stacks:
            raise RowError(f"stack={named} is unknown; use {', '.join(stacks)}")
        return named
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
