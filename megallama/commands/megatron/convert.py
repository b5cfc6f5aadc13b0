"""From Megatron's flags to our settings: what each means here, and where the two programs differ."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any

from megallama.commands.megatron.flags import SETTINGS, Flags
from megallama.config.describe import literal, settings
from megallama.config.errors import ConfigError, MegallamaError, counted
from megallama.config.load import load
from megallama.config.presets import PRESETS
from megallama.config.schema import BatchConfig, Config
from megallama.plan.params import num_parameters

LLAMA = (  # flag, its value for a LLaMA, what a LLaMA has, what Megatron has without the flag
    ("normalization", "RMSNorm", "RMSNorm", "LayerNorm"),
    ("position-embedding-type", "rope", "rotary positions", "learned positions"),
    ("swiglu", "", "SwiGLU", "GELU"),
    ("disable-bias-linear", "", "no biases", "biases in every linear layer"),
    ("hidden-dropout", "0", "no dropout", "0.1"),
    ("attention-dropout", "0", "no dropout", "0.1"),
)
NEEDED = {
    "hidden-size": "the width of the model",
    "num-layers": "the number of layers",
    "num-attention-heads": "the number of attention heads",
    "micro-batch-size": "sequences of one forward",
    "seq-length": "tokens of a sequence",
    "lr": "the learning rate",
}
SHAPE = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size")
ENDS = ("decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers")


def convert(flags: Flags, name: str) -> tuple[Config, dict[str, Any]]:
    """The configuration, and the settings that were said. Raises: ConfigError with every problem at once."""
    out: dict[str, Any] = {"run.folder": f"runs/{name}"}
    if not flags.lost:  # without values little can be said
        for part in (architecture, model, layout, batch, steps, data, saves):
            part(flags, out)
        for setting, names in SETTINGS.items():  # what is one flag there and one setting here
            if setting not in out and " " not in names:
                out[setting] = flags[names.partition(":")[0].partition("|")[0]]
    if flags.problems:
        many = "\n".join(f"  - {p}" for p in flags.problems)
        raise ConfigError(f"{counted(len(flags.problems), 'problem')} on Megatron's command line:\n{many}")
    said = {key: value for key, value in out.items() if value is not None}
    try:
        overrides = [f"{key}={literal(value)}" for key, value in said.items()]
        return load(None, overrides, ranks=flags.ranks, need_data=False), said
    except ConfigError as error:
        raise ConfigError(f"Megatron's flags as our settings: {error}") from None


def architecture(flags: Flags, out: dict[str, Any]) -> None:
    """Refuse what is not a LLaMA, where absent flags stand for GPT's parts; ask for what Megatron needs too."""
    for name, right, what, other in LLAMA:
        value, given, write = flags[name], flags.given.pop(name, None), f"write --{name} {right}".rstrip()
        if name.startswith("pos") and (flags["use-rotary-position-embeddings"] or value == "rotary"):
            value, given = "rope", given or flags.given.pop("use-rotary-position-embeddings")
        shown = f"{value:g}" if isinstance(value, float) else "" if value is True else str(value)
        if shown.lower() == right.lower():
            flags.implied.append((given or f"--{name}", f"LLaMA has {what}"))
        elif given and flags.values.get(name, value) is None:
            continue  # its value is none, which has been said
        elif given:
            flags.problem(f"--{name} {shown}: LLaMA has {what}; {write}")
        else:
            write = write.replace("write", "append --")
            flags.problem(f"--{name} is absent, which means {other}; LLaMA has {what}: {write}")
    for name, what in NEEDED.items():
        absent = flags[name] is None and f"--{name} " not in " ".join(flags.problems)
        flags.problem(f"--{name} is missing ({what}); append it: -- --{name} N", when=absent)
    cp = flags["context-parallel-size"]
    more = "write 1, and more --tensor-model-parallel-size with --sequence-parallel for long sequences"
    flags.problem(f"--context-parallel-size {cp}: there is no context parallelism; {more}", when=cp > 1)


