"""Megatron-LM's flags as facts: which have a value, and what becomes of each here.

Names without dashes. A flag is in one of four tables: `READ` (it becomes a setting, or decides about one), `IMPLIED`
(what it asks for is always so here), `LEFT_OUT` (no counterpart, and none needed: the model and what it learns stay the
same to rounding) and `REFUSED` (it asks for another model, or for other arithmetic, than there is here).  Patterns with
``*`` stand for families.  Source: megatron/training/arguments.py of Megatron-LM 0.4 to 0.15 (names, types, defaults).
"""

from __future__ import annotations

READ: dict[str, type] = {  # list: one word or more; bool: none
    # the model
    "num-layers": int, "hidden-size": int, "ffn-hidden-size": int, "num-attention-heads": int, "kv-channels": int,
    "group-query-attention": bool, "num-query-groups": int, "vocab-size": int, "padded-vocab-size": int,
    "make-vocab-size-divisible-by": int, "norm-epsilon": float, "rotary-base": float, "use-rope-scaling": bool,
    "rope-scaling-factor": float, "untie-embeddings-and-output-weights": bool, "init-method-std": float,
    "position-embedding-type": str, "use-rotary-position-embeddings": bool, "normalization": str, "swiglu": bool,
    "disable-bias-linear": bool, "hidden-dropout": float, "attention-dropout": float, "seq-length": int,
    # the layout
    "tensor-model-parallel-size": int, "pipeline-model-parallel-size": int, "context-parallel-size": int,
    "num-layers-per-virtual-pipeline-stage": int, "num-virtual-stages-per-pipeline-rank": int,
    "decoder-first-pipeline-num-layers": int, "decoder-last-pipeline-num-layers": int, "sequence-parallel": bool,
    "use-tp-pp-dp-mapping": bool, "recompute-granularity": str, "recompute-activations": bool,
    "checkpoint-activations": bool,
    # batch, steps, learning rate
    "micro-batch-size": int, "global-batch-size": int, "rampup-batch-size": list, "train-iters": int,
    "train-samples": int, "lr": float, "min-lr": float, "lr-decay-style": str, "lr-decay-iters": int,
    "lr-decay-samples": int, "lr-warmup-iters": int, "lr-warmup-samples": int, "lr-warmup-fraction": float,
    "lr-wsd-decay-style": str, "lr-wsd-decay-iters": int, "lr-wsd-decay-samples": int, "adam-beta1": float,
    "adam-beta2": float, "adam-eps": float, "weight-decay": float, "clip-grad": float,
    # formats of numbers
    "bf16": bool, "fp16": bool, "initial-loss-scale": float, "min-loss-scale": float, "loss-scale-window": float,
    # data
    "data-path": list, "train-data-path": list, "valid-data-path": list, "test-data-path": list, "split": str,
    "mock-data": bool, "tokenizer-type": str, "tokenizer-model": str, "vocab-file": str, "reset-position-ids": bool,
    "reset-attention-mask": bool, "eod-mask-loss": bool,
    # the run
    "eval-interval": int, "eval-iters": int, "save": str, "load": str, "save-interval": int,
    "save-retain-interval": int, "log-interval": int, "wandb-project": str, "seed": int, "deterministic-mode": bool,
    "exit-interval": int, "exit-duration-in-mins": float, "distributed-timeout-minutes": float,
}  # fmt: skip

DEFAULTS: dict[str, object] = {  # Megatron's, where they matter and are not ours or not LLaMA's
    "num-query-groups": 1, "norm-epsilon": 1e-5, "rotary-base": 10000.0, "rope-scaling-factor": 8.0,
    "init-method-std": 0.02, "hidden-dropout": 0.1, "attention-dropout": 0.1, "normalization": "LayerNorm",
    "position-embedding-type": "learned_absolute", "tensor-model-parallel-size": 1, "pipeline-model-parallel-size": 1,
    "context-parallel-size": 1, "make-vocab-size-divisible-by": 128, "min-lr": 0.0, "lr-decay-style": "linear",
    "lr-wsd-decay-style": "exponential", "adam-beta1": 0.9, "adam-beta2": 0.999, "adam-eps": 1e-8,
    "weight-decay": 0.01, "clip-grad": 1.0, "initial-loss-scale": 2.0**32, "min-loss-scale": 1.0,
    "loss-scale-window": 1000.0, "eval-interval": 1000, "eval-iters": 100, "log-interval": 100, "seed": 1234,
    "split": "969,30,1",
}  # fmt: skip

