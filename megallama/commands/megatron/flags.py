"""Megatron-LM's flags and what becomes of each: one table, from which reading, report and documentation are made.

A flag becomes a setting (or decides about one), is *implied* (what it asks for is always so here), *left out* (no
counterpart, and none needed: the model and what it learns stay the same to rounding) or *refused* (it asks for another
model, or for other arithmetic, than there is here). Names are without dashes; ``*`` stands for families. Source:
megatron/training/arguments.py of Megatron-LM 0.4 to 0.18 (names, types, defaults).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import isfinite, nan
from typing import Any

SETTINGS = {  # setting: its flags, as name|older name:type=Megatron's default; without a type it is a switch
    "model.num_layers": "num-layers|encoder-num-layers:int",
    "model.hidden_size": "hidden-size:int",
    "model.num_heads": "num-attention-heads:int",
    "model.num_kv_heads": "group-query-attention"
        " num-query-groups|num-attention-heads-kv|num-key-value-heads:int=1",
    "model.head_dim": "kv-channels:int",
    "model.ffn_hidden_size": "ffn-hidden-size:int",
    "model.vocab_size": "vocab-size:int padded-vocab-size:int make-vocab-size-divisible-by:int=128"
        " tokenizer-type:str",
    "model.norm_eps": "norm-epsilon|layernorm-epsilon:float=1e-5",
    "model.rope_theta": "rotary-base|rope-theta:float=10000",
    "model.rope_scaling.factor": "use-rope-scaling rope-scaling-factor:float=8",
    "model.tie_embeddings": "untie-embeddings-and-output-weights|no-tie-embed-logits",
    "model.init_std": "init-method-std:float=0.02",
    "what makes it a LLaMA": "normalization:str=LayerNorm"
        " position-embedding-type:str=learned_absolute swiglu use-rotary-position-embeddings"
        " disable-bias-linear hidden-dropout:float=0.1 attention-dropout:float=0.1"
        " context-parallel-size:int=1",
    "parallel.tp": "tensor-model-parallel-size:int=1",
    "parallel.pp": "pipeline-model-parallel-size:int=1",
    "parallel.chunks": "num-layers-per-virtual-pipeline-stage:int"
        " num-virtual-stages-per-pipeline-rank:int",
    "parallel.stage_layers": "decoder-first-pipeline-num-layers:int"
        " decoder-last-pipeline-num-layers:int",
    "parallel.sequence_parallel": "sequence-parallel",
    "parallel.rank_order": "use-tp-pp-dp-mapping",
    "memory.recompute": "recompute-granularity:str recompute-activations checkpoint-activations",
    "batch.micro_batch_size": "micro-batch-size:int",
    "batch.global_batch_size": "global-batch-size:int",
    "batch.seq_length": "seq-length|encoder-seq-length:int",
    "batch.ramp_start": "rampup-batch-size:list",
    "train.steps": "train-iters:int train-samples:int",
    "optimizer.lr": "lr:float",
    "optimizer.beta1": "adam-beta1:float=0.9",
    "optimizer.beta2": "adam-beta2:float=0.999",
    "optimizer.eps": "adam-eps:float=1e-8",
    "optimizer.weight_decay": "weight-decay:float=0.01",
    "optimizer.clip_grad": "clip-grad:float=1",
    "lr_schedule.kind": "lr-decay-style:str=linear lr-wsd-decay-style:str=exponential",
    "lr_schedule.min_ratio": "min-lr:float=0",
    "lr_schedule.decay_steps": "lr-decay-iters:int lr-decay-samples:int",
    "lr_schedule.warmup_steps": "lr-warmup-iters:int lr-warmup-samples:int lr-warmup-fraction:float",
    "lr_schedule.wsd_decay_steps": "lr-wsd-decay-iters:int lr-wsd-decay-samples:int",
    "precision.dtype": "bf16 fp16",
    "precision.initial_loss_scale": "initial-loss-scale:float=4294967296 min-loss-scale:float=1",
    "precision.loss_scale_window": "loss-scale-window:float=1000",
    "data.train": "data-path:list train-data-path:list",
    "data.valid": "valid-data-path:list split:str=969,30,1",
    "data.test": "test-data-path:list",
    "data.synthetic": "mock-data",
    "data.tokenizer": "tokenizer-model:str vocab-file:str",
    "data.document_mask": "reset-position-ids reset-attention-mask eod-mask-loss",
    "train.eval_interval": "eval-interval:int=1000",
    "train.eval_batches": "eval-iters:int=100",
    "train.seed": "seed:int=1234",
    "train.deterministic": "deterministic-mode",
    "train.stop_after_steps": "exit-interval:int",
    "train.stop_after_minutes": "exit-duration-in-mins:float",
    "checkpoint.folder": "save:str load:str",
    "checkpoint.interval": "save-interval|persistent-save-interval:int",
    "checkpoint.keep_every": "save-retain-interval:int",
    "log.interval": "log-interval:int=100",
    "log.wandb_project": "wandb-project:str",
    "run.timeout_seconds": "distributed-timeout-minutes:float",
}
IMPLIED = {  # why it is so: flags; name=value|value: only with these values, and refused with others
    "the optimizer state is always sharded over data parallel ranks": "use-distributed-optimizer",
    "overlap.grad_reduce is on by default; the result is bitwise the same": "overlap-grad-reduce",
    "overlap.param_gather is on by default; the result is bitwise the same": "overlap-param-gather",
    "overlap.tensor_parallel is on by default; the result is bitwise the same":
        "tp-comm-overlap no-async-tensor-model-parallel-allreduce",
    "checkpoint.async_save is on by default": "async-save",
    "the loss is always divided by the global number of tokens that count":
        "calculate-per-token-loss",
    "main gradients, their reduction and the softmax are always fp32":
        "accumulate-allreduce-grads-in-fp32 attention-softmax-in-fp32 no-query-key-layer-scaling",
    "SIGTERM, SIGUSR1, SIGUSR2 and SIGINT save and leave with status 75": "exit-signal-handler",
    "there is AdamW only": "optimizer=adam decoupled-weight-decay adam-decoupled",
    "the fastest attention and the fastest kernels found are taken": "use-flash-attn*"
        " attention-backend transformer-impl=transformer_engine|local",
    "there is one implementation of the model": "use-mcore-models",
    "rotary positions turn whole heads here": "no-position-embedding rotary-percent=1.0|1"
        " rope-type=rope",
    "positions are not interpolated here": "rotary-seq-len-interpolation-factor=1|1.0",
    "the loss is computed in chunks: fp32 logits of the whole batch never exist":
        "cross-entropy-loss-fusion",
    "initial weights follow from the seed alone, for every layout": "use-cpu-initialization",
    "a step that is not finite is skipped; train.max_bad_steps in a row end the run":
        "check-for-nan-in-loss-and-grad",
    "log.wandb follows from --wandb-project": "wandb-logger",
    "weight decay is constant here": "weight-decay-incr-style=constant",
    "there is no mixture of experts": "num-experts=1|0 expert-model-parallel-size=1",
    "NCCL on GPUs and gloo on CPUs": "distributed-backend=nccl|gloo",
    "every sample is used": "sample-rate=1|1.0",
    "attention has an ordinary softmax": "softmax-type=vanilla",
    "the warm-up starts at 0 here": "lr-warmup-init=0|0.0",
    "as --normalization RMSNorm --disable-bias-linear": "use-rms-norm",  # Megatron-LLM's layers have no biases
    "as --swiglu": "glu-activation=swiglu",
}
LEFT_OUT = {  # why: flags
    "a matter of speed that the program decides itself": "*-fusion *-fusion-impl"
        " no-persist-layer-norm *tp-comm-* *overlap-* ddp-* *align-* *manual-gc*"
        " empty-unused-memory-level *cuda-graph* *te-rng-tracker use-te-* *wgrad-* *nccl-* *sharp*"
        " high-priority-stream-groups no-scatter-gather-tensors-in-pipeline"
        " microbatch-group-size-per-* use-turbo onnx-safe distribute-saved-activations"
        " use-contiguous-parameters-in-local-ddp delay-* *-comm-backend use-ring-exchange-p2p"
        " train-sync-interval no-create-attention-mask-in-dataloader no-mmap-bin-files disable-msc"
        " num-dataset-builder-threads mid-level-dataset-surplus init-model-with-meta-device"
        " *symmetric-* num-distributed-optimizer-instances disable-bf16-reduced-precision-matmul"
        " no-clone-scatter-output-in-embedding suggested-communication-unit-size"
        " object-storage-cache-path enable-experimental fsdp-double-buffer"
        " use-fused-weighted-squared-relu hierarchical-context-parallel-sizes"
        " expert-tensor-parallel-size",
    "a batch is prepared in the background by one thread per rank": "num-workers",
    "files are mapped, without cache files and padding; the order of samples follows from train.seed alone":
        "data-impl data-cache-path dataloader-type multiple-validation-sets"
        " allow-ambiguous-pad-tokens",
    "rotary positions have no table": "max-position-embeddings add-position-embedding",
    "tokenizers are read from their files, as their libraries do, and no code of theirs is run":
        "merge-file tiktoken-* trust-remote-code legacy-tokenizer tokenizer-metadata",
    "stages are balanced by cost, embedding and head included": "account-for-*-in-pipeline-split",
    "memory.recompute treats every layer alike": "recompute-method recompute-num-layers",
    "memory.recompute=selective recomputes norms, rotary positions and SwiGLU": "recompute-modules",
    "gradients are reduced in fp32: more exact, twice the bytes": "grad-reduce-in-bf16",
    'matrix products run in bf16; precision.fp8="tensorwise" is for Hopper':
        "fp8 *fp8-* te-precision-config-file reuse-grad-buf-* first-last-layers-bf16"
        " num-layers-at-*-in-bf16",
    "optimizer states are fp32: more exact": "main-*-dtype exp-avg*-dtype"
        " use-precision-aware-optimizer",
    "the fp16 loss scale halves at the first overflow": "hysteresis",
    "logs are always whole: metrics.jsonl, TensorBoard, one file per rank":
        "tensorboard-* log-* no-log-* timing-log-* logging-level *one-logger* app-tag-*"
        " *barrier-with-* *straggler-* result-rejected-tracker-filename"
        " dump-param-to-param-group-map config-logger-dir check-for-* wandb-*",
    "a step that is not finite is always skipped, and no other":
        "no-check-for-nan-in-loss-and-grad rerun-mode iterations-to-skip error-injection-*",
    "checkpoints have one format: Hugging Face weights, all optimizer states, digests, resumed exactly":
        "*ckpt-* use-dist-ckpt no-save-* no-load-* non-persistent-* distrib-optim-* replication*"
        " load-main-params-from-ckpt no-strict-fsdp-dtensor-load"
        " no-use-tokenizer-model-from-checkpoint-args check-weight-hash-* *-initialization",
    "the configuration decides; a resume that contradicts the checkpoint is refused":
        "use-checkpoint-* override-opt* use-mp-args-from-checkpoint-args",
    "checkpoint.resume=must": "exit-on-missing-checkpoint",
    "no profiler inside; `nsys profile` and torch.profiler work from outside":
        "profile profile-* use-pytorch-profiler record-memory-history memory-snapshot-path"
        " run-workload-inspector-server",
    "run.timeout_seconds": "distributed-timeout-seconds-after-init",
    "checkpoints use gloo": "disable-gloo-process-groups use-gloo-process-groups",
    "status 75 and requeue": "adlr-autoresume* enable-ft-package calc-ft-timeouts inprocess-*",
    "the batch is the same for any number of ranks": "decrease-batch-size-if-needed",
    "the optimizer state is sharded (ZeRO-1), gradients and weights are not":
        "*fsdp* deepspeed* zero-stage data-parallel-sharding-strategy no-pipeline-parallel"
        " enable-full-sharding-in-hsdp",
    "training only": "inference-* max-tokens-to-oom flash-decode use-legacy-static-engine"
        " decode-only-* *-for-prefill disable-chunked-prefill output-bert-embeddings",
    "of parts that are not chosen": "cp-comm-type moe-* sgd-* muon-* lion-* *-cpu-offload"
        " no-pin-cpu-* rl-* grpo-* optimizer-offload-fraction langrl-* q-lora-rank kv-lora-rank"
        " qk-head-dim qk-pos-emb-head-dim v-head-dim mscale* rotary-scaling-factor mamba-*"
        " relative-attention-* ict-* biencoder-* titles-data-path num-classes mask-* num-channels"
        " patch-dim swin-* img-* short-seq-prob dino-* retriever-* vocab-extra-ids indexer-*"
        " iter-per-epoch *per-class-fraction classes-fraction head-lr-mult query-in-block-prob"
        " use-legacy-models fim-* dsa-* gdp-* mhc-* linear-* logits-* qk-clip-* flight-recorder-*"
        " ft-num-* null-tokenizer-* sft-*",
    "the launcher or Megatron itself says it": "local-rank lazy-mpu-init rank world-size"
        " data-parallel-size params-dtype transformer-pipeline-model-parallel-size"
        " virtual-pipeline-model-parallel-size",
}
REFUSED = {  # why: flags; name=flag: what to write instead
    "LLaMA has none": "add-qkv-bias qk-layernorm qk-l2-norm window-size window-attn-skip-freq"
        " multi-latent-attention use-bias parallel-attn parallel-layernorm no-rope-freq"
        " mrope-section glu-linear-offset lima-dropout spec activation-func-clamp-value"
        " mtp-num-layers mtp-* retro-add-retriever retro-* bert-* vision-pretraining vision-*"
        " hybrid-layer-pattern hybrid-override-pattern hybrid-* is-hybrid-model"
        " heterogeneous-layers-config-path heterogeneous-*",
    "RMSNorm's weights are stored as they are": "apply-layernorm-1p",
    "LLaMA adds the residual before the norm": "apply-residual-connection-post-layernorm",
    "the feed-forward network is SwiGLU": "squared-relu=swiglu openai-gelu=swiglu"
        " quick-geglu=swiglu geglu=swiglu",
    "rotary positions turn elements i and i + d/2 of a head": "rotary-interleaved",
    "the residual has the format of the weights": "fp32-residual-connection",
    "scores are not scaled by layer": "apply-query-key-layer-scaling",
    "the loss is computed in fp32": "fp16-lm-cross-entropy",
    "one learning rate for all parameters": "decoupled-lr decoupled-min-lr",
    "the fp16 loss scale is dynamic": "loss-scale=initial-loss-scale",
    "embeddings are drawn like all weights, and decayed": "embedding-init-method-std",
    "weights are drawn from a normal distribution": "init-method-xavier-uniform",
    "replicas are equal": "data-parallel-random-init",
    "weight decay is constant": "start-weight-decay=weight-decay end-weight-decay=weight-decay",
    "parallel.stage_layers says it in the TOML": "pipeline-model-parallel-layout",
    "there is no encoder": "pipeline-model-parallel-split-rank decoder-num-layers=num-layers"
        " decoder-* decoder-seq-length=seq-length",
    "there is no such flag any more": "warmup=lr-warmup-iters batch-size=micro-batch-size"
        " full-validation=eval-iters model-parallel-size=tensor-model-parallel-size"
        " train-data-exact-num-epochs=train-iters",
    "files of flags are not read": "data-args-path=data-path"
        " per-split-data-args-path=train-data-path yaml-cfg",
    "a run starts from weights by checkpoint.weights_from=FOLDER": "finetune pretrained-checkpoint",
    "there is training on text only, from its beginning to its end": "perform-rl-step sft fim-data",
    "optimizer states and activations stay on their device": "optimizer-cpu-offload"
        " cpu-offloading-num-layers",
    "matrix products run in bf16": "fp4 fp4-*",
    "megallama plan says what a run will do, without one": "skip-train test-mode",
}
NOT_CHOSEN = "of parts that are not chosen"
TYPES = {"": bool, "int": int, "float": float, "str": str, "list": list}  # list: one word or more; bool: none
KINDS = {int: "a whole number", float: "a number", str: "a word", list: "one word or more"}
SIZES = ("-size", "-layers", "-heads", "-groups", "-length", "-by", "-rank", "-stage", "-channels")  # from 1 on
MARK = "\0"  # \0?NAME\0 stands for a variable without a value, \0!NAME\0 for one that is not plain


@dataclass(frozen=True)
class Row:
    """What becomes of one flag."""

    fate: str  # setting, implied, left out, refused
    why: str  # the setting, or the reason
    kind: type
    default: Any  # Megatron's, where it matters
    values: list[str]  # the only ones that are implied; what to write instead of what is refused


ALIASES: dict[str, str] = {}  # other names of a flag: older versions, Megatron-LLM, Megatron-DeepSpeed
TABLE: dict[str, Row] = {}
for _fate, _rows in ("setting", SETTINGS), ("implied", IMPLIED), ("refused", REFUSED), ("left out", LEFT_OUT):
    for _why, _flag in ((why, flag) for why, flags in _rows.items() for flag in flags.split()):
        _names, _, _rest = _flag.partition("=")
        _names, _, _kind = _names.partition(":")
        _name, *_older = _names.split("|")
        ALIASES |= dict.fromkeys(_older, _name)
        _default = TYPES[_kind](_rest) if _kind and _rest else None
        TABLE[_name] = Row(_fate, _why, TYPES[_kind], _default, _rest.split("|") if _rest else [])


def find(name: str) -> Row | None:
    """The row of a flag, or of the family that it belongs to."""
    families = (row for pattern, row in TABLE.items() if "*" in pattern and fnmatchcase(name, pattern))
    return TABLE.get(name) or next(families, None)


def plain(words: Sequence[str]) -> str:
    """The words as they are written, variables without a value included."""
    return re.sub(f"{MARK}.([^{MARK}]*){MARK}", r"$\1", " ".join(words))


def key_of(word: str) -> str:
    """The name of a flag in the table."""
    name = word.lstrip("-").replace("_", "-")
    return ALIASES.get(name, name)


@dataclass
class Flags:
    """What a command line says, what is wrong with it, and what is to be looked at."""

    values: dict[str, Any] = field(default_factory=dict)  # of settings, converted; None: wrong
    given: dict[str, str] = field(default_factory=dict)  # of settings, as written
    asked: dict[str, Any] = field(default_factory=dict)  # what was asked for -> Megatron's default, where it was taken
    implied: list[tuple[str, str]] = field(default_factory=list)  # flags, and why
    left_out: list[tuple[str, str]] = field(default_factory=list)
    aside: list[tuple[str, str]] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)  # printed by Megatron, and not known here
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    lost: dict[str, list[str]] = field(default_factory=dict)  # variables without a value -> the flags that need them
    launcher: str = ""  # the words before the program's own flags
    ranks: int | None = None

    def __getitem__(self, name: str) -> Any:
        """The value of a flag, else Megatron's default, else None (of a switch False)."""
        row, value = TABLE[name], self.values.get(name)
        self.asked[name] = None if name in self.values else row.default
        return (False if row.kind is bool else row.default) if value is None else value

    def note(self, text: str, *, when: object = True) -> None:
        """What is to be looked at."""
        self.notes += [text] if when else []

    def problem(self, text: str, *, when: object = True) -> None:
        """What is wrong, and what to write instead."""
        self.problems += [text] if when else []

    def read(self, words: Sequence[str], without: Sequence[str] = (), *, ignore_unknown: bool = False) -> None:
        """Sort the words of a command; `without`, and on demand flags that are not known, are left aside."""
        at = next((n for n, word in enumerate(words, 1) if word.endswith(".py")), 0)
        self.launcher = plain(words[:at])
        per = re.search(r"--(?:nproc.per.node|num.gpus)[ =](\d+)", self.launcher)
        nodes = re.search(r"--n(?:um.)?nodes[ =](\S+)", self.launcher)
        if per and (nodes is None or nodes[1].isdecimal()):
            self.ranks = int(per[1]) * int(nodes[1] if nodes else 1)
        gone, flags = {key_of(word) for word in without}, self.pairs(words[at:])
        for name, (shown, values) in flags.items():
            if name in gone:
                self.aside.append((plain([shown, *values]), "as --without says"))
            elif row := find(name):
                self.take(row, name, shown, values)
            else:
                near = difflib.get_close_matches(name, [n for n in TABLE if "*" not in n], n=1, cutoff=0.75)
                hint = f"did you mean --{near[0]}?" if near else ""
                if ignore_unknown:
                    self.aside.append((plain([shown, *values]), f"not known as Megatron's{hint and '; '}{hint}"))
                    continue
                write = f"leave it aside: --without {name} (--ignore-unknown: all such)"
                hint = f"{hint} If not" if hint else "if it is right"
                self.problem(f"{shown} is not known as Megatron's; {hint}, {write}")
        for name in sorted(gone - flags.keys()):
            self.problem(f"--without {name}: the command line has no --{name}; remove it from --without")
        for mark, users in self.lost.items():
            kind, name = mark[0], mark[1:]
            needed = f", for {', '.join(users[:3])}{' ...' * (len(users) > 3)}," if users else ""
            why, write = "has no value in the script", f"{name}={'FLAGS' if kind == '+' else 'VALUE'} behind the script"
            if kind != "?":
                why = "is set under a condition or computed, which is not read"
                write += ", or convert the list that Megatron prints"
            elif not re.fullmatch(r"\w+", name):
                write = f"-- {users[0]} VALUE at the end"
            self.problem(f"${name.rstrip('+')}{needed} {why}; write {write}")

    def pairs(self, words: Sequence[str]) -> dict[str, tuple[str, list[str]]]:
        """name -> the flag as written, values; a later one wins over an earlier one of the same name."""
        out: dict[str, tuple[str, list[str]]] = {}
        current: list[str] | None = None
        for word in words:
            if word.startswith("--") and len(word) > 2:
                shown, equals, value = word.partition("=")
                if earlier := out.pop(key_of(shown), None):
                    self.aside.append((plain([earlier[0], *earlier[1]]), "given again later, which counts"))
                current = [value] if equals else []
                out[key_of(shown)] = (shown, current)
            elif word.startswith(f"{MARK}+"):
                self.lost.setdefault(word.strip(MARK), [])
            elif current is not None:
                current.append(word)
            elif word.startswith(MARK):
                self.note(f"{plain([word])} has no value in the script; left out")
            else:
                self.problem(f"{word!r} stands before the first flag; flags begin with --, values follow them")
        return out

    def take(self, row: Row, name: str, shown: str, values: list[str]) -> None:
        """Put one flag where it belongs."""
        text, said = plain([shown, *values]), " ".join(v for v in values if MARK not in v)
        remove = f"remove it (--without {name})"
        if row.fate == "setting":
            self.given[name], self.values[name] = text, self.value(row, name, shown, values)
            if name == "num-query-groups" and key_of(shown) != shown.lstrip("-").replace("_", "-"):
                self.values["group-query-attention"] = True  # where other programs say it, it counts by itself
        elif row.fate == "left out":
            self.left_out.append((text, row.why))
        elif row.fate == "refused":
            self.problem(f"{text}: {row.why}; {f'write --{row.values[0]}' if row.values else remove}")
        elif row.values and said.lower() not in row.values:
            self.problem(f"{text}: {row.why}; write {shown} {row.values[0]}, or {remove}")
        else:
            self.implied.append((f"{shown} {said}" if row.values else shown, row.why))
            more = self.pairs(row.why.split()[1:]) if row.why.startswith("as --") else {}
            self.values |= {flag: words[0] if words else True for flag, (_, words) in more.items()}

    def value(self, row: Row, name: str, shown: str, values: list[str]) -> Any:
        """The value of a flag that becomes a setting, or None and a problem."""
        kind, number, wrong = row.kind, nan, ""
        sized = kind is int and name.endswith(SIZES)
        behind = [v for v in values[kind is not bool :] if v.startswith(f"{MARK}?")] if kind is not list else []
        self.notes += [f"{plain([v])} has no value in the script; left out" for v in behind]
        values = [v for v in values if v not in behind]
        lost = re.findall(f"{MARK}([^{MARK}]*){MARK}", " ".join(values))
        for variable in lost:
            self.lost.setdefault(variable, []).append(shown)
        if kind is bool and values:
            wrong = f" takes no value, but {plain(values)!r} follows; remove it"
        elif kind is not bool and not values:
            wrong = f" has no value; write {shown} and {KINDS[kind]}"
        elif kind is not list and len(values) > 1:
            wrong = f" takes one value, but got {plain(values)!r}; write {shown} {values[0]}"
        elif kind in (int, float) and not lost:
            with suppress(ValueError):
                number = float(values[0])
            if isfinite(number) and (number >= 1 or not sized) and (kind is float or number.is_integer()):
                return kind(number)
            like = f"{row.default:g}" if row.default else "8" if kind is int else "0.1"
            what = f"{KINDS[kind]}{' above 0' * sized}; write for example {shown} {like}"
            wrong = f" {values[0]}: this is not {what}"
        self.problem(f"{shown}{wrong}", when=wrong)
        return None if lost or wrong else {bool: True, list: values}.get(kind, values and values[0].strip("'\""))
