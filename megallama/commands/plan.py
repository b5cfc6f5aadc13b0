"""What a run will do, before it starts: `megallama plan [CONFIG.toml] ranks=N [section.key=value ...]`.

Prints layers and parameters per stage, batch arithmetic, memory per rank, the pipeline's bubble, and the predicted
time, speed, length, energy and CO2 on a kind of GPU. Needs neither torch nor a GPU. Exit status 2: errors, all printed.

`--data` prints what the run takes from each source instead (ranks=N may be left out): its size (of the files, else
num_tokens), its share in every phase of the mixture, tokens used, epochs, and the step at which max_epochs ends it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megallama.analysis.communication import behind, collectives, communication_table
from megallama.commands.parser import Parser
from megallama.config.errors import ConfigError, counted
from megallama.config.load import load
from megallama.forecast.forecast import CO2_KG_PER_KWH, GIB, PUE, Forecast, by_phase, phases, search, seconds_by_cause
from megallama.forecast.hardware import load_hardware
from megallama.plan.copies import copies
from megallama.plan.plan import make_plan

UNAVOIDABLE = ("matrices", "attention", "head and loss")


def run(argv: Sequence[str]) -> int:
    """Print one plan, or a search's findings. Raises: MegallamaError."""
    parser = Parser("plan", __doc__, config=True, named=["ranks", "hardware", "kernel"])
    kinds = "a100-80g, h100, h200 or a FILE.toml (default a100-80g); also hardware=KIND"
    parser.add_argument("--hardware", action="append", metavar="KIND", help=kinds)
    kernels = "of attention: unfused, flash1, flash2 or flash3 (default: the hardware's); also kernel=NAME"
    parser.add_argument("--kernel", action="append", metavar="NAME", help=kernels)
    parser.add_argument("--json", action="store_true", help="the whole plan as JSON")
    parser.add_argument("--search", action="store_true", help="the ten fastest layouts of this model and batch")
    parser.add_argument("--data", action="store_true", help="what the run takes from each source")
    for moved in ("--rows", "-o"):
        parser.add_argument(moved, help=argparse.SUPPRESS)
    args = parser.read(argv)
    if args.rows or args.o:
        table = f"{args.rows or 'FILE.csv'} -o {args.o or 'OUT.csv'}"
        raise ConfigError(f"tables of layouts have a program of their own: python benchmarks/planner_rows.py {table}")
    if args.data:
        return data(*parser.config_of(args), as_json=args.json)
    file, ranks, overrides = parser.run_of(args, "the plan")
    hardware = load_hardware((args.hardware or ["a100-80g"])[-1])
    kernel = (args.kernel or ["flash3" if hardware.gpu.peak_tflops > 400 else "flash2"])[-1]
    if kernel not in hardware.kernels:
        raise ConfigError(f"kernel={kernel} is unknown; use {', '.join(hardware.kernels)}")
    config = load(file, overrides, ranks=None if args.search else ranks, need_data=False, begun=behind)
    if args.search:
        best, legal, too_large = search(config, ranks, hardware, kernel)
        on = hardware.name if args.hardware else f"{hardware.name} (assumed; hardware=KIND for others)"
        print(f"{counted(legal, 'legal layout', ',')} of {counted(ranks, 'rank')} on {on}, "
              f"{too_large:,} too large for {hardware.gpu.memory_gib:.0f} GiB; predicted to be fastest:")  # fmt: skip
        for number, f in enumerate(best, 1):
            p = f.prediction
            speed = f"{p.tokens_per_second:,.0f} tokens/s per GPU, {few(p.step_seconds, 3)} s a step"
            share = f"MFU {few(100 * p.mfu_full, 1)}%, {max(f.peaks) / GIB:.1f} GiB"
            print(f"{number:>2}. {speed}, {share}\n    {settings_of(f)}\n    limited by {limits(f)}")
        return 0
    found = by_phase(replace(make_plan(config, ranks), behind=behind(config)), hardware, kernel)
    made = (outlook := max(found, key=lambda f: max(f.peaks))).plan
    if args.json:
        each = {"phases": [as_dict(f) for f in found]} if len(found) > 1 else {}
        print(json.dumps(as_dict(outlook) | {"hardware_assumed": not args.hardware} | each, indent=1))
    else:
        table = communication_table(made.config, made.topology, made.stages, made.schedule)
        table = table if ranks > 1 else "one rank communicates nothing"
        whose = "GPUs" if args.hardware else "GPUs are assumed; hardware=KIND plans for others"
        print(f"hardware   {hardware.name} {whose}. This machine is not looked at")
        first = phases(found) + "\n\n" if config.train.phases else ""
        print(first + "\n\n".join((str(made), table, text(outlook))))
    return 0