ALIASES = {  # other names of a flag: older versions, Megatron-LLM, Megatron-DeepSpeed
    "layernorm-epsilon": "norm-epsilon", "encoder-seq-length": "seq-length", "encoder-num-layers": "num-layers",
    "num-attention-heads-kv": "num-query-groups", "num-key-value-heads": "num-query-groups",
    "no-tie-embed-logits": "untie-embeddings-and-output-weights", "persistent-save-interval": "save-interval",
    "rope-theta": "rotary-base",
}  # fmt: skip

DIALECT: dict[str, list[str]] = {  # Megatron-LLM's way to say it; its layers have no biases
    "use-rms-norm": ["--normalization", "RMSNorm", "--disable-bias-linear"],
    "glu-activation swiglu": ["--swiglu"],
}

IMPLIED: dict[str, str] = {
    "use-distributed-optimizer": "the optimizer state is always sharded over data parallel ranks",
    "overlap-grad-reduce": "overlap.grad_reduce is on by default; the result is bitwise the same",
    "overlap-param-gather": "overlap.param_gather is on by default; the result is bitwise the same",
    "tp-comm-overlap": "overlap.tensor_parallel is on by default; the result is bitwise the same",
    "async-save": "checkpoint.async_save is on by default",
    "calculate-per-token-loss": "the loss is always divided by the global number of tokens that count",
    "attention-softmax-in-fp32": "always",
    "accumulate-allreduce-grads-in-fp32": "main gradients and their reduction are always fp32",
    "exit-signal-handler": "SIGTERM, SIGUSR1, SIGUSR2 and SIGINT save and leave with status 75",
    "decoupled-weight-decay": "AdamW",
    "use-flash-attn*": "the fastest attention found is taken",
    "attention-backend": "the fastest attention found is taken",
    "use-mcore-models": "there is one implementation of the model",
    "no-position-embedding": "rotary positions only; there is no learned table",
    "no-query-key-layer-scaling": "always",
    "cross-entropy-loss-fusion": "the loss is computed in chunks: fp32 logits of the whole batch never exist",
    "no-async-tensor-model-parallel-allreduce": "overlap.tensor_parallel decides",
    "use-cpu-initialization": "initial weights follow from the seed alone, for every layout",
    "adam-decoupled": "AdamW",
    "check-for-nan-in-loss-and-grad": "a step that is not finite is skipped; train.max_bad_steps in a row end the run",
    "wandb-logger": "log.wandb follows from --wandb-project",
}

IMPLIED_VALUES: dict[str, tuple[tuple[str, ...], str, str]] = {  # flag -> values that are so here, why, else
    "optimizer": (("adam",), "AdamW", "there is AdamW only"),
    "weight-decay-incr-style": (("constant",), "weight decay is constant", "weight decay is constant here"),
    "rotary-percent": (("1.0", "1"), "rotary positions turn whole heads", "rotary positions turn whole heads here"),
    "rotary-seq-len-interpolation-factor": (("1", "1.0"), "no interpolation", "positions are not interpolated here"),
    "expert-model-parallel-size": (("1",), "no experts", "there is no mixture of experts"),
    "glu-activation": (("swiglu",), "the feed-forward network is SwiGLU", "the feed-forward network is SwiGLU here"),
    "num-experts": (("1", "0"), "no experts", "there is no mixture of experts"),
    "distributed-backend": (("nccl", "gloo"), "NCCL on GPUs, gloo on CPUs", "NCCL on GPUs and gloo on CPUs"),
    "transformer-impl": (
        ("transformer_engine", "local"), "the fastest kernel found is taken", "there is no such implementation",
    ),
    "rope-type": (("rope",), "rotary positions", "positions are rotary, without yarn"),
    "sample-rate": (("1", "1.0"), "every sample is used", "every sample is used"),
    "softmax-type": (("vanilla",), "an ordinary softmax", "attention has an ordinary softmax"),
    "lr-warmup-init": (("0", "0.0"), "the warm-up starts at 0", "the warm-up starts at 0 here"),
}  # fmt: skip

_SPEED = "a matter of speed that the program decides itself"
_LOGS = "logs are always whole: metrics.jsonl, TensorBoard, one file per rank"
_FILES = "checkpoints have one format: Hugging Face weights, all optimizer states, digests, resumed exactly"
_PROFILE = "no profiler inside; `nsys profile` and torch.profiler work from outside"
_DEEPSPEED = "DeepSpeed's; the optimizer state is sharded (ZeRO-1), gradients and weights are not"

