"""Megatron-LM's flags and what becomes of each: the table of which all is made, and reading by it.

A flag becomes a setting or decides about one, has *no effect* (model and training are the same, to
rounding) or is *refused* (there is no such model, or no such arithmetic). Names are without dashes;
``*`` stands for families. Source: megatron/training/arguments.py of Megatron-LM 0.4 to 0.18.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import isfinite, nan
from typing import Any

LLAMA, ALWAYS = "what makes it a LLaMA", "what has one value here"
# section: flags that are settings of it; section.name: flags that decide about one setting; each as
# name|older name>name here:kind=Megatron's default. A kind is in KINDS, or the values there are: a|b.
# A default of another kind asks for another model; "!" is none: the flag is needed.
SETTINGS = f"""
model: num-layers|encoder-num-layers:size=! hidden-size:size=! num-attention-heads>num_heads:size=!
  norm-epsilon|layernorm-epsilon>norm_eps:float=1e-5 rotary-base|rope-theta>rope_theta:float=10000
  init-method-std>init_std:float=0.02 kv-channels>head_dim:size ffn-hidden-size:size
model.num_kv_heads: group-query-attention num-query-groups:size=1
  num-key-value-heads|num-attention-heads-kv:size
model.vocab_size: vocab-size:size=! padded-vocab-size:size
model.rope_scaling.factor: use-rope-scaling rope-scaling-factor:float=8
model.tie_embeddings: untie-embeddings-and-output-weights|no-tie-embed-logits
{LLAMA}: normalization:RMSNorm=LayerNorm swiglu:=GELU glu-activation:swiglu
  position-embedding-type:rope|rotary=learned_absolute use-rotary-position-embeddings use-rms-norm
  disable-bias-linear:=biases hidden-dropout:0=0.1 attention-dropout:0=0.1
{ALWAYS}: optimizer:adam transformer-impl:transformer_engine|local rotary-percent:1 rope-type:rope
  rotary-seq-len-interpolation-factor:1 weight-decay-incr-style:constant num-experts:1|0 sample-rate:1
  expert-model-parallel-size:1 distributed-backend:nccl|gloo softmax-type:vanilla lr-warmup-init:0
parallel: tensor-model-parallel-size>tp:size=1 pipeline-model-parallel-size>pp:size=1
  context-parallel-size>cp:size=1
parallel.chunks: num-layers-per-virtual-pipeline-stage:size num-virtual-stages-per-pipeline-rank:size
parallel.stage_layers: decoder-first-pipeline-num-layers:size decoder-last-pipeline-num-layers:size
parallel.sequence_parallel: sequence-parallel
parallel.rank_order: use-tp-pp-dp-mapping
memory.recompute: recompute-granularity:full|selective recompute-activations checkpoint-activations
batch: micro-batch-size:size=! global-batch-size:size seq-length|encoder-seq-length:size=!
batch.ramp_start: rampup-batch-size:list
optimizer: lr:float=! adam-beta1>beta1:float=0.9 adam-beta2>beta2:float=0.999
  adam-eps>eps:float=1e-8 weight-decay:float=0.01 clip-grad:float=1
log: log-interval>interval:int=100 wandb-project:str
eval: eval-interval>interval:int=1000 eval-iters>batches:int=100
train: seed:int=1234 deterministic-mode>deterministic exit-interval>stop_after_steps:int
  exit-duration-in-mins>stop_after_minutes:float
