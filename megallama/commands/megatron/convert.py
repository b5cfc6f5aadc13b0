"""From Megatron's flags to our settings: what each means here, and where the two programs differ."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any

from megallama.commands.megatron.words import Flags
from megallama.config.describe import literal
from megallama.config.errors import ConfigError, MegallamaError
from megallama.config.load import load
from megallama.config.presets import PRESETS
from megallama.config.rules import ramp_sizes
from megallama.config.schema import BatchConfig, Config, ModelConfig
from megallama.config.words import counted
from megallama.plan.batch import BatchPlan
from megallama.plan.params import num_parameters

LLAMA_VOCABULARIES = "LLaMA 1 and 2 have 32000 ids, LLaMA 3 128256"


class Conversion:
    """The settings that a command line asks for, section by section; problems go to `flags`."""

    def __init__(self, flags: Flags, name: str, ranks: int | None) -> None:
        self.flags, self.get, self.ranks = flags, flags.get, ranks or flags.ranks
        self.out: dict[str, Any] = {}
        self.model()
        self.layout()
        self.batch()
        self.steps()
        self.optimizer()
        self.precision()
        self.data()
        self.evaluation()
        self.run(name)

    def problem(self, text: str) -> None:
        """Something that cannot be carried over."""
        self.flags.problems.append(text)

    def note(self, text: str) -> None:
        """Something to look at."""
        self.flags.notes.append(text)

    def implied(self, flag: str, why: str) -> None:
        """Something that is so here without being said."""
        self.flags.implied.append((flag, why))

    def need(self, name: str, what: str) -> Any:
        """A value that Megatron needs too."""
        value = self.get(name)
        if value is None and f"--{name} " not in " ".join(self.flags.problems):
            self.problem(f"--{name} is missing ({what}); append it: -- --{name} N")
        return value

    def model(self) -> None:
        """[model], and whether the model is a LLaMA at all."""
        get, out = self.get, self.out
        self._architecture()
        h = out["model.hidden_size"] = self.need("hidden-size", "the width of the model")
        out["model.num_layers"] = self.need("num-layers", "the number of layers")
        heads = out["model.num_heads"] = self.need("num-attention-heads", "the number of attention heads")
        kv = get("num-query-groups") if get("group-query-attention") else heads
        if (given := self.flags.values.get("num-query-groups")) and kv != given:
            self.note(
                f"--num-query-groups {given} counts in Megatron only with --group-query-attention, which is absent: "
                f"model.num_kv_heads={kv}"
            )
        out["model.num_kv_heads"] = kv
        if (width := get("kv-channels")) is not None and h and heads and width * heads != h:
            out["model.head_dim"] = width
        elif width is not None:
            self.implied(f"--kv-channels {width}", "hidden_size / num_heads")
        ffn = get("ffn-hidden-size")
        if ffn is None and h:
            ffn = int(h * 4 * 2 / 3 / 64) * 64
            self.note(f"--ffn-hidden-size is absent: Megatron takes int(8/3 x {h} / 64) x 64 = {ffn} with --swiglu")
        out["model.ffn_hidden_size"] = ffn
        self._vocabulary()
        out["model.norm_eps"] = get("norm-epsilon")
        out["model.rope_theta"] = get("rotary-base")
        if get("use-rope-scaling"):
            out["model.rope_scaling.factor"] = get("rope-scaling-factor")
            self.implied("--use-rope-scaling", "low_freq_factor 1, high_freq_factor 4, original_max_position 8192")
        out["model.tie_embeddings"] = not get("untie-embeddings-and-output-weights")
        out["model.init_std"] = get("init-method-std")
        self.implied(
            f"--init-method-std {get('init-method-std'):g}", "o_proj and down_proj divide it by sqrt(2 num_layers)"
        )

    def _architecture(self) -> None:
        """Refuse what is not a LLaMA: absent flags stand for GPT's parts."""
        given, get = self.flags.values, self.get
        for name, value, what, other in (
            ("normalization", "rmsnorm", "RMSNorm", "LayerNorm"),
            ("position-embedding-type", "rope", "rotary positions", "learned positions"),
        ):
            said = str(get(name))
            if name.startswith("pos") and (get("use-rotary-position-embeddings") or said == "rotary"):
                said = "rope"
            if said.lower() == value:
                self.implied(f"--{name} {given[name]}" if name in given else "--use-rotary-position-embeddings", what)
            elif name in given:
                self.problem(
                    f"--{name} {said}: LLaMA has {what}; write --{name} {'RMSNorm' if value[1] == 'm' else 'rope'}"
                )
            else:
                text = "RMSNorm" if name == "normalization" else "rope"
                self.problem(f"--{name} is absent, which means {other}; LLaMA has {what}: append -- --{name} {text}")
        for name, what, other in (
            ("swiglu", "SwiGLU", "GELU"), ("disable-bias-linear", "no biases", "biases in every linear layer"),
        ):  # fmt: skip
            if get(name):
                self.implied(f"--{name}", f"LLaMA has {what}")
            else:
                self.problem(f"--{name} is absent, which means {other}; LLaMA has {what}: append -- --{name}")
        for name in ("hidden-dropout", "attention-dropout"):
            if (rate := get(name)) == 0:
                self.implied(f"--{name} 0", "there is no dropout")
            elif name in given:
                self.problem(f"--{name} {rate:g}: LLaMA has no dropout; write --{name} 0")
            else:
                self.problem(f"--{name} is absent, which means {rate:g}; LLaMA has no dropout: append -- --{name} 0")

    def _vocabulary(self) -> None:
        """model.vocab_size: said, or that of the tokenizer where its file is here."""
        get, out = self.get, self.out
        size, padded = get("vocab-size"), get("padded-vocab-size")
        file = get("tokenizer-model") or get("vocab-file")
        if padded:
            size = padded
            self.note(f"--padded-vocab-size {padded}: the model gets as many rows, padding included")
        elif size is None and file and Path(file).exists():
            from megallama.data.tokenizer import load_tokenizer

            try:
                size = load_tokenizer(file).vocab_size
            except MegallamaError as error:
                self.problem(str(error))
            self.note(f"model.vocab_size={size} is that of {file}")
        elif size is None:
            where = f"the tokenizer {file} is not here" if file else "no tokenizer is named"
            self.problem(f"--vocab-size is absent and {where}; {LLAMA_VOCABULARIES}: append -- --vocab-size N")
        unit = get("make-vocab-size-divisible-by") * get("tensor-model-parallel-size")
        if size and not padded and size % unit:
            h = out["model.hidden_size"] or 0
            rows = -size % unit
            more = rows * h * (1 if not get("untie-embeddings-and-output-weights") else 2)
            self.note(
                f"Megatron pads the vocabulary to {size + rows:,} rows, {more:,} parameters more, which take part in "
                f"its loss ({log((size + rows) / size):.4f} more at the start); here it is {size:,}"
            )
        if get("tokenizer-type") == "NullTokenizer" and size:
            self.note(f"NullTokenizer adds one id to --vocab-size {size}; here it is {size:,}")
        out["model.vocab_size"] = size

    def layout(self) -> None:
        """[parallel] and [memory]."""
        get, out = self.get, self.out
        tp, pp = get("tensor-model-parallel-size"), get("pipeline-model-parallel-size")
        out["parallel.tp"], out["parallel.pp"] = tp, pp
        if (cp := get("context-parallel-size")) > 1:
            self.problem(
                f"--context-parallel-size {cp}: there is no context parallelism; write 1, and more "
                "--tensor-model-parallel-size with --sequence-parallel for long sequences"
            )
        layers, per, chunks = (
            out["model.num_layers"],
            get("num-layers-per-virtual-pipeline-stage"),
            get("num-virtual-stages-per-pipeline-rank"),
        )
        if per is not None and layers:
            if layers % (pp * per):
                self.problem(
                    f"--num-layers-per-virtual-pipeline-stage {per} x --pipeline-model-parallel-size {pp} = "
                    f"{per * pp} does not divide --num-layers {layers}; write a divisor of {layers // pp}"
                )
            chunks = max(1, layers // (pp * per))
        if chunks is not None:
            out["parallel.chunks"] = chunks
        first, last = get("decoder-first-pipeline-num-layers"), get("decoder-last-pipeline-num-layers")
        if (first is not None or last is not None) and layers:
            self._uneven(layers, pp, first, last)
        out["parallel.sequence_parallel"] = get("sequence-parallel") and tp > 1
        if pp > 1:
            out["parallel.schedule"] = "1f1b"
        if get("use-tp-pp-dp-mapping"):
            out["parallel.rank_order"] = "tp-cp-pp-dp"
        how = get("recompute-granularity")
        if get("checkpoint-activations"):
            how = "full"
        elif get("recompute-activations"):
            how = "selective"
        if how not in (None, "full", "selective"):
            self.problem(f"--recompute-granularity {how}; write full or selective")
        out["memory.recompute"] = how or "none"
        if how is None:
            self.note(
                'memory.recompute="none" as in Megatron; "selective" keeps 29 % less and recomputes no matrix product'
            )

    def _uneven(self, layers: int, pp: int, first: int | None, last: int | None) -> None:
        """parallel.stage_layers from the layers of the first and the last stage."""
        ends = {"first": first, "last": last}
        said = {f"decoder-{end}-pipeline-num-layers": n for end, n in ends.items() if n is not None}
        rest, stages = layers - sum(said.values()), pp - len(said)
        if self.out.get("parallel.chunks", 1) > 1 or stages < 1 or rest < 0 or rest % stages:
            shown = ", ".join(f"--{name} {n}" for name, n in said.items())
            self.problem(
                f"{shown}: layers left for {counted(stages, 'stage')}: {rest}; "
                f"write parallel.stage_layers into the TOML instead (--without {','.join(said)})"
            )
            return
        head, tail = [[] if n is None else [n] for n in (first, last)]
        self.out["parallel.stage_layers"] = [*head, *[rest // stages] * stages, *tail]

    def batch(self) -> None:
        """[batch]."""
        out = self.out
        micro = out["batch.micro_batch_size"] = self.need("micro-batch-size", "sequences of one forward")
        size = self.get("global-batch-size")
        out["batch.seq_length"] = self.need("seq-length", "tokens of a sequence")
        if size is None and micro:
            if self.ranks is None:
                self.problem(
                    "--global-batch-size is absent: Megatron takes micro-batch x data parallel size; give --ranks N, "
                    "or append -- --global-batch-size N"
                )
            else:
                size = micro * max(1, self.ranks // (out["parallel.tp"] * out["parallel.pp"]))
                self.note(f"--global-batch-size is absent: one micro-batch per replica (ranks: {self.ranks}) is {size}")
        out["batch.global_batch_size"] = size
        if (ramp := self.get("rampup-batch-size")) is not None:
            try:
                start, step, samples = map(int, ramp)
            except ValueError:
                self.problem(
                    f"--rampup-batch-size {' '.join(ramp)}: three whole numbers are needed: first size, growth, samples"
                )
                return
            out |= {"batch.ramp_start": start, "batch.ramp_increment": step, "batch.ramp_samples": samples}

    def plan(self) -> BatchPlan | None:
        """Batch arithmetic, where the batch is known and right."""
        keys = ("global_batch_size", "ramp_start", "ramp_increment", "ramp_samples")
        sizes = {key: self.out.get(f"batch.{key}") for key in keys}
        if not isinstance(sizes["global_batch_size"], int) or any(v is not None and v < 1 for v in sizes.values()):
            return None
        batch = BatchConfig(**{k: v for k, v in sizes.items() if v is not None})
        return BatchPlan(batch, 1) if ramp_sizes(batch) else None

    def steps_of(self, samples: float, name: str) -> int | None:
        """The whole steps that fit in so many samples, as Megatron counts them; what is left over is told."""
        if (plan := self.plan()) is None:
            return None
        steps, consumed = 0, 0
        while (size := plan.global_batch(consumed)) != plan.sizes[-1] and consumed + size <= samples:
            steps, consumed = steps + 1, consumed + size
        whole, rest = divmod(samples - consumed, size)
        if rest:
            self.note(
                f"--{name} {samples:,} is {counted(round(steps + whole), 'step', ',')} and "
                f"{counted(round(rest), 'sample', ',')}; the steps are taken"
            )
        return steps + int(whole)

    def amount(self, stem: str, what: str) -> int | None:
        """Steps from --STEM-iters or --STEM-samples."""
        iters, samples = self.get(f"{stem}-iters"), self.get(f"{stem}-samples")
        if iters and samples:
            self.problem(f"--{stem}-iters {iters} and --{stem}-samples {samples}: give one of them ({what})")
        return self.steps_of(samples, f"{stem}-samples") if iters is None and samples is not None else iters

    def steps(self) -> None:
        """[train] steps and [lr_schedule]."""
        get, out = self.get, self.out
        steps = self.amount("train", "the length of the run")
        if steps is None and not {"train-iters", "train-samples"} & set(self.flags.values):
            self.problem("--train-iters and --train-samples are both absent; append -- --train-iters N")
        out["train.steps"] = steps
        lr, low, style = self.need("lr", "the learning rate"), get("min-lr"), get("lr-decay-style")
        out["optimizer.lr"] = lr
        kind = {"cosine": "cosine", "linear": "wsd", "constant": "constant", "WSD": "wsd"}.get(style)
        if kind is None:
            self.problem(f"--lr-decay-style {style}: there are cosine, linear, constant and WSD")
        out["lr_schedule.kind"] = kind
        decay = self.amount("lr-decay", "where the learning rate is at its minimum")
        out["lr_schedule.decay_steps"] = decay
        warmup, share = self.amount("lr-warmup", "the warm-up"), get("lr-warmup-fraction")
        if share is not None:
            if warmup:
                self.problem(f"--lr-warmup-fraction {share:g} and --lr-warmup-iters or -samples: give one of them")
            warmup = int(round(share * (decay or steps or 0), 6))
        out["lr_schedule.warmup_steps"] = warmup or 0
        if lr and low > lr:
            self.problem(f"--min-lr {low:g} is above --lr {lr:g}; write at most {lr:g}")
        elif lr:
            out["lr_schedule.min_ratio"] = float(f"{low / lr:.12g}")
        if kind == "wsd":  # linear is a decay that begins where the warm-up ends
            length = 0 if style == "linear" else self.amount("lr-wsd-decay", "the last decay")
            out["lr_schedule.wsd_decay_steps"] = length
        if style == "WSD" and (shape := get("lr-wsd-decay-style")) != "linear":
            flag = "--lr-wsd-decay-style"
            self.problem(f"{flag} {shape}: the last decay is linear here; write {flag} linear")
        if warmup:
            self.note("the learning rate is one update ahead of Megatron's, whose first update runs at 0")
        elif kind != "constant":
            self.note("the learning rate begins at its peak as Megatron's, and is at its minimum one update earlier")

    def optimizer(self) -> None:
        """[optimizer]."""
        names = {"beta1": "adam-beta1", "beta2": "adam-beta2", "eps": "adam-eps", "weight_decay": "weight-decay"}
        for key, flag in {**names, "clip_grad": "clip-grad"}.items():
            self.out[f"optimizer.{key}"] = self.get(flag)

    def precision(self) -> None:
        """[precision]."""
        get = self.get
        if get("bf16") and get("fp16"):
            self.problem("--bf16 and --fp16: give one of them")
        self.out["precision.dtype"] = "bf16" if get("bf16") else "fp16" if get("fp16") else "fp32"
        if get("fp16"):
            self.out["precision.initial_loss_scale"] = get("initial-loss-scale")
            self.out["precision.loss_scale_window"] = int(get("loss-scale-window"))
            if (least := get("min-loss-scale")) != 1:
                self.note(f"--min-loss-scale {least:g}: the loss scale of fp16 never falls below 1 here")

    def data(self) -> None:
        """[data]: sources with weights, and which share of their documents is held out."""
        get, out = self.get, self.out
        reset, masked = [get(f"reset-{name}") for name in ("position-ids", "attention-mask")], get("eod-mask-loss")
        if any(reset) and not all(reset):
            self.problem(
                "--reset-position-ids and --reset-attention-mask come together: give both, which becomes "
                "data.document_mask=true, or none"
            )
        elif masked and not any(reset):
            self.problem(
                "--eod-mask-loss alone leaves out the first token of a document, but attends across its start; give "
                "--reset-position-ids --reset-attention-mask too (data.document_mask=true), or --without eod-mask-loss"
            )
        if all(reset):
            out["data.document_mask"] = True
            if not masked:
                self.note(
                    "without --eod-mask-loss Megatron predicts the first token of a document from the end of the one "
                    "before; data.document_mask=true leaves out this one token per document"
                )
        if get("mock-data"):
            out["data.synthetic"] = True
            return
        blend = get("data-path")
        shares = self._split() if blend else [1.0, 0.0, 0.0]
        first = 0.0
        for n, key in enumerate(("train", "valid", "test")):
            own = get(f"{key}-data-path")
            span = (round(first, 9), round(first + shares[n], 9))
            first += shares[n]
            if own:
                out[f"data.{key}"] = self._sources(own, (0.0, 1.0))
            elif blend and key == "test" and shares[n]:
                self.note(
                    f"the last {100 * shares[n]:.4g} % of the documents stay unread; as data.test they would be "
                    "evaluated once, in full, after the last step"
                )
            elif blend and shares[n]:
                out[f"data.{key}"] = self._sources(blend, span)
        if "data.train" not in out:
            self.note("no --data-path: write data.train before it runs, or data.synthetic=true")
        out["data.tokenizer"] = get("tokenizer-model") or get("vocab-file")

    def _split(self) -> list[float]:
        """Shares of the documents for training, validation and test."""
        text = self.get("split")
        try:
            parts = [float(part) for part in str(text).replace("/", ",").split(",")]
            total = sum(parts)
            assert len(parts) <= 3 and total > 0 and min(parts) >= 0
        except (ValueError, AssertionError):
            self.problem(f"--split {text}: up to three numbers are needed, for example --split 99,1,0")
            return [1.0, 0.0, 0.0]
        return [part / total for part in [*parts, 0.0, 0.0][:3]]

    def _sources(self, words: Sequence[str], span: tuple[float, float]) -> list[Any]:
        """Paths, or tables with weights and the documents that are used."""
        pairs = [(1.0, word) for word in words]
        if len(words) % 2 == 0 and all(_number(w) for w in words[::2]):
            pairs = [(float(w), path) for w, path in zip(words[::2], words[1::2], strict=True)]
        elif len(words) > 1:
            self.note(
                "--data-path without weights: Megatron weighs by size, here they are equal until you write weights"
            )
        documents = {} if span == (0.0, 1.0) else {"documents": list(span)}
        weighted = len(pairs) > 1
        tables = [{"path": path, **({"weight": weight} if weighted else {}), **documents} for weight, path in pairs]
        return [t["path"] if list(t) == ["path"] else t for t in tables]

    def evaluation(self) -> None:
        """[train] evaluation."""
        iters, every = self.get("eval-iters"), self.get("eval-interval")
        valid = "data.valid" in self.out or self.out.get("data.synthetic")
        self.out["train.eval_interval"] = every if iters > 0 and valid else 0
        if iters > 0 and valid:
            self.out["train.eval_batches"] = iters
        elif iters > 0:
            self.note("--eval-iters without validation data; train.eval_interval=0")

    def run(self, name: str) -> None:
        """[train], [checkpoint], [log] and [run]."""
        get, out = self.get, self.out
        out["train.seed"] = get("seed")
        out["train.deterministic"] = get("deterministic-mode")
        out["train.stop_after_steps"] = get("exit-interval") or None
        out["train.stop_after_minutes"] = get("exit-duration-in-mins")
        save, source = get("save"), get("load")
        out["checkpoint.folder"] = save
        out["checkpoint.interval"] = (get("save-interval") or 0) if save else 0
        if save and (keep := get("save-retain-interval")):
            out["checkpoint.keep_every"] = keep
        if not save:
            self.note(f"no --save: one checkpoint at the end, in runs/{name}/checkpoints")
        if source and source == save:
            self.implied(f"--load {source}", "the newest checkpoint in checkpoint.folder is resumed")
        elif source:
            self.note(
                f"--load {source}: weights of Megatron become ours by tools/reshard_checkpoint.py; then write "
                "checkpoint.weights_from=FOLDER"
            )
        out["log.interval"] = get("log-interval")
        if project := get("wandb-project"):
            out |= {"log.wandb": True, "log.wandb_project": project}
        out["run.folder"] = f"runs/{name}"
        if minutes := get("distributed-timeout-minutes"):
            out["run.timeout_seconds"] = 60.0 * minutes


def _number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def convert(flags: Flags, name: str, ranks: int | None = None) -> tuple[Config, dict[str, Any]]:
    """The configuration, and the settings that were said. Raises: ConfigError with every problem at once."""
    made = None if flags.lost else Conversion(flags, name, ranks)  # without values little can be said
    if made is None or flags.problems:
        many = "\n".join(f"  - {p}" for p in flags.problems)
        count = len(flags.problems)
        raise ConfigError(f"{count} problem{'s' * (count > 1)} on Megatron's command line:\n{many}")
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
    for section in Config.model_fields:
        inside = {key.partition(".")[2]: value for key, value in said.items() if key.startswith(f"{section}.")}
        if inside:
            lines += ["", f"[{section}]", *(f"{key} = {_pretty(value)}" for key, value in inside.items())]
    return "\n".join(lines) + "\n"


def _pretty(value: Any) -> str:
    if isinstance(value, list) and len(value) > 1 and any(isinstance(v, dict) for v in value):
        return "[\n" + "".join(f"    {literal(v)},\n" for v in value) + "]"
    return literal(value)


def shape_name(model: ModelConfig) -> str | None:
    """The preset that has the same sizes, if any."""
    keys = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size")
    mine = [getattr(model, key) for key in keys]
    same = [n for n, row in PRESETS.items() if [row.get(k, row["num_heads"]) for k in keys] == mine]
    return next((n for n in same if PRESETS[n].get("norm_eps") == model.norm_eps), same[0] if same else None)


def summary(config: Config) -> str:
    """One line: parameters, batch, tokens."""
    b, steps = config.batch, config.train.steps
    samples = BatchPlan(b, 1).samples_after(steps)
    shape = shape_name(config.model)
    return (
        f"{num_parameters(config.model):,} parameters{f' (the shape of {shape})' if shape else ''}; "
        f"{b.global_batch_size} x {b.seq_length} = "
        f"{counted(b.global_batch_size * b.seq_length, 'token', ',')} per step; "
        f"{counted(steps, 'step', ',')}, {counted(samples * b.seq_length, 'token', ',')}"
    )