LEFT_OUT: dict[str, str] = {
    "max-position-embeddings": "rotary positions have no table",
    "no-*-fusion": _SPEED, "*-fusion-impl": _SPEED, "no-persist-layer-norm": _SPEED, "tp-comm-*": _SPEED,
    "disable-tp-comm-*": _SPEED, "overlap-p2p-*": _SPEED, "no-overlap-p2p-*": _SPEED, "ddp-*": _SPEED,
    "no-align-*": _SPEED, "align-*": _SPEED, "overlap-param-gather-with-optimizer-step": _SPEED,
    "manual-gc*": _SPEED, "no-manual-gc-eval": _SPEED, "empty-unused-memory-level": _SPEED, "cuda-graph-*": _SPEED,
    "enable-cuda-graph": _SPEED, "external-cuda-graph": _SPEED, "te-rng-tracker": _SPEED, "use-te-*": _SPEED,
    "defer-embedding-wgrad-compute": _SPEED, "wgrad-deferral-limit": _SPEED, "use-nccl-ub": _SPEED,
    "use-sharp": _SPEED, "sharp-*": _SPEED, "nccl-*": _SPEED, "high-priority-stream-groups": _SPEED,
    "no-scatter-gather-tensors-in-pipeline": _SPEED, "microbatch-group-size-per-virtual-pipeline-stage": _SPEED,
    "distribute-saved-activations": _SPEED, "use-contiguous-parameters-in-local-ddp": _SPEED,
    "pipeline-model-parallel-comm-backend": _SPEED, "use-ring-exchange-p2p": _SPEED, "train-sync-interval": _SPEED,
    "num-workers": "a batch is prepared in the background by one thread per rank", "data-cache-path": "no cache files",
    "no-create-attention-mask-in-dataloader": _SPEED, "no-mmap-bin-files": _SPEED,
    "num-dataset-builder-threads": _SPEED, "mid-level-dataset-surplus": _SPEED, "data-impl": "files are mapped",
    "dataloader-type": "the order of samples follows from train.seed alone",
    "merge-file": "GPT-2's merges.txt is taken from beside its vocab.json",
    "tiktoken-*": "the tokenizer.json has the pattern", "trust-remote-code": "no code of a tokenizer is ever run",
    "legacy-tokenizer": "tokenizers are read as their libraries do", "tokenizer-metadata": "not needed",
    "local-rank": "the launcher says it", "lazy-mpu-init": "not needed",
    "account-for-*-in-pipeline-split": "stages are balanced by cost, embedding and head included",
    "recompute-method": "memory.recompute treats every layer alike",
    "recompute-num-layers": "memory.recompute treats every layer alike",
    "recompute-modules": "memory.recompute=selective recomputes norms, rotary positions and SwiGLU",
    "grad-reduce-in-bf16": "gradients are reduced in fp32: more exact, twice the bytes",
    "fp8-*": 'matrix products run in bf16; precision.fp8="tensorwise" is for Hopper',
    "fp8": "matrix products run in bf16",
    "first-last-layers-bf16": "all layers run in bf16", "num-layers-at-*-in-bf16": "all layers run in bf16",
    "hysteresis": "the fp16 loss scale halves at the first overflow",
    "tensorboard-*": _LOGS, "log-*": _LOGS, "no-log-*": _LOGS, "timing-log-*": _LOGS, "logging-level": _LOGS,
    "wandb-*": "log.wandb and log.wandb_project only", "no-one-logger": _LOGS, "one-logger-*": _LOGS,
    "app-tag-*": _LOGS, "no-barrier-with-level-1-timing": _LOGS, "disable-straggler-on-startup": _LOGS,
    "straggler-*": _LOGS, "config-logger-dir": "the whole configuration is in every checkpoint and log",
    "no-check-for-nan-in-loss-and-grad": "a step that is not finite is always skipped",
    "check-for-*": "loss and gradient norm are in metrics.jsonl", "rerun-mode": "no second run of a step",
    "ckpt-*": _FILES, "no-ckpt-*": _FILES, "dist-ckpt-*": _FILES, "use-dist-ckpt": _FILES, "no-save-*": _FILES,
    "no-load-*": _FILES, "auto-detect-ckpt-format": _FILES, "exit-on-missing-checkpoint": "checkpoint.resume=must",
    "use-checkpoint-*": "the configuration decides; a resume that contradicts the checkpoint is refused",
    "override-opt*": "the configuration decides the learning rate, also after a resume",
    "no-initialization": "weights that are loaded are not initialised first", "non-persistent-*": _FILES,
    "use-persistent-ckpt-worker": _FILES, "no-use-tokenizer-model-from-checkpoint-args": _FILES,
    "use-mp-args-from-checkpoint-args": "a checkpoint has no layout",
    "profile": _PROFILE, "profile-*": _PROFILE, "use-pytorch-profiler": _PROFILE, "record-memory-history": _PROFILE,
    "memory-snapshot-path": _PROFILE, "distributed-timeout-seconds-after-init": "run.timeout_seconds",
    "disable-gloo-process-groups": "checkpoints use gloo", "adlr-autoresume*": "status 75 and requeue",
    "enable-ft-package": "status 75 and requeue", "calc-ft-timeouts": "status 75 and requeue",
    "inprocess-*": "status 75 and requeue", "run-workload-inspector-server": _PROFILE,
    "use-torch-fsdp2": _DEEPSPEED, "use-megatron-fsdp": _DEEPSPEED, "init-model-with-meta-device": _SPEED,
    "data-parallel-sharding-strategy": _DEEPSPEED, "deepspeed*": _DEEPSPEED, "zero-stage": _DEEPSPEED,
    "no-pipeline-parallel": _DEEPSPEED, "num-distributed-optimizer-instances": _SPEED,
    "inference-*": "training only", "max-tokens-to-oom": "training only", "use-legacy-models": "one model",
    "cp-comm-type": "there is no context parallelism", "disable-bf16-reduced-precision-matmul": _SPEED,
    "no-strict-fsdp-dtensor-load": _FILES, "load-main-params-from-ckpt": _FILES, "replication*": _FILES,
    "moe-*": "there are no experts, and --num-experts would be refused", "iterations-to-skip": "none is skipped",
}  # fmt: skip

