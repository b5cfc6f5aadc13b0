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


class Conversion:
    """The settings that a command line asks for; problems, and what is to be looked at, go to `flags`."""

    def __init__(self, flags: Flags, name: str, ranks: int | None) -> None:
        self.flags, self.get, self.ranks = flags, flags.get, ranks or flags.ranks
        self.problem, self.note = flags.problems.append, flags.notes.append
        self.out: dict[str, Any] = {}
        self.tp, self.pp = flags.get("tensor-model-parallel-size"), flags.get("pipeline-model-parallel-size")
        self.architecture()
        self.model()
        self.layout()
        self.batch()
        self.steps()
        self.data()
        self.run(name)
        for setting, names in SETTINGS.items():  # what is one flag there and one setting here
            if setting not in self.out and " " not in names:
                self.out[setting] = flags.get(names.partition(":")[0].partition("|")[0])

    def architecture(self) -> None:
        """Refuse what is not a LLaMA, where absent flags stand for GPT's parts; ask for what Megatron needs too."""
        for name, right, what, other in LLAMA:
            value, given = self.get(name), self.flags.given.get(name)
            if name.startswith("pos") and (self.get("use-rotary-position-embeddings") or value == "rotary"):
                value, given = "rope", given or "--use-rotary-position-embeddings"
            shown = f"{value:g}" if isinstance(value, float) else "" if value is True else str(value)
            write = f"--{name} {right}".rstrip()
            if shown.lower() == right.lower():
                self.flags.implied.append((given or f"--{name}", f"LLaMA has {what}"))
            elif given:
                self.problem(f"--{name} {shown}: LLaMA has {what}; write {write}")
            else:
                self.problem(f"--{name} is absent, which means {other}; LLaMA has {what}: append -- {write}")
        for name, what in NEEDED.items():
            if self.get(name) is None and f"--{name} " not in " ".join(self.flags.problems):
                self.problem(f"--{name} is missing ({what}); append it: -- --{name} N")
        if (cp := self.get("context-parallel-size")) > 1:
            self.problem(
                f"--context-parallel-size {cp}: there is no context parallelism; write 1, and more "
                "--tensor-model-parallel-size with --sequence-parallel for long sequences"
            )

    def model(self) -> None:
        """[model]."""
        get, out, h, heads = self.get, self.out, self.get("hidden-size"), self.get("num-attention-heads")
        kv = out["model.num_kv_heads"] = get("num-query-groups") if get("group-query-attention") else heads
        if kv != self.flags.values.get("num-query-groups", kv):
            only = "counts in Megatron only with --group-query-attention, which is absent"
            self.note(f"{self.flags.given['num-query-groups']} {only}: model.num_kv_heads={kv}")
        width = get("kv-channels")
        out["model.head_dim"] = width if width and h and heads and width * heads != h else None
        if get("ffn-hidden-size") is None and h:
            ffn = out["model.ffn_hidden_size"] = int(h * 4 * 2 / 3 / 64) * 64
            self.note(f"--ffn-hidden-size is absent: Megatron takes int(8/3 x {h} / 64) x 64 = {ffn} with --swiglu")
        out["model.vocab_size"] = get("padded-vocab-size") or self.vocabulary(h or 0)
        if padded := get("padded-vocab-size"):
            self.note(f"--padded-vocab-size {padded}: the model gets as many rows, padding included")
        out["model.rope_scaling.factor"] = get("rope-scaling-factor") if get("use-rope-scaling") else None
        out["model.tie_embeddings"] = not get("untie-embeddings-and-output-weights")

    def vocabulary(self, width: int) -> int | None:
        """model.vocab_size: said, or that of the tokenizer where its file is here."""
        get, size = self.get, self.get("vocab-size")
        file = get("tokenizer-model") or get("vocab-file")
        if size is None and file and Path(file).exists():
            from megallama.data.tokenizer import load_tokenizer

            try:
                size = load_tokenizer(file).vocab_size
                self.note(f"model.vocab_size={size} is that of {file}")
            except MegallamaError as error:
                self.problem(str(error))
        elif size is None:
            where = f"the tokenizer {file} is not here" if file else "no tokenizer is named"
            ids = "LLaMA 1 and 2 have 32000 ids, LLaMA 3 128256"
            self.problem(f"--vocab-size is absent and {where}; {ids}: append -- --vocab-size N")
        rows = -(size or 0) % (get("make-vocab-size-divisible-by") * self.tp)
        if size and rows:
            more = f"{rows * width * (1 + get('untie-embeddings-and-output-weights')):,} parameters more"
            self.note(
                f"Megatron pads the vocabulary to {size + rows:,} rows, {more}, which take part in its loss "
                f"({log((size + rows) / size):.4f} more at the start); here it is {size:,}"
            )
        if get("tokenizer-type") == "NullTokenizer" and size:
            self.note(f"NullTokenizer adds one id to --vocab-size {size}; here it is {size:,}")
        return size

    def layout(self) -> None:
        """[parallel] and [memory]."""
        get, out, layers, pp = self.get, self.out, self.get("num-layers") or 0, self.pp
        out["parallel.chunks"] = get("num-virtual-stages-per-pipeline-rank")
        if per := get("num-layers-per-virtual-pipeline-stage"):
            out["parallel.chunks"] = max(1, layers // (pp * per))
            if layers % (pp * per):
                self.problem(
                    f"--num-layers-per-virtual-pipeline-stage {per} x --pipeline-model-parallel-size {pp} = "
                    f"{per * pp} does not divide --num-layers {layers}; write a divisor of {layers // pp}"
                )
        first, last = ends = [f"decoder-{end}-pipeline-num-layers" for end in ("first", "last")]
        said = {name: get(name) for name in ends if get(name) is not None}
        rest, stages = layers - sum(said.values()), pp - len(said)
        if said and ((out["parallel.chunks"] or 1) > 1 or stages < 1 or rest < 0 or rest % stages):
            shown = ", ".join(f"--{name} {n}" for name, n in said.items())
            write = f"write parallel.stage_layers into the TOML instead (--without {','.join(said)})"
            self.problem(f"{shown}: layers left for {counted(stages, 'stage')}: {rest}; {write}")
        elif said:
            counts = [said.get(first), *[rest // stages] * stages, said.get(last)]
            out["parallel.stage_layers"] = [count for count in counts if count is not None]
        out["parallel.sequence_parallel"] = get("sequence-parallel") and self.tp > 1
        out["parallel.schedule"] = "1f1b" if pp > 1 else None
        out["parallel.rank_order"] = "tp-cp-pp-dp" if get("use-tp-pp-dp-mapping") else None
        how = "selective" if get("recompute-activations") else get("recompute-granularity")
        how = out["memory.recompute"] = "full" if get("checkpoint-activations") else how or "none"
        if how not in ("none", "full", "selective"):
            self.problem(f"--recompute-granularity {how}; write full or selective")
        elif how == "none":
            self.note('memory.recompute="none" as in Megatron; "selective" keeps 29 % less at little cost')

    def batch(self) -> None:
        """[batch] and [precision]."""
        get, out, micro, size = self.get, self.out, self.get("micro-batch-size"), self.get("global-batch-size")
        if size is None and micro and self.ranks:
            size = micro * max(1, self.ranks // (self.tp * self.pp))
            self.note(f"--global-batch-size is absent: one micro-batch per replica (ranks: {self.ranks}) is {size}")
        elif size is None and micro:
            write = "give --ranks N, or append -- --global-batch-size N"
            self.problem(f"--global-batch-size is absent: Megatron takes micro-batch x data parallel size; {write}")
        out["batch.micro_batch_size"], out["batch.global_batch_size"] = micro, size
        ramp = get("rampup-batch-size") or []
        if len(ramp) == 3 and all(word.isdecimal() for word in ramp):
            keys = ("batch.ramp_start", "batch.ramp_increment", "batch.ramp_samples")
            out |= dict(zip(keys, map(int, ramp), strict=True))
        elif ramp:
            what = "three whole numbers are needed: first size, growth, samples"
            self.problem(f"--rampup-batch-size {' '.join(ramp)}: {what}")
        half = get("fp16")
        if get("bf16") and half:
            self.problem("--bf16 and --fp16: give one of them")
        out["precision.dtype"] = "bf16" if get("bf16") else "fp16" if half else "fp32"
        out["precision.loss_scale_window"] = int(get("loss-scale-window")) if half else None
        out["precision.initial_loss_scale"] = get("initial-loss-scale") if half else None
        if half and (least := get("min-loss-scale")) != 1:
            self.note(f"--min-loss-scale {least:g}: the loss scale of fp16 never falls below 1 here")

    def amount(self, stem: str, what: str) -> int | None:
        """Steps from --STEM-iters or --STEM-samples: whole ones, as Megatron counts them; the rest is told."""
        steps, samples = self.get(f"{stem}-iters"), self.get(f"{stem}-samples")
        if steps and samples:
            self.problem(f"--{stem}-iters {steps} and --{stem}-samples {samples}: give one of them ({what})")
        sizes = {key.partition(".")[2]: n for key, n in self.out.items() if key.startswith("batch.") and n is not None}
        batch = None if min(sizes.values(), default=0) < 1 else BatchConfig(**sizes)
        if steps or samples is None or batch is None:
            return steps
        steps = bisect_right(range(samples + 1), samples, key=batch.samples_after) - 1
        rest = samples - batch.samples_after(steps)
        if rest:
            count = f"{counted(steps, 'step', ',')} and {counted(rest, 'sample', ',')}"
            self.note(f"--{stem}-samples {samples:,} is {count}; the steps are taken")
        return steps

    def steps(self) -> None:
        """[train] steps and [lr_schedule]."""
        get, out, lr, low, style = self.get, self.out, self.get("lr"), self.get("min-lr"), self.get("lr-decay-style")
        steps = out["train.steps"] = self.amount("train", "the length of the run")
        if steps is None and not {"train-iters", "train-samples"} & set(self.flags.values):
            self.problem("--train-iters and --train-samples are both absent; append -- --train-iters N")
        kind = out["lr_schedule.kind"] = "wsd" if style == "linear" else style.lower()
        if style not in ("cosine", "linear", "constant", "WSD"):
            self.problem(f"--lr-decay-style {style}: there are cosine, linear, constant and WSD")
        decay = out["lr_schedule.decay_steps"] = self.amount("lr-decay", "where the learning rate is at its minimum")
        warmup, share = self.amount("lr-warmup", "the warm-up"), get("lr-warmup-fraction")
        if share is not None:
            if warmup:
                self.problem(f"--lr-warmup-fraction {share:g} and --lr-warmup-iters or -samples: give one of them")
            warmup = int(round(share * (decay or steps or 0), 6))
        out["lr_schedule.warmup_steps"] = warmup or 0
        out["lr_schedule.min_ratio"] = float(f"{low / lr:.12g}") if lr else None
        if lr and low > lr:
            self.problem(f"--min-lr {low:g} is above --lr {lr:g}; write at most {lr:g}")
        length = self.amount("lr-wsd-decay", "the last decay") if style == "WSD" else None
        out["lr_schedule.wsd_decay_steps"] = 0 if style == "linear" else length  # linear: from the end of the warm-up
        if style == "WSD" and (shape := get("lr-wsd-decay-style")) != "linear":
            flag = "--lr-wsd-decay-style"
            self.problem(f"{flag} {shape}: the last decay is linear here; write {flag} linear")
        if warmup:
            self.note("the learning rate is one update ahead of Megatron's, whose first update runs at 0")
        elif kind != "constant":
            self.note("the learning rate begins at its peak as Megatron's, and is at its minimum one update earlier")

    def data(self) -> None:
        """[data]: sources with weights, which share of their documents is held out; evaluation."""
        get, out = self.get, self.out
        reset, masked = [get(f"reset-{name}") for name in ("position-ids", "attention-mask")], get("eod-mask-loss")
        if any(reset) and not all(reset):
            write = "give both, which becomes data.document_mask=true, or none"
            self.problem(f"--reset-position-ids and --reset-attention-mask come together: {write}")
        elif masked and not any(reset):
            self.problem(
                "--eod-mask-loss alone leaves out the first token of a document, but attends across its start; give "
                "--reset-position-ids --reset-attention-mask too (data.document_mask=true), or --without eod-mask-loss"
            )
        elif any(reset) and not masked:
            self.note(
                "without --eod-mask-loss Megatron predicts the first token of a document from the end of the one "
                "before; data.document_mask=true leaves out this one token per document"
            )
        mock, iters = get("mock-data") or None, get("eval-iters")
        out |= {"data.document_mask": all(reset) or None, "data.synthetic": mock}
        out |= dict.fromkeys(("data.train", "data.valid", "data.test", "data.tokenizer"))
        if not mock:
            self.sources()
            out["data.tokenizer"] = get("tokenizer-model") or get("vocab-file")
        valid = iters > 0 and bool(mock or out["data.valid"])
        out["train.eval_interval"], out["train.eval_batches"] = get("eval-interval") * valid, iters if valid else None
        if iters > 0 and not valid:
            self.note("--eval-iters without validation data; train.eval_interval=0")

    def sources(self) -> None:
        """Where the tokens come from: paths of its own for each use, or shares of the documents of --data-path."""
        get, blend, text, shares = self.get, self.get("data-path"), self.get("split"), [0.0, 0.0, 0.0]
        try:
            parts = [float(part) for part in text.replace("/", ",").split(",")]
            if len(parts) > 3 or min(parts) < 0 or not sum(parts):
                raise ValueError
            shares = [part / sum(parts) for part in [*parts, 0.0, 0.0][:3]] if blend else shares
        except ValueError:
            self.problem(f"--split {text}: up to three numbers are needed, for example --split 99,1,0")
        first = 0.0
        for key, share in zip(("train", "valid", "test"), shares, strict=True):
            span = {"documents": [round(first, 9), round(first + share, 9)]} if share < 1 else {}
            first += share
            own = get(f"{key}-data-path")
            if share and key == "test" and not own:
                what = "as data.test they would be evaluated once, in full, after the last step"
                self.note(f"the last {100 * share:.4g} % of the documents stay unread; {what}")
            elif own or share:
                self.out[f"data.{key}"] = self.tables(own or blend, {} if own else span)
        if not self.out["data.train"]:
            self.note("no --data-path: write data.train before it runs, or data.synthetic=true")

    def tables(self, words: Sequence[str], span: dict[str, Any]) -> list[Any]:
        """Paths, or tables with weights and the documents that are used."""
        pairs = list(zip(words[::2], words[1::2], strict=False))
        weighted = len(words) == 2 * len(pairs) and all(w.replace(".", "", 1).isdecimal() for w, _ in pairs)
        if len(words) > 1 and not weighted:
            what = "Megatron weighs by size, here they are equal until you write weights"
            self.note(f"--data-path without weights: {what}")
        pairs = pairs if weighted else [("1", path) for path in words]
        made = [{"path": p} | ({"weight": float(w)} if len(pairs) > 1 else {}) | span for w, p in pairs]
        return [table["path"] if len(table) == 1 else table for table in made]

    def run(self, name: str) -> None:
        """[train], [checkpoint], [log] and [run]."""
        get, out, save, source = self.get, self.out, self.get("save"), self.get("load")
        out["train.stop_after_steps"] = get("exit-interval") or None
        out["checkpoint.folder"] = save
        out["checkpoint.interval"] = (get("save-interval") or 0) if save else 0
        out["checkpoint.keep_every"] = (get("save-retain-interval") or None) if save else None
        if not save:
            self.note(f"no --save: one checkpoint at the end, in runs/{name}/checkpoints")
        if source and source == save:
            self.flags.implied.append((f"--load {source}", "the newest checkpoint in checkpoint.folder is resumed"))
        elif source:
            then = "then write checkpoint.weights_from=FOLDER"
            self.note(f"--load {source}: weights of Megatron become ours by megallama convert; {then}")
        out["log.wandb"], out["log.wandb_project"] = bool(get("wandb-project")) or None, get("wandb-project") or None
        out["run.folder"] = f"runs/{name}"
        out["run.timeout_seconds"] = 60.0 * (get("distributed-timeout-minutes") or 0) or None


def convert(flags: Flags, name: str, ranks: int | None = None) -> tuple[Config, dict[str, Any]]:
    """The configuration, and the settings that were said. Raises: ConfigError with every problem at once."""
    made = None if flags.lost else Conversion(flags, name, ranks)  # without values little can be said
    if made is None or flags.problems:
        many = "\n".join(f"  - {p}" for p in flags.problems)
        raise ConfigError(f"{counted(len(flags.problems), 'problem')} on Megatron's command line:\n{many}")
    said = {key: value for key, value in made.out.items() if value is not None}
    flags.ranks = made.ranks
    overrides = [f"{key}={literal(value)}" for key, value in said.items()]
    try:
        return load(None, overrides, ranks=made.ranks, need_data=False), said
    except ConfigError as error:
        raise ConfigError(f"Megatron's flags as our settings: {error}") from None


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