def few(number: float, digits: int = 0) -> str:
    """A number with `digits` decimals, and of one below 1 two digits that say something: 833,577, 16.9, 0.00014."""
    return f"{number:,.{digits}f}" if number >= 1 or not number else f"{number:.2g}"


def limits(f: Forecast) -> str:
    """The four largest causes that another layout might have less of."""
    causes = {k: v / f.prediction.step_seconds for k, v in f.prediction.causes.items() if k not in UNAVOIDABLE}
    return ", ".join(f"{k} {v:.1%}" for k, v in sorted(causes.items(), key=lambda kv: -kv[1])[:4])


def settings_of(f: Forecast) -> str:
    """The settings of a layout, as one would type them."""
    c, p = f.plan.config, f.plan.config.parallel
    words = [f"parallel.tp={p.tp}", f"parallel.pp={p.pp}"]
    words += [f"parallel.cp={p.cp}", f"parallel.cp_exchange={p.cp_exchange}"] * (p.cp > 1)
    if p.pp > 1:
        words += [f"parallel.chunks={p.chunks}"] * (p.chunks > 1) + [f"parallel.schedule={p.schedule}"]
    if p.tp > 1:
        words.append(f"parallel.sequence_parallel={str(p.sequence_parallel).lower()}")
    words += [f"batch.micro_batch_size={c.batch.micro_batch_size}", f"memory.recompute={c.memory.recompute}"]
    return " ".join(words)


def as_dict(f: Forecast) -> dict[str, Any]:
    """The whole plan for programs: only numbers, texts, lists and tables."""
    plan, p, schedule, pipeline = f.plan, f.prediction, f.plan.schedule, f.pipeline
    parts = plan.config, plan.topology, plan.stages, schedule
    return {
        "config": plan.config.model_dump(mode="json"),
        "ranks": plan.topology.world_size,
        "topology": {a: plan.topology.size(a) for a in ("tp", "cp", "pp", "dp") if a != "cp" or plan.topology.cp > 1},
        "stages": [{"rank": schedule.owners[s], "layers": list(layers)} for s, layers in enumerate(plan.stages)],
        "schedule": {
            "name": schedule.name, "micro_batches": schedule.num_microbatches, "bubble": pipeline.bubble,
            "peak_in_flight": list(pipeline.peak_in_flight),
        },
        "memory_bytes": [{**asdict(plan.memory(r)), "buffers": f.buffers, "peak": f.peaks[r]} for r in range(f.job.pp)],
        "collectives": [[{**asdict(c), "bytes": c.nbytes} for c in collectives(*parts, r)] for r in range(f.job.pp)],
        "memory_limit_bytes": p.memory_limit,
        "fits": f.fits,
        "hardware": f.hardware.name,
        "kernel": f.job.kernel,
        "step_seconds": p.step_seconds,
        "seconds_by_cause": p.causes,
        "tokens_per_second_per_gpu": p.tokens_per_second,
        **{k: getattr(p, k) for k in ("mfu_full", "mfu_causal", "hfu")},
        **{k: getattr(f, k) for k in ("tokens", "days", "gpu_hours", "mwh", "tonnes_co2")},
        "flags": list(p.flags),
    }  # fmt: skip


def text(f: Forecast) -> str:
    """What comes below the plan's page."""
    step, lines = f.prediction.step_seconds, [*(f"{name:<10} {words}" for name, words in _lines(f)), ""]
    for cause, seconds in sorted(f.prediction.causes.items(), key=lambda kv: -kv[1]):
        if seconds > 5e-4 * step:
            lines.append(f"{cause:>16}  {few(seconds, 3):>8} s  {seconds / step:6.1%}")
    return "\n".join(lines)