LEFT_OUT |= {
    **dict.fromkeys(
        ("no-clone-scatter-output-in-embedding", "disable-symmetric-registration", "fsdp-double-buffer",
         "suggested-communication-unit-size", "delay-wgrad-compute", "overlap-moe-expert-parallel-comm",
         "object-storage-cache-path", "enable-experimental", "disable-msc", "use-turbo", "onnx-safe",
         "use-fused-weighted-squared-relu", "hierarchical-context-parallel-sizes", "expert-tensor-parallel-size"),
        _SPEED,
    ),
    **dict.fromkeys(
        ("sgd-*", "muon-*", "optimizer-offload-fraction", "use-torch-optimizer-for-cpu-offload", "no-pin-cpu-*",
         "overlap-cpu-optimizer-d2h-h2d"), "of optimizers that are not chosen",
    ),
    **dict.fromkeys(("rl-*", "grpo-*", "langrl-*"), "of training that is not chosen (--perform-rl-step is refused)"),
    **dict.fromkeys(
        ("q-lora-rank", "kv-lora-rank", "qk-head-dim", "qk-pos-emb-head-dim", "v-head-dim", "rotary-scaling-factor",
         "mscale*", "mamba-*", "relative-attention-*", "ict-*", "biencoder-*", "titles-data-path", "num-classes",
         "num-channels", "patch-dim", "swin-*", "mask-*", "img-*", "short-seq-prob", "dino-*",
         "retriever-*", "vocab-extra-ids"),
        "of models that are not chosen",
    ),
    **dict.fromkeys(
        ("main-*-dtype", "exp-avg*-dtype", "use-precision-aware-optimizer"), "optimizer states are fp32: more exact",
    ),
    **dict.fromkeys(
        ("no-fp8-*", "keep-fp8-*", "te-precision-config-file", "reuse-grad-buf-*"), "matrix products run in bf16",
    ),
    **dict.fromkeys(("torch-fsdp2-*", "enable-full-sharding-in-hsdp"), _DEEPSPEED),
    **dict.fromkeys(
        ("flash-decode", "use-legacy-static-engine", "decode-only-*", "symmetric-ar-type", "*-for-prefill",
         "disable-chunked-prefill", "output-bert-embeddings"), "training only",
    ),
    "distrib-optim-*": _FILES, "result-rejected-tracker-filename": _LOGS, "error-injection-*": "no faults are planted",
    "dump-param-to-param-group-map": _LOGS, "check-weight-hash-*": "replicas get their weights from one gather",
    "decrease-batch-size-if-needed": "the batch is the same for any number of ranks",
    "multiple-validation-sets": "each source of data.valid is evaluated alone",
    "allow-ambiguous-pad-tokens": "samples have no padding",
}  # fmt: skip