train.steps: train-iters:int=! train-samples:int
lr_schedule.kind: lr-decay-style:cosine|linear|constant|WSD=linear lr-wsd-decay-style:str=exponential
lr_schedule.min_ratio: min-lr:float=0
lr_schedule.decay_steps: lr-decay-iters:int lr-decay-samples:int
lr_schedule.warmup_steps: lr-warmup-iters:int lr-warmup-samples:int lr-warmup-fraction:float
lr_schedule.wsd_decay_steps: lr-wsd-decay-iters:int lr-wsd-decay-samples:int
precision.dtype: bf16 fp16
precision.initial_loss_scale: initial-loss-scale:float=4294967296 min-loss-scale:float=1
precision.loss_scale_window: loss-scale-window:int=1000
data: mock-data>synthetic
data.train: data-path:list train-data-path:list
data.valid: valid-data-path:list split:str=969,30,1
data.test: test-data-path:list
data.tokenizer: tokenizer-model:str vocab-file:str
data.document_mask: reset-position-ids reset-attention-mask eod-mask-loss
checkpoint.folder: save:str load:str
checkpoint.interval: save-interval|persistent-save-interval:int
checkpoint.keep_every: save-retain-interval:int
run.timeout_seconds: distributed-timeout-minutes:float
"""
NOT_CHOSEN = "of parts that are not chosen, for other uses than training, or by Megatron itself"
NO_EFFECT = f"""
always so, or decided here by the program (speed, files, tokenizers); no vocabulary is padded:
  use-distributed-optimizer async-save calculate-per-token-loss exit-signal-handler
  accumulate-allreduce-grads-in-fp32 attention-softmax-in-fp32 no-query-key-layer-scaling
  decoupled-weight-decay adam-decoupled use-mcore-models no-position-embedding
  use-cpu-initialization no-async-tensor-model-parallel-allreduce use-flash-attn* attention-backend
  num-workers *-fusion *-fusion-impl no-persist-layer-norm *tp-comm-* *overlap-* ddp-* *align-*
  *manual-gc* empty-unused-memory-level *cuda-graph* *te-rng-tracker use-te-* *wgrad-* *nccl-*
  *sharp* high-priority-stream-groups delay-* no-scatter-gather-tensors-in-pipeline
  microbatch-group-size-per-* distribute-saved-activations use-contiguous-parameters-in-local-ddp
  *-comm-backend train-sync-interval no-create-attention-mask-in-dataloader no-mmap-bin-files
  num-dataset-builder-threads mid-level-dataset-surplus *symmetric-*
  num-distributed-optimizer-instances no-clone-scatter-output-in-embedding enable-experimental
  expert-tensor-parallel-size *-gloo-process-groups data-impl data-cache-path dataloader-type
  multiple-validation-sets allow-ambiguous-pad-tokens tokenizer-type merge-file tiktoken-*
  trust-remote-code legacy-tokenizer tokenizer-metadata make-vocab-size-divisible-by
  max-position-embeddings add-position-embedding
the configuration decides what each rank holds, and how a run goes on; checkpoints have one format:
  account-for-*-in-pipeline-split recompute-* *sdp* deepspeed* zero-stage
  data-parallel-sharding-strategy no-pipeline-parallel *ckpt* no-save-* no-load-* non-persistent-*
  distrib-optim-* replication* use-checkpoint-* override-opt* check-weight-hash-* *-initialization
  *-from-checkpoint-args exit-on-missing-checkpoint distributed-timeout-seconds-after-init
  adlr-autoresume* enable-ft-package calc-ft-timeouts inprocess-* decrease-batch-size-if-needed
more exact here, fp32 gradients and optimizer states; what is not finite is skipped:
  grad-reduce-in-bf16 main-*-dtype exp-avg*-dtype use-precision-aware-optimizer *fp8*
  te-precision-config-file reuse-grad-buf-* first-last-layers-bf16 num-layers-at-*-in-bf16
  hysteresis *check-for-nan-in-loss-and-grad rerun-mode iterations-to-skip error-injection-*
logs are always whole, and profilers work from outside:
  tensorboard-* log-* no-log-* timing-log-* logging-level *one-logger* wandb-* *barrier-with-*
  *straggler-* config-logger-dir check-for-* profile* use-pytorch-profiler record-memory-history
  memory-snapshot-path run-workload-inspector-server
{NOT_CHOSEN}:
  inference-* max-tokens-to-oom flash-decode decode-only-* *-for-prefill disable-chunked-prefill
  output-bert-embeddings cp-comm-type moe-* sgd-* muon-* lion-* *-cpu-offload no-pin-cpu-* rl-*
  grpo-* optimizer-offload-fraction *-lora-rank *-head-dim mscale* rotary-scaling-factor mamba-*
  relative-attention-* ict-* biencoder-* num-classes mask-* num-channels patch-dim swin-* img-*
  short-seq-prob dino-* retriever-* vocab-extra-ids indexer-* iter-per-epoch *class*-fraction
  head-lr-mult query-in-block-prob use-legacy-* fim-* dsa-* gdp-* mhc-* linear-* logits-* qk-clip-*
  flight-recorder-* ft-num-* null-tokenizer-* sft-* local-rank lazy-mpu-init rank world-size
  data-parallel-size params-dtype transformer-pipeline-model-parallel-size
  virtual-pipeline-model-parallel-size
