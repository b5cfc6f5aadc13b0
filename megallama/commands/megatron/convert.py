"""From Megatron's flags to our settings: what each means, and where the programs differ."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from megallama.commands.megatron.flags import LLAMA, TABLE, Flags, parse
from megallama.config.describe import literal, settings
from megallama.config.errors import ConfigError, counted
from megallama.config.load import load
from megallama.config.schema import BatchConfig, Config
from megallama.plan.params import num_parameters

CHUNKS = ("num-layers-per-virtual-pipeline-stage", "num-virtual-stages-per-pipeline-rank")
ENDS = ("decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers")


def convert(flags: Flags, name: str) -> tuple[Config, dict[str, Any]]:
    """The configuration, and the settings that were said. Raises: ConfigError with all problems."""
    out: dict[str, Any] = {"run.folder": f"runs/{name}"}
    if not flags.lost:  # without all flags little can be said
        out |= {row.why: flags[flag] for flag, row in TABLE.items() if row.direct}
        for part in (model, layout, batch, steps, data, saves):
            part(flags, out)
    if flags.problems:
        many = "\n".join(f"  - {p}" for p in flags.problems)
        raise ConfigError(f"{counted(len(flags.problems), 'problem')} on Megatron's command line:\n{many}")
    said = {key: value for key, value in out.items() if value is not None}
    return load(None, [f"{k}={literal(v)}" for k, v in said.items()], ranks=flags.ranks, need_data=False), said


def model(flags: Flags, out: dict[str, Any]) -> None:
    """[model]; flags whose absence asks for GPT's parts are missed."""
    for name in (name for name, row in TABLE.items() if row.why == LLAMA):
        flags[name]
    h, heads, width = flags["hidden-size"] or 0, flags["num-attention-heads"] or 0, flags["kv-channels"]
    groups = flags["num-query-groups"] if flags["group-query-attention"] else heads
    out["model.num_kv_heads"] = flags["num-key-value-heads"] or groups
    out["model.head_dim"] = width if width and width * heads != h else None
    out["model.ffn_hidden_size"] = flags["ffn-hidden-size"] or int(h * 4 * 2 / 3 / 64) * 64  # as Megatron
    out["model.rope_scaling.factor"] = flags["rope-scaling-factor"] if flags["use-rope-scaling"] else None
    out["model.tie_embeddings"] = not flags["untie-embeddings-and-output-weights"]
    out["model.vocab_size"] = flags["padded-vocab-size"] or flags["vocab-size"]