_LLAMA = "LLaMA has none; remove it (--without {flag})"
REFUSED: dict[str, str] = {
    "apply-layernorm-1p": "RMSNorm's weights are stored as they are; remove it (--without {flag})",
    "apply-residual-connection-post-layernorm": "LLaMA adds the residual before the norm; remove it (--without {flag})",
    "squared-relu": "the feed-forward network is SwiGLU; write --swiglu", "openai-gelu": "write --swiglu",
    "quick-geglu": "the feed-forward network is SwiGLU; write --swiglu", "geglu": "write --swiglu",
    "add-qkv-bias": _LLAMA, "qk-layernorm": _LLAMA, "qk-l2-norm": _LLAMA, "window-size": _LLAMA,
    "window-attn-skip-freq": _LLAMA, "multi-latent-attention": _LLAMA, "mtp-*": _LLAMA,
    "use-bias": _LLAMA, "parallel-attn": _LLAMA, "parallel-layernorm": _LLAMA, "no-rope-freq": _LLAMA,
    "mrope-section": _LLAMA, "glu-linear-offset": _LLAMA, "activation-func-clamp-value": _LLAMA,
    "retro-*": _LLAMA, "bert-*": _LLAMA, "vision-*": _LLAMA, "heterogeneous-*": _LLAMA, "spec": _LLAMA,
    "hybrid-*": _LLAMA, "is-hybrid-model": _LLAMA, "lima-dropout": _LLAMA,
    "rotary-interleaved": "rotary positions turn elements i and i + d/2 of a head; remove it (--without {flag})",
    "fp32-residual-connection": "the residual has the format of the weights; remove it (--without {flag})",
    "apply-query-key-layer-scaling": "scores are not scaled by layer; remove it (--without {flag})",
    "fp16-lm-cross-entropy": "the loss is computed in fp32; remove it (--without {flag})",
    "decoupled-lr": "one learning rate for all parameters; remove it (--without {flag})",
    "decoupled-min-lr": "one learning rate for all parameters; remove it (--without {flag})",
    "loss-scale": "the fp16 loss scale is dynamic; use --bf16, or --initial-loss-scale",
    "embedding-init-method-std": "embeddings are drawn like all weights, and decayed; remove it (--without {flag})",
    "init-method-xavier-uniform": "weights are drawn from a normal distribution; remove it (--without {flag})",
    "data-parallel-random-init": "replicas are equal; remove it (--without {flag})",
    "start-weight-decay": "weight decay is constant; write --weight-decay",
    "end-weight-decay": "weight decay is constant; write --weight-decay",
    "pipeline-model-parallel-layout": "write parallel.stage_layers; remove it (--without {flag})",
    "pipeline-model-parallel-split-rank": "there is no encoder; remove it (--without {flag})",
    "data-args-path": "write its content as --data-path", "per-split-data-args-path": "write --train-data-path ...",
    "train-data-exact-num-epochs": "write --train-iters", "full-validation": "write --eval-iters",
    "model-parallel-size": "write --tensor-model-parallel-size", "batch-size": "write --micro-batch-size",
    "warmup": "write --lr-warmup-fraction", "yaml-cfg": "write the flags that are in it",
    "finetune": "start from weights by checkpoint.weights_from=FOLDER; remove it (--without {flag})",
    "pretrained-checkpoint": "start from weights by checkpoint.weights_from=FOLDER; remove it (--without {flag})",
    "perform-rl-step": "training on text only; remove it (--without {flag})", "sft": "training on text only",
    "optimizer-cpu-offload": "optimizer states stay on their device; remove it (--without {flag})",
    "cpu-offloading-num-layers": "activations stay on their device; remove it (--without {flag})",
    "fp4-*": "matrix products run in bf16; remove it (--without {flag})",
    "decoder-*": "there is no encoder beside the decoder; write --num-layers and --seq-length",
    "skip-train": "tools/plan.py says what a run will do, without one; remove it (--without {flag})",
    "test-mode": "tools/plan.py says what a run will do, without one; remove it (--without {flag})",
}  # fmt: skip