"""
REFUSED = """
a LLaMA has none, or there is no counterpart:
  add-qkv-bias qk-layernorm qk-l2-norm window-size window-attn-skip-freq multi-latent-attention
  use-bias parallel-attn parallel-layernorm no-rope-freq mrope-section glu-linear-offset
  lima-dropout spec activation-func-clamp-value mtp-num-layers mtp-* retro-add-retriever retro-*
  bert-* vision-pretraining vision-* hybrid-layer-pattern hybrid-override-pattern hybrid-*
  is-hybrid-model heterogeneous-layers-config-path heterogeneous-* apply-layernorm-1p
  apply-residual-connection-post-layernorm squared-relu openai-gelu quick-geglu geglu
  rotary-interleaved decoder-num-layers decoder-* fp32-residual-connection
  apply-query-key-layer-scaling fp16-lm-cross-entropy decoupled-lr decoupled-min-lr loss-scale
  embedding-init-method-std init-method-xavier-uniform data-parallel-random-init start-weight-decay
  end-weight-decay pipeline-model-parallel-layout full-validation train-data-exact-num-epochs
  data-args-path per-split-data-args-path yaml-cfg finetune pretrained-checkpoint perform-rl-step
  sft fim-data optimizer-cpu-offload cpu-offloading-num-layers fp4 fp4-* skip-train test-mode