def model(flags: Flags, out: dict[str, Any]) -> None:
    """[model]; its vocabulary is said, or that of the tokenizer where its file is here."""
    h, heads, width = flags["hidden-size"], flags["num-attention-heads"], flags["kv-channels"]
    kv = out["model.num_kv_heads"] = flags["num-query-groups"] if flags["group-query-attention"] else heads
    if kv != flags.values.get("num-query-groups", kv):
        only = "counts in Megatron only with --group-query-attention, which is absent"
        flags.note(f"{flags.given['num-query-groups']} {only}: model.num_kv_heads={kv}")
    out["model.head_dim"] = width if width and h and heads and width * heads != h else None
    if flags["ffn-hidden-size"] is None and h:
        ffn = out["model.ffn_hidden_size"] = int(h * 4 * 2 / 3 / 64) * 64
        flags.note(f"--ffn-hidden-size is absent: Megatron takes int(8/3 x {h} / 64) x 64 = {ffn} with --swiglu")
    out["model.rope_scaling.factor"] = flags["rope-scaling-factor"] if flags["use-rope-scaling"] else None
    untied = flags["untie-embeddings-and-output-weights"]
    out["model.tie_embeddings"] = not untied
    if padded := flags["padded-vocab-size"]:
        out["model.vocab_size"] = padded
        flags.note(f"--padded-vocab-size {padded}: the model gets as many rows, padding included")
        return
    size, file = flags["vocab-size"], flags["tokenizer-model"] or flags["vocab-file"]
    if size is None and file and Path(file).exists():
        from megallama.data.tokenizer import load_tokenizer

        try:
            size = load_tokenizer(file).vocab_size
            flags.note(f"model.vocab_size={size} is that of {file}")
        except MegallamaError as error:
            flags.problem(str(error))
    elif size is None:
        where = f"the tokenizer {file} is not here" if file else "no tokenizer is named"
        ids = "LLaMA 1 and 2 have 32000 ids, LLaMA 3 128256"
        flags.problem(f"--vocab-size is absent and {where}; {ids}: append -- --vocab-size N")
    out["model.vocab_size"] = size
    rows = -(size or 0) % (flags["make-vocab-size-divisible-by"] * flags["tensor-model-parallel-size"])
    if rows:
        padding = f"{size + rows:,} rows, {rows * (h or 0) * (1 + untied):,} parameters more"
        more = f"{log((size + rows) / size):.4f} more at the start"
        flags.note(
            f"Megatron pads the vocabulary to {padding}, which take part in its loss ({more}); here it is {size:,}"
        )
    if flags["tokenizer-type"] == "NullTokenizer" and size:
        flags.note(f"NullTokenizer adds one id to --vocab-size {size}; here it is {size:,}")