def layout(flags: Flags, out: dict[str, Any]) -> None:
    """[parallel] and [memory]."""
    layers, tp, pp = flags["num-layers"] or 0, out["parallel.tp"], out["parallel.pp"]
    per, chunks = (flags[name] for name in CHUNKS)
    if per:
        chunks = max(1, layers // (pp * per))
        what = f"times {pp} stages it does not divide --num-layers {layers}"
        write = f"write a divisor of {layers // pp}"
        flags.problem(f"--{CHUNKS[0]} {per}: {what}; {write}", when=layers % (pp * per))
    first, last = (flags[name] for name in ENDS)
    stages = pp - (first is not None) - (last is not None)
    rest = layers - (first or 0) - (last or 0)
    if stages < pp and ((chunks or 1) > 1 or stages < 1 or rest < 0 or rest % stages):
        ends = ", ".join(flags.given[name] for name in ENDS if name in flags.given)
        write = "leave them aside by --without, and write parallel.stage_layers into the TOML"
        flags.problem(f"{ends}: layers left for {counted(stages, 'stage')}: {rest}; {write}")
    elif stages < pp:
        out["parallel.stage_layers"] = [n for n in (first, *[rest // stages] * stages, last) if n is not None]
    out["parallel.chunks"] = chunks
    out["parallel.sequence_parallel"] = flags["sequence-parallel"] and tp > 1
    out["parallel.schedule"] = "1f1b" if pp > 1 else None
    out["parallel.rank_order"] = "tp-cp-pp-dp" if flags["use-tp-pp-dp-mapping"] else None
    out["memory.recompute"] = flags["recompute-granularity"] or "none"


def batch(flags: Flags, out: dict[str, Any]) -> None:
    """[batch] and [precision]."""
    micro, size = flags["micro-batch-size"], flags["global-batch-size"]
    if size is None and micro and flags.ranks:
        size = micro * max(1, flags.ranks // (out["parallel.tp"] * out["parallel.pp"] * out["parallel.cp"]))
        flags.note(f"--global-batch-size is absent: one micro-batch per replica (ranks: {flags.ranks}) is {size}")
    elif "global-batch-size" not in flags.values:
        write = "give --ranks N, or append -- --global-batch-size N"
        flags.problem(f"--global-batch-size is absent: Megatron takes micro-batch x data parallel size; {write}")
    out["batch.global_batch_size"] = size
    if ramp := [parse("size", [word]) for word in flags["rampup-batch-size"] or []]:
        keys = ("batch.ramp_start", "batch.ramp_increment", "batch.ramp_samples")
        out |= dict(zip(keys, ramp, strict=False))
        what = "three whole numbers are needed: first size, growth, samples"
        flags.problem(f"{flags.given['rampup-batch-size']}: {what}", when=len(ramp) != 3 or None in ramp)
    bf16, fp16 = flags["bf16"], flags["fp16"]
    flags.problem("--bf16 and --fp16: give one of them", when=bf16 and fp16)
    out["precision.dtype"] = "bf16" if bf16 else "fp16" if fp16 else "fp32"
    out["precision.initial_loss_scale"] = flags["initial-loss-scale"] if fp16 else None
    flags.note("the fp16 loss scale never falls below 1 here", when=fp16 and flags["min-loss-scale"] != 1)
    out["precision.loss_scale_window"] = flags["loss-scale-window"] if fp16 else None


def amount(flags: Flags, out: dict[str, Any], stem: str) -> int | None:
    """Steps from --STEM-iters or --STEM-samples: whole ones, as Megatron counts; the rest is told."""
    iters, samples = f"{stem}-iters", flags[f"{stem}-samples"]
    steps: int | None = flags[iters] if samples is None or iters in flags.values else None
    both = f"--{iters} {steps} and --{stem}-samples {samples}: give one of them"
    flags.problem(both, when=steps and samples)
    sizes = {key.partition(".")[2]: n for key, n in out.items() if key.startswith("batch.") and n is not None}
    if steps or samples is None or flags.problems:
        return steps
    batch = BatchConfig(**sizes)
    steps = bisect_right(range(samples + 1), samples, key=batch.samples_after) - 1
    if rest := samples - batch.samples_after(steps):
        count = f"{counted(steps, 'step', ',')} and {counted(rest, 'sample', ',')}"
        flags.note(f"--{stem}-samples {samples:,} is {count}; the steps are taken")
    return steps


def steps(flags: Flags, out: dict[str, Any]) -> None:
    """[train] steps and [lr_schedule]."""
    lr, low, style = flags["lr"], flags["min-lr"], flags["lr-decay-style"]
    total, decay, warmup = (amount(flags, out, stem) for stem in ("train", "lr-decay", "lr-warmup"))
    if (share := flags["lr-warmup-fraction"]) is not None:
        both = f"--lr-warmup-fraction {share:g} and --lr-warmup-iters or -samples: give one of them"
        flags.problem(both, when=warmup)
        warmup = int(round(share * (decay or total or 0), 6))
    out |= {"train.steps": total, "lr_schedule.decay_steps": decay, "lr_schedule.warmup_steps": warmup or 0}
    out["lr_schedule.min_ratio"] = float(f"{low / lr:.12g}") if lr else None
    flags.problem(f"--min-lr {low:g} is above --lr {lr or 0:g}; write at most this", when=lr and low > lr)
    out["lr_schedule.kind"] = "wsd" if style == "linear" else style.lower()
    out["lr_schedule.wsd_decay_steps"] = 0 if style == "linear" else None  # from the end of the warm-up
    if style == "WSD":
        last = flags["lr-wsd-decay-style"]
        out["lr_schedule.wsd_decay_steps"] = amount(flags, out, "lr-wsd-decay")
        flags.problem(f"--lr-wsd-decay-style {last}: write linear, as it is here", when=last != "linear")


def data(flags: Flags, out: dict[str, Any]) -> None:
    """[data] and evaluation."""
    reset, masked = {flags["reset-position-ids"], flags["reset-attention-mask"]}, flags["eod-mask-loss"]
    what = "--reset-position-ids, --reset-attention-mask and --eod-mask-loss are one setting, data.document_mask"
    write = "give the first two, all three, or none (--without)"
    flags.problem(f"{what}; {write}", when=len(reset) > 1 or (masked and not any(reset)))
    what = "Megatron still predicts the first token of a document; data.document_mask leaves it out"
    flags.note(f"without --eod-mask-loss {what}", when=any(reset) and not masked)
    mock, iters = flags["mock-data"], flags["eval-iters"]
    out["data.document_mask"] = all(reset) or None
    if not mock:
        sources(flags, out)
        out["data.tokenizer"] = flags["tokenizer-model"] or flags["vocab-file"]
    valid = iters > 0 and bool(mock or "data.valid" in out)
    out["eval.interval"] = flags["eval-interval"] if valid else 0
    out["eval.batches"] = iters if valid else None
    flags.note("--eval-iters without validation data; eval.interval=0", when=iters > 0 and not valid)


def sources(flags: Flags, out: dict[str, Any]) -> None:
    """Where the tokens come from: paths for each use, or shares of the documents of --data-path."""
    blend, split, first = flags["data-path"], flags["split"], 0.0
    parts = [parse("float", [part]) for part in split.replace("/", ",").split(",")] + [0.0, 0.0]
    if not 3 <= len(parts) <= 5 or None in parts or min(parts) < 0 or not sum(parts):
        flags.problem(f"--split {split}: up to three numbers are needed, for example --split 99,1,0")
        return
    for key, part in zip(("train", "valid", "test"), parts, strict=False):
        share, own = part / sum(parts) if blend else 0.0, flags[f"{key}-data-path"]
        span = {"documents": [round(first, 9), round(first + share, 9)]} if share < 1 else {}
        first += share
        if own or (share and key != "test"):
            out[f"data.{key}"] = tables(flags, own or blend, {} if own else span)
        elif share:
            flags.note(f"the last {100 * share:.4g} % of the documents stay unread; they are for data.test")
    write = "write data.train before it runs, or data.synthetic=true"
    flags.note(f"no --data-path: {write}", when="data.train" not in out)


def tables(flags: Flags, words: Sequence[str], span: dict[str, Any]) -> list[Any]:
    """Paths, or tables with weights and the documents that are used."""
    weights, paths = [parse("float", [word]) for word in words[::2]], words[1::2]
    if len(weights) != len(paths) or None in weights:
        weights, paths = [1.0 for _ in words], words
        what = "Megatron weighs by size, here they are equal until you write weights"
        flags.note(f"--data-path without weights: {what}", when=len(words) > 1)
    weighted = [{"weight": weight} if len(paths) > 1 else {} for weight in weights]
    made = [{"path": path} | weight | span for path, weight in zip(paths, weighted, strict=True)]
    return [table["path"] if len(table) == 1 else table for table in made]


def saves(flags: Flags, out: dict[str, Any]) -> None:
    """[train], [checkpoint], [log] and [run]."""
    save, source, project = flags["save"], flags["load"], flags["wandb-project"]
    out["train.stop_after_steps"] = flags["exit-interval"] or None
    out["checkpoint.folder"] = save
    out["checkpoint.interval"] = (flags["save-interval"] or 0) if save else 0
    out["checkpoint.keep_every"] = (flags["save-retain-interval"] or None) if save else None
    flags.note(f"no --save: one checkpoint at the end, in {out['run.folder']}/checkpoints", when=not save)
    what = "weights of Megatron become ours by megallama convert; then write checkpoint.weights_from=FOLDER"
    flags.note(f"--load {source}: {what}", when=source and source != save)
    out |= {"log.wandb_project": project or None, "log.wandb": True if project else None}
    out["run.timeout_seconds"] = 60.0 * (flags["distributed-timeout-minutes"] or 0) or None


def to_toml(said: dict[str, Any], heading: Sequence[str]) -> str:
    """The settings that were said as a TOML file, under a heading of comments."""
    lines = [f"# {line}".rstrip() for line in heading]
    keys = [setting.key for setting in settings() if setting.key in said]
    for section, group in groupby(keys, lambda key: key.partition(".")[0]):
        lines += ["", f"[{section}]", *(f"{key.partition('.')[2]} = {literal(said[key])}" for key in group)]
    return "\n".join(lines) + "\n"


def summary(config: Config) -> str:
    """One line: parameters, batch, tokens."""
    b, steps = config.batch, config.train.steps
    batch = f"{b.global_batch_size} x {b.seq_length} = {b.global_batch_size * b.seq_length:,} tokens per step"
    total = f"{counted(steps, 'step', ',')}, {b.samples_after(steps) * b.seq_length:,} tokens"
    return f"{num_parameters(config.model):,} parameters; {batch}; {total}"