"""
KINDS = {"": "no value", "int": "a whole number", "size": "a whole number above 0", "float": "a number"}
KINDS |= {"str": "one word", "list": "one word or more"}
IMPLIES: dict[str, dict[str, Any]] = {  # flags that say what others say
    "use-rms-norm": {"normalization": "RMSNorm", "disable-bias-linear": True},  # Megatron-LLM's
    "glu-activation": {"swiglu": True},
    "use-rotary-position-embeddings": {"position-embedding-type": "rope"},
    "recompute-activations": {"recompute-granularity": "selective"},
    "checkpoint-activations": {"recompute-granularity": "full"},
}
MARK = "\0"  # \0NAME\0 stands for a value that is not plain, \0NAME+\0 for such flags


@dataclass(frozen=True)
class Row:
    """What becomes of one flag."""

    fate: str  # setting, refused, no effect
    why: str  # the setting that it is or decides about, or the reason
    kind: str  # in KINDS, or the values that there are: a|b
    default: str  # Megatron's, where it matters
    direct: bool  # it is the setting


ALIASES: dict[str, str] = {}  # names in older versions, Megatron-LLM, Megatron-DeepSpeed
TABLE: dict[str, Row] = {}
FLAG = re.compile(r"([\w*-]+)((?:\|[\w-]+)*)(?:>(\w+))?(?::([\w|]*))?(?:=(\S+))?")
for _fate, _text in ("setting", SETTINGS), ("refused", REFUSED), ("no effect", NO_EFFECT):
    for _entry in re.split(r"\n(?! )", _text.strip()):
        _why, _, _flags = _entry.partition(":")
        for _name, _older, _here, _kind, _default in FLAG.findall(_flags):
            ALIASES |= dict.fromkeys(_older.split("|")[1:], _name)
            _direct = _fate == "setting" and re.fullmatch(r"\w+", _why) is not None
            _key = f"{_why}.{_here or _name.replace('-', '_')}" if _direct else _why
            TABLE[_name] = Row(_fate, _key, _kind, _default, _direct)


def find(name: str) -> Row | None:
    """The row of a flag, or of the family that it belongs to."""
    families = (row for pattern, row in TABLE.items() if "*" in pattern and fnmatchcase(name, pattern))
    return TABLE.get(name) or next(families, None)


def parse(kind: str, words: Sequence[str]) -> Any:
    """The value of a flag, or None: the words are not of its kind."""
    if kind in ("", "list"):
        return (list(words) or None) if kind else (not words or None)
    if len(words) != 1:
        return None
    word, number = words[0].strip("'\""), nan
    with suppress(ValueError):
        number = float(word)
    if kind == "str":
        return word
    if kind == "float":
        return number if isfinite(number) else None
    if kind in ("int", "size"):
        return int(number) if number.is_integer() and (kind == "int" or number >= 1) else None
    return next((one for one in kind.split("|") if one.lower() in (word.lower(), f"{number:g}")), None)


def plain(words: Sequence[str]) -> str:
    """The words as they are written, variables without a value included."""
    return re.sub(f"{MARK}([^{MARK}]*){MARK}", r"$\1", " ".join(words))


def key_of(word: str) -> str:
    """The name of a flag in the table."""
    name = word.lstrip("-").replace("_", "-")
    return ALIASES.get(name, name)


@dataclass
class Flags:
    """What a command line says, what is wrong with it, and what is to be looked at."""

    values: dict[str, Any] = field(default_factory=dict)  # of settings, converted; None: wrong
    given: dict[str, str] = field(default_factory=dict)  # of settings, as written
    asked: dict[str, Any] = field(default_factory=dict)  # what counts -> Megatron's default, where taken
    told: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # what becomes of others: flags
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    lost: bool = False  # flags of a script are not known, so what is absent is not known either
    ranks: int | None = None

    def __getitem__(self, name: str) -> Any:
        """The value of a flag, else Megatron's default, else None (of a switch False)."""
        row, value, absent = TABLE[name], self.values.get(name), name not in self.values
        default = parse(row.kind, [row.default]) if row.default else None
        self.asked[name] = default if absent else None
        if absent and row.default and default is None:
            means = f", which means {row.default}" if row.default != "!" else ""
            write = "" if row.kind == "" else " N" if row.kind in KINDS else f" {row.kind.split('|')[0]}"
            self.problem(f"--{name} is absent{means}; append -- --{name}{write}")
        return value if value is not None else False if row.kind == "" else default

    def note(self, text: str, *, when: object = True) -> None:
        """What is to be looked at."""
        self.notes += [text] if when else []

    def problem(self, text: str, *, when: object = True) -> None:
        """What is wrong, and what to write instead; it is said once."""
        self.problems += [text] if when and text not in self.problems else []

    def read(self, words: Sequence[str], without: Sequence[str] = (), *, ignore_unknown: bool = False) -> None:
        """Sort the words of a command; leave aside `without`, and on demand what is not known."""
        at = next((n for n, word in enumerate(words, 1) if word.endswith(".py")), 0)
        gone, flags = {key_of(word) for word in without if word}, self.pairs(words[at:])
        for name, (shown, values) in flags.items():
            row, text = find(name), plain([shown, *values])
            if name in gone or (row is None and ignore_unknown):
                self.told["left aside, as the options say"].append(text)
            elif row is None:
                self.problem(f"{text}: not known as Megatron's; if it is right, leave it aside (--without {name})")
            elif row.fate == "no effect":
                self.told[row.why].append(text)
            elif row.fate == "refused":
                self.problem(f"{text}: {row.why}; remove it (--without {name}); see docs/from_megatron.md")
            elif MARK in "".join(values):
                why = "unset in the script, computed, or set under a condition"
                self.values[name] = None
                self.problem(f"{text}: this is {why}; write NAME=VALUE behind the script, or {shown} behind --")
            else:
                self.values[name] = parse(row.kind, values)
                takes = KINDS.get(row.kind) or row.kind.replace("|", " or ")
                self.problem(f"{text}: here this flag takes {takes}", when=self.values[name] is None)
                if row.why in (LLAMA, ALWAYS):
                    self.told[row.why].append(text)
                else:
                    self.given[name] = text
        for name in sorted(gone - flags.keys()):
            self.problem(f"--without {name}: the command line has no --{name}; remove it from --without")
        for name in (name for name in IMPLIES if name in self.values):
            self.values, self.asked = self.values | IMPLIES[name], self.asked | {name: None}

    def pairs(self, words: Sequence[str]) -> dict[str, tuple[str, list[str]]]:
        """name -> the flag as written, values; a later one wins over an earlier one."""
        out: dict[str, tuple[str, list[str]]] = {}
        current: list[str] | None = None
        for word in words:
            if word.startswith("--") and len(word) > 2:
                shown, equals, value = word.partition("=")
                if earlier := out.pop(key_of(shown), None):
                    self.told["given again later, which counts"].append(plain([earlier[0], *earlier[1]]))
                current = [value] if equals else []
                out[key_of(shown)] = (shown, current)
            elif word.endswith(f"+{MARK}") or (current is None and MARK in word):
                self.lost, name = True, word.strip(MARK)
                how = f"write {name}=FLAGS behind the script ({name}= for none), or convert what Megatron prints"
                self.problem(f"{plain([word])} is not plain in the script; {how}")
            elif current is None:
                self.problem(f"{word!r} stands before the first flag; flags begin with --, values follow them")
            else:
                current.append(word)
        return out