def layout(flags: Flags, out: dict[str, Any]) -> None:
    """[parallel] and [memory]."""
    layers, pp = flags["num-layers"] or 0, flags["pipeline-model-parallel-size"]
    chunks = flags["num-virtual-stages-per-pipeline-rank"]
    if per := flags["num-layers-per-virtual-pipeline-stage"]:
        chunks = max(1, layers // (pp * per))
        product = f"--num-layers-per-virtual-pipeline-stage {per} x --pipeline-model-parallel-size {pp}"
        what = f"{per * pp} does not divide --num-layers {layers}; write a divisor of {layers // pp}"
        flags.problem(f"{product} = {what}", when=layers % (pp * per))
    ends = {name: flags[name] for name in ENDS}
    said = {name: count for name, count in ends.items() if count is not None}
    rest, stages = layers - sum(said.values()), pp - len(said)
    if said and ((chunks or 1) > 1 or stages < 1 or rest < 0 or rest % stages):
        shown = ", ".join(f"--{name} {count}" for name, count in said.items())
        write = f"write parallel.stage_layers into the TOML instead (--without {','.join(said)})"
        flags.problem(f"{shown}: layers left for {counted(stages, 'stage')}: {rest}; {write}")
    elif said:
        first, last = ends.values()
        out["parallel.stage_layers"] = [n for n in (first, *[rest // stages] * stages, last) if n is not None]
    sequence = flags["sequence-parallel"] and flags["tensor-model-parallel-size"] > 1
    out |= {"parallel.chunks": chunks, "parallel.sequence_parallel": sequence}
    out["parallel.schedule"] = "1f1b" if pp > 1 else None
    out["parallel.rank_order"] = "tp-cp-pp-dp" if flags["use-tp-pp-dp-mapping"] else None
    how = "selective" if flags["recompute-activations"] else flags["recompute-granularity"] or "none"
    how = out["memory.recompute"] = "full" if flags["checkpoint-activations"] else how
    if how not in ("none", "full", "selective"):
        flags.problem(f"--recompute-granularity {how}; write full or selective")
    elif how == "none":
        flags.note('memory.recompute="none" as in Megatron; "selective" keeps 29 % less at little cost')


def batch(flags: Flags, out: dict[str, Any]) -> None:
    """[batch] and [precision]."""
    micro, size, ranks = flags["micro-batch-size"], flags["global-batch-size"], flags.ranks
    if size is None and micro and ranks:
        size = micro * max(1, ranks // (flags["tensor-model-parallel-size"] * flags["pipeline-model-parallel-size"]))
        flags.note(f"--global-batch-size is absent: one micro-batch per replica (ranks: {ranks}) is {size}")
    elif size is None and micro:
        write = "give --ranks N, or append -- --global-batch-size N"
        flags.problem(f"--global-batch-size is absent: Megatron takes micro-batch x data parallel size; {write}")
    out |= {"batch.micro_batch_size": micro, "batch.global_batch_size": size}
    ramp = flags["rampup-batch-size"] or []
    if len(ramp) == 3 and all(word.isdecimal() for word in ramp):
        keys = ("batch.ramp_start", "batch.ramp_increment", "batch.ramp_samples")
        out |= dict(zip(keys, map(int, ramp), strict=True))
    elif ramp:
        what = "three whole numbers are needed: first size, growth, samples"
        flags.problem(f"--rampup-batch-size {' '.join(ramp)}: {what}")
    bf16, fp16, least = flags["bf16"], flags["fp16"], 1
    flags.problem("--bf16 and --fp16: give one of them", when=bf16 and fp16)
    if fp16:
        out["precision.initial_loss_scale"], least = flags["initial-loss-scale"], flags["min-loss-scale"]
        flags.note(f"--min-loss-scale {least:g}: the loss scale of fp16 never falls below 1 here", when=least != 1)
    out["precision.dtype"] = "bf16" if bf16 else "fp16" if fp16 else "fp32"
    out["precision.loss_scale_window"] = int(flags["loss-scale-window"]) if fp16 else None


def amount(flags: Flags, out: dict[str, Any], stem: str, what: str) -> int | None:
    """Steps from --STEM-iters or --STEM-samples: whole ones, as Megatron counts them; the rest is told."""
    steps, samples = flags[f"{stem}-iters"], flags[f"{stem}-samples"]
    both = f"--{stem}-iters {steps} and --{stem}-samples {samples}: give one of them ({what})"
    flags.problem(both, when=steps and samples)
    sizes = {key.partition(".")[2]: n for key, n in out.items() if key.startswith("batch.") and n is not None}
    batch = None if min(sizes.values(), default=0) < 1 else BatchConfig(**sizes)
    if steps or samples is None or batch is None:
        return steps
    steps = bisect_right(range(samples + 1), samples, key=batch.samples_after) - 1
    if rest := samples - batch.samples_after(steps):
        count = f"{counted(steps, 'step', ',')} and {counted(rest, 'sample', ',')}"
        flags.note(f"--{stem}-samples {samples:,} is {count}; the steps are taken")
    return steps


def steps(flags: Flags, out: dict[str, Any]) -> None:
    """[train] steps and [lr_schedule]."""
    lr, low, style = flags["lr"], flags["min-lr"], flags["lr-decay-style"]
    total = out["train.steps"] = amount(flags, out, "train", "the length of the run")
    absent = total is None and not {"train-iters", "train-samples"} & set(flags.values)
    flags.problem("--train-iters and --train-samples are both absent; append -- --train-iters N", when=absent)
    kind = out["lr_schedule.kind"] = "wsd" if style == "linear" else style.lower()
    known = style in ("cosine", "linear", "constant", "WSD")
    flags.problem(f"--lr-decay-style {style}: there are cosine, linear, constant and WSD", when=not known)
    decay = amount(flags, out, "lr-decay", "where the learning rate is at its minimum")
    warmup, share = amount(flags, out, "lr-warmup", "the warm-up"), flags["lr-warmup-fraction"]
    if share is not None:
        both = f"--lr-warmup-fraction {share:g} and --lr-warmup-iters or -samples: give one of them"
        flags.problem(both, when=warmup)
        warmup = int(round(share * (decay or total or 0), 6))
    out |= {"lr_schedule.decay_steps": decay, "lr_schedule.warmup_steps": warmup or 0}
    out["lr_schedule.min_ratio"] = float(f"{low / lr:.12g}") if lr else None
    if lr and low > lr:
        flags.problem(f"--min-lr {low:g} is above --lr {lr:g}; write at most {lr:g}")
    length = 0 if style == "linear" else None  # linear: from the end of the warm-up
    if style == "WSD":
        length, shape = amount(flags, out, "lr-wsd-decay", "the last decay"), flags["lr-wsd-decay-style"]
        write = "the last decay is linear here; write --lr-wsd-decay-style linear"
        flags.problem(f"--lr-wsd-decay-style {shape}: {write}", when=shape != "linear")
    out["lr_schedule.wsd_decay_steps"] = length
    if warmup:
        flags.note("the learning rate is one update ahead of Megatron's, whose first update runs at 0")
    elif kind != "constant":
        flags.note("the learning rate begins at its peak as Megatron's, and is at its minimum one update earlier")


def data(flags: Flags, out: dict[str, Any]) -> None:
    """[data] and evaluation: what is masked; sources of their own for each use, or shares of --data-path."""
    reset, masked = [flags["reset-position-ids"], flags["reset-attention-mask"]], flags["eod-mask-loss"]
    if any(reset) and not all(reset):
        write = "give both, which becomes data.document_mask=true, or none"
        flags.problem(f"--reset-position-ids and --reset-attention-mask come together: {write}")
    elif masked and not any(reset):
        flags.problem(
            "--eod-mask-loss alone leaves out the first token of a document, but attends across its start; give "
            "--reset-position-ids --reset-attention-mask too (data.document_mask=true), or --without eod-mask-loss"
        )
    elif any(reset) and not masked:
        flags.note(
            "without --eod-mask-loss Megatron predicts the first token of a document from the end of the one "
            "before; data.document_mask=true leaves out this one token per document"
        )
    mock, iters = flags["mock-data"] or None, flags["eval-iters"]
    out |= {"data.document_mask": all(reset) or None, "data.synthetic": mock}
    out |= dict.fromkeys(("data.train", "data.valid", "data.test", "data.tokenizer"))
    if not mock:
        sources(flags, out)
        out["data.tokenizer"] = flags["tokenizer-model"] or flags["vocab-file"]
    valid = iters > 0 and bool(mock or out["data.valid"])
    out |= {"train.eval_interval": flags["eval-interval"] * valid, "train.eval_batches": iters if valid else None}
    flags.note("--eval-iters without validation data; train.eval_interval=0", when=iters > 0 and not valid)


def sources(flags: Flags, out: dict[str, Any]) -> None:
    """Where the tokens come from: paths of its own for each use, or shares of the documents of --data-path."""
    blend, text, shares, first = flags["data-path"], flags["split"], [0.0, 0.0, 0.0], 0.0
    try:
        parts = [float(part) for part in text.replace("/", ",").split(",")]
        if len(parts) > 3 or min(parts) < 0 or not sum(parts):
            raise ValueError
        shares = [part / sum(parts) for part in [*parts, 0.0, 0.0][:3]] if blend else shares
    except ValueError:
        flags.problem(f"--split {text}: up to three numbers are needed, for example --split 99,1,0")
    for key, share in zip(("train", "valid", "test"), shares, strict=True):
        span = {"documents": [round(first, 9), round(first + share, 9)]} if share < 1 else {}
        first += share
        own = flags[f"{key}-data-path"]
        if share and key == "test" and not own:
            what = "as data.test they would be evaluated once, in full, after the last step"
            flags.note(f"the last {100 * share:.4g} % of the documents stay unread; {what}")
        elif own or share:
            out[f"data.{key}"] = tables(flags, own or blend, {} if own else span)
    write = "write data.train before it runs, or data.synthetic=true"
    flags.note(f"no --data-path: {write}", when=not out["data.train"])


def tables(flags: Flags, words: Sequence[str], span: dict[str, Any]) -> list[Any]:
    """Paths, or tables with weights and the documents that are used."""
    pairs = list(zip(words[::2], words[1::2], strict=False))
    weighted = len(words) == 2 * len(pairs) and all(w.replace(".", "", 1).isdecimal() for w, _ in pairs)
    what = "Megatron weighs by size, here they are equal until you write weights"
    flags.note(f"--data-path without weights: {what}", when=len(words) > 1 and not weighted)
    pairs = pairs if weighted else [("1", path) for path in words]
    made = [{"path": p} | ({"weight": float(w)} if len(pairs) > 1 else {}) | span for w, p in pairs]
    return [table["path"] if len(table) == 1 else table for table in made]


def saves(flags: Flags, out: dict[str, Any]) -> None:
    """[train], [checkpoint], [log] and [run]."""
    save, source = flags["save"], flags["load"]
    out["train.stop_after_steps"] = flags["exit-interval"] or None
    out |= {"checkpoint.folder": save, "checkpoint.interval": (flags["save-interval"] or 0) if save else 0}
    out["checkpoint.keep_every"] = (flags["save-retain-interval"] or None) if save else None
    flags.note(f"no --save: one checkpoint at the end, in {out['run.folder']}/checkpoints", when=not save)
    if source and source == save:
        flags.implied.append((flags.given.pop("load"), "the newest checkpoint in checkpoint.folder is resumed"))
    elif source:
        then = "then write checkpoint.weights_from=FOLDER"
        flags.note(f"--load {source}: weights of Megatron become ours by megallama convert; {then}")
    project = out["log.wandb_project"] = flags["wandb-project"] or None
    out["log.wandb"] = bool(project) or None
    out["run.timeout_seconds"] = 60.0 * (flags["distributed-timeout-minutes"] or 0) or None


def to_toml(said: dict[str, Any], heading: Sequence[str]) -> str:
    """The settings that were said as a TOML file, under a heading of comments."""
    lines = [f"# {line}".rstrip() for line in heading]
    for key in (setting.key for setting in settings() if setting.key in said):
        section, _, name = key.partition(".")
        if f"[{section}]" not in lines:
            lines += ["", f"[{section}]"]
        lines.append(f"{name} = " + literal(said[key]).replace("}, {", "},\n    {"))
    return "\n".join(lines) + "\n"


def summary(config: Config) -> str:
    """One line: parameters, the preset of the same shape, batch, tokens."""
    b, m, steps = config.batch, config.model, config.train.steps
    shape, tokens = [getattr(m, key) for key in SHAPE], b.global_batch_size * b.seq_length
    same = [name for name, row in PRESETS.items() if [row.get(key, row["num_heads"]) for key in SHAPE] == shape]
    same.sort(key=lambda name: PRESETS[name].get("norm_eps") != m.norm_eps)
    return (
        f"{num_parameters(m):,} parameters{f' (the shape of {same[0]})' if same else ''}; {b.global_batch_size} x "
        f"{b.seq_length} = {counted(tokens, 'token', ',')} per step; {counted(steps, 'step', ',')}, "
        f"{counted(b.samples_after(steps) * b.seq_length, 'token', ',')}"
    )