def _lines(f: Forecast) -> Iterator[tuple[str, str]]:
    p, room = f.prediction, f.prediction.memory_limit / GIB
    m = f.plan.memory(worst := max(range(f.job.pp), key=f.peaks.__getitem__))
    verdict = "fits" if f.fits else f"DOES NOT FIT, {max(f.peaks) / GIB - room:.1f} GiB too much"
    parts = {"weights": m.weights, "main gradients": m.main_grads, "optimizer shard": m.optimizer,
             "activations": m.activations, "logits": m.logits, "buffers": f.buffers}  # fmt: skip
    shares = [few(100 * share, 1) for share in (p.mfu_full, p.mfu_causal, p.hfu)]
    yield "memory", f"peak {max(f.peaks) / GIB:.2f} GiB on pipeline rank {worst}, of {room:.1f} GiB: {verdict}"
    yield "", ", ".join(f"{k} {few(v / GIB, 2)}" for k, v in parts.items())
    yield "hardware", f"{f.hardware.name}, attention kernel {f.job.kernel}; what follows is predicted, not measured"
    yield "step", (f"{few(p.step_seconds, 3)} s, {p.tokens_per_second:,.0f} tokens/s per GPU, "
                   f"{p.tokens_per_second * f.job.gpus:,.0f} in all")  # fmt: skip
    yield "", f"MFU {shares[0]}% (full attention), {shares[1]}% (causal); HFU {shares[2]}%"
    yield from _exchanges(f)
    yield "pipeline", f"ranks idle {f.pipeline.bubble:.1%} of its {few(f.pipeline.makespan, 3)} s with these times"
    yield "run", f"{few(f.days, 1)} days, {few(f.gpu_hours)} GPU-hours for {counted(f.tokens, 'token', ',')}"
    yield "energy", (f"{few(f.mwh)} MWh, {few(f.tonnes_co2)} t CO2 ({f.hardware.gpu.watts:.0f} W per GPU, "
                     f"PUE {PUE}, {CO2_KG_PER_KWH} kg/kWh)")  # fmt: skip
    yield from copies(f.plan, f.hardware.gpu.gpus_per_node, p.step_seconds)
    yield from (("extrapolated", f"outside what the constants were fitted on: {flag}") for flag in p.flags)


def _exchanges(f: Forecast) -> Iterator[tuple[str, str]]:
    """Of each exchange of context parallelism: what a rank sends, receives, and the step's time."""
    plan, cp = f.plan, f.job.cp
    for kind in ("gather", "heads")[: (cp > 1) * (1 + (f.job.local_heads[0] % cp == 0))]:
        own = plan.config.changed(parallel={"cp_exchange": kind})
        calls = collectives(own, plan.topology, plan.stages, plan.schedule, 0)
        each = few(sum(c.nbytes for c in calls if c.axis == "cp") * (cp - 1) / cp / GIB, 2)
        seconds = sum(seconds_by_cause(replace(f.job, exchange=kind), f.hardware).values())
        yield "exchange", f"{kind}: {each} GiB each way and step, a step of {few(seconds, 3)} s"


def data(file: Path | None, overrides: Sequence[str], *, as_json: bool) -> int:
    """Print what the run of a configuration takes from each source. Raises: MegallamaError."""
    from megallama.analysis.sources import source_shares  # and numpy, which no other plan needs

    config = load(file, overrides)
    if config.data.synthetic:
        raise ConfigError("data.synthetic=true takes nothing from any source; write data.train")
    rows, at, sizes = source_shares(config)
    if as_json:
        print(json.dumps({"phases": at, "sources": rows}))
        return 0
    lines = [["source", "tokens", *(f"share from step {n:,}" for n in at), "used tokens", "epochs", "max", "last step"]]
    for row in rows:
        size = f"{row['tokens']:,}{'' if row['measured'] else '*'}"
        shares = [f"{100 * share:.2f} %" for share in row["shares"]]
        cap = ["" if (x := row[k]) is None else f"{x:{f}}" for k, f in (("max_epochs", "g"), ("last_step", ","))]
        lines.append([row["source"], size, *shares, f"{row['used_tokens']:,}", f"{row['epochs']:.2f}", *cap])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    samples, tokens = sum(n for n, _ in sizes), sum(n * length for n, length in sizes)
    lengths = ", ".join(str(length) for _, length in sizes)
    size = f"{counted(samples, 'sample', ',')} of {lengths} = {counted(tokens, 'token', ',')}"
    out = [f"{counted(config.train.steps, 'step', ',')}, {size}", ""]
    for name, *cells in lines:
        out.append("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip())
    if not all(row["measured"] for row in rows):
        out += ["", "* num_tokens of the configuration; the files are not here"]
    if over := [row["last_step"] for row in rows if row["last_step"] is not None]:
        what = "refused" if config.data.on_exhausted == "error" else f"over after step {min(over):,}"
        out += ["", f'with data.on_exhausted="{config.data.on_exhausted}" this run is {what}']
    print(*out, sep="\n")
    return 0
