"""Megatron-LM's flags as our configuration: the same model, batch, tokens and learning rates, or a message."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from math import cos, pi
from pathlib import Path

import pytest

from megallama.commands.from_megatron import run as main
from megallama.commands.megatron.flags import (
    ALIASES,
    ALWAYS,
    IMPLIES,
    LLAMA,
    NO_EFFECT,
    REFUSED,
    SETTINGS,
    TABLE,
    find,
)
from megallama.config.describe import settings
from megallama.config.errors import ConfigError
from megallama.config.load import load
from megallama.config.schema import Config
from megallama.optim.lr import learning_rate
from megallama.plan.params import num_parameters

SMALL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 176 --seq-length 32 --swiglu "
    "--normalization RMSNorm --disable-bias-linear --position-embedding-type rope --hidden-dropout 0 "
    "--attention-dropout 0 --untie-embeddings-and-output-weights --vocab-size 512 --micro-batch-size 2 "
    "--global-batch-size 8 --train-iters 100 --lr 1e-3 --mock-data --bf16"
)

# What published launch scripts pass, switches and values only. Sources: NVIDIA Megatron-LM
# examples/llama/train_llama3_8b_h100_fp8.sh, ROCm Megatron-LM examples/llama/train_llama2.sh (MODEL_SIZE=70),
# Pai-Megatron-Patch examples/llama2/run_pretrain_mcore_llama.sh (7B), Megatron-LLM examples/finetune.sh (llama2 7B).
NVIDIA = """
--use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
--group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192
--position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0 --hidden-dropout 0.0
--swiglu --init-method-std 0.0134 --attention-backend fused --apply-layernorm-1p --disable-bias-linear
--untie-embeddings-and-output-weights --micro-batch-size 1 --global-batch-size 128 --train-samples 1953125000
--lr-decay-samples 1949218748 --lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001 --decoupled-lr 5.0e-4
--decoupled-min-lr 4.5e-5 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95
--bf16 --grad-reduce-in-bf16 --cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc
--empty-unused-memory-level 1 --exit-duration-in-mins 235 --use-distributed-optimizer --overlap-grad-reduce
--overlap-param-gather --fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --fp8-param-gather
--tensor-model-parallel-size 1 --context-parallel-size 1 --sequence-parallel --mock-data --tokenizer-type NullTokenizer
--vocab-size 128256 --tiktoken-pattern v2 --split 99,1,0 --no-create-attention-mask-in-dataloader --no-mmap-bin-files
--num-workers 1 --log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput --profile
--profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist --distributed-timeout-minutes 60 --save ck
--load ck
"""
ROCM = """
--tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 --context-parallel-size 1 --num-layers 80
--hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64 --seq-length 4096 --max-position-embeddings 32000
--untie-embeddings-and-output-weights --position-embedding-type rope --no-position-embedding --swiglu
--disable-bias-linear --init-method-std 0.02 --attention-dropout 0.0 --hidden-dropout 0.0 --normalization RMSNorm
--micro-batch-size 2 --global-batch-size 8 --train-iters 10 --no-async-tensor-model-parallel-allreduce --bf16
--no-masked-softmax-fusion --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer_llama2 --split 99990,8,2
--dataloader-type cyclic --eval-interval 320000 --num-workers 8 --mock-data --data-cache-path cache --log-interval 1
--save-interval 5000 --log-throughput --no-save-optim --eval-iters -1 --group-query-attention --num-query-groups 8
--no-gradient-accumulation-fusion --distributed-backend nccl --distributed-timeout-minutes 120 --overlap-grad-reduce
--use-distributed-optimizer --overlap-param-gather --use-flash-attn --sequence-parallel --use-mcore-models --lr 1e-4
--min-lr 1e-5 --lr-decay-iters 320000 --lr-decay-style cosine --weight-decay 1.0e-1 --clip-grad 1.0
--ckpt-format torch_dist --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --vocab-size 32000
"""
PAI = """
--save out --train-data-path 1 mmap --data-path mmap --lr 3e-4 --min-lr 3e-5 --lr-decay-style linear --adam-beta1 0.9
--adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --init-method-std 0.006 --lr-decay-iters 953 --lr-warmup-iters 9
--train-iters 953 --split 99,1,0 --micro-batch-size 1 --global-batch-size 256 --num-layers 32 --hidden-size 4096
--num-attention-heads 32 --ffn-hidden-size 11008 --seq-length 4096 --max-position-embeddings 2048
--max-padding-length 4096 --log-interval 1 --eval-interval 10000 --eval-iters 10 --save-interval 1000
--tensorboard-queue-size 1 --tensorboard-dir tb --log-timers-to-tensorboard --log-batch-size-to-tensorboard
--log-validation-ppl-to-tensorboard --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --no-load-optim
--no-load-rng --num-workers 0 --seed 1234 --extra-vocab-size 0 --patch-tokenizer-type LLamaTokenizer
--dataset LLama-Pretrain-Idxmap --swiglu --normalization RMSNorm --use-rotary-position-embeddings --no-rope-fusion
--position-embedding-type rope --untie-embeddings-and-output-weights --disable-bias-linear
--transformer-impl transformer_engine --bf16 --use-distributed-optimizer --use-flash-attn
"""
EPFL = """
--tensor_model_parallel_size 4 --pipeline_model_parallel_size 2 --load ck0 --save ck --tensorboard_dir tb --bf16
--data_path pubmed --tokenizer_type SentencePieceTokenizer --vocab_file=tokenizer.model --global_batch_size 64
--micro_batch_size 2 --num_workers=2 --use_rms_norm --glu_activation swiglu --no_tie_embed_logits
--layernorm_epsilon 1e-5 --use_flash_attn --no_bias_gelu_fusion --seq_length 4096 --max_position_embeddings 4096
--log_interval 1 --save_interval 200 --eval_interval 200 --eval_iters 10 --hidden_dropout 0.0
--position_embedding_type rotary --no_bias_dropout_fusion --use_checkpoint_args --train_iters 1000
--attention_dropout 0.0 --adam_beta1 0.9 --adam_beta2 0.95 --adam_eps 1e-5 --lr_decay_style cosine
--lr_warmup_fraction 0.1 --lr 3e-4 --min_lr 1e-6 --weight_decay 0.1 --sequence_parallel
--recompute_granularity selective --num_layers 32 --hidden_size 4096 --num_attention_heads 32 --ffn_hidden_size 11008
--vocab_size 32000
"""


def converted(flags: str, tmp_path: Path, *options: str) -> Config:
    """What the tool writes for these flags, loaded as a user would."""
    out = tmp_path / "made.toml"
    main(["-o", str(out), *options, "--", *flags.split()])
    return load(out, (), need_data=False)


def refused(flags: str, *options: str) -> str:
    with pytest.raises(ConfigError) as caught:
        main([*options, "--", *flags.split()])
    return str(caught.value)


def test_a_small_llama(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = converted(SMALL, tmp_path)
    layer = 4 * 64 * 64 + 3 * 64 * 176 + 2 * 64
    assert num_parameters(config.model) == 2 * 512 * 64 + 4 * layer + 64 == 266_816
    b, t, o, s = config.batch, config.train, config.optimizer, config.lr_schedule
    assert (b.global_batch_size, b.micro_batch_size, b.seq_length, t.steps) == (8, 2, 32, 100)
    assert (o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.clip_grad) == (1e-3, 0.9, 0.999, 1e-8, 0.01, 1.0)
    assert (s.kind, s.wsd_decay_steps, s.warmup_steps, s.decay_steps, s.min_ratio) == ("wsd", 0, 0, 100, 0.0)
    assert (config.eval.interval, config.eval.batches, config.log.interval, t.seed) == (1000, 100, 100, 1234)
    assert (config.precision.dtype, config.memory.recompute, config.data.synthetic) == ("bf16", "none", True)
    told = capsys.readouterr().err
    assert "266,816 parameters; 8 x 32 = 256 tokens per step; 100 steps, 25,600 tokens" in told
    assert "--adam-beta2 0.999" in told and "--weight-decay 0.01" in told and "--lr-decay-style linear" in told


def test_the_toml_goes_to_standard_output(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["--", *SMALL.split()])
    out = tmp_path / "a.toml"
    out.write_text(capsys.readouterr().out)
    assert load(out, (), ranks=4) == converted(SMALL, tmp_path)


def test_nvidia_llama3_8b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = ": a LLaMA has none, or there is no counterpart; remove it"
    assert refused(NVIDIA).splitlines() == [
        "4 problems on Megatron's command line:",
        f"  - --apply-layernorm-1p{none} (--without apply-layernorm-1p); see docs/from_megatron.md",
        f"  - --decoupled-lr 5.0e-4{none} (--without decoupled-lr); see docs/from_megatron.md",
        f"  - --decoupled-min-lr 4.5e-5{none} (--without decoupled-min-lr); see docs/from_megatron.md",
        "  - --normalization is absent, which means LayerNorm; append -- --normalization RMSNorm",
    ]
    without = "--without=apply-layernorm-1p,decoupled-lr,decoupled-min-lr"
    config = converted(NVIDIA + "--normalization RMSNorm", tmp_path, without, "--ranks", "8")
    assert num_parameters(config.model) == 8_030_261_248
    assert (config.model.rope_theta, config.model.init_std, config.model.num_kv_heads) == (1e6, 0.0134, 8)
    samples = config.batch.samples_after(config.train.steps)
    assert (config.train.steps, samples) == (1_953_125_000 // 128, 1_953_125_000 - 8)
    s = config.lr_schedule
    assert (s.decay_steps, s.warmup_steps) == (1_949_218_748 // 128, 3_906_252 // 128)
    assert s.min_ratio == pytest.approx(1 / 15, rel=1e-11)
    assert config.parallel.sequence_parallel is False  # tp is 1
    assert (config.train.stop_after_minutes, config.run.timeout_seconds) == (235.0, 3600.0)
    assert (config.checkpoint.folder, config.checkpoint.interval) == ("ck", 1000)
    told = capsys.readouterr().err
    assert "for 8 ranks" in told
    assert "--train-samples 1,953,125,000 is 15,258,789 steps and 8 samples; the steps are taken" in told
    assert "more exact here, fp32 gradients and optimizer states; what is not finite is skipped:\n" in told
    assert "    --grad-reduce-in-bf16, --fp8-format hybrid, --fp8-amax-history-len 1024, " in told


def test_rocm_llama2_70b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = converted(ROCM, tmp_path, "--ranks=8")
    assert num_parameters(config.model) == 68_976_648_192
    assert (config.parallel.tp, config.parallel.sequence_parallel, config.batch.global_batch_size) == (8, True, 8)
    assert (config.train.steps, config.eval.interval) == (10, 0)
    s = config.lr_schedule
    assert (s.kind, s.decay_steps, s.warmup_steps, s.min_ratio) == ("cosine", 320_000, 0, 0.1)
    assert "68,976,648,192 parameters; 8 x 4096 = 32,768 tokens per step; 10 steps, " in capsys.readouterr().err


def test_pai_llama2_7b(tmp_path: Path) -> None:
    text = refused(PAI)
    for flag in ("max-padding-length", "extra-vocab-size", "patch-tokenizer-type", "dataset"):
        assert re.search(rf"- --{flag}( \S+)?: not known as Megatron's; if .* aside \(--without {flag}\)\n", text)
    assert "--hidden-dropout is absent, which means 0.1; append -- --hidden-dropout 0\n" in text
    assert "--vocab-size is absent; append -- --vocab-size N" in text
    assert text.startswith("7 problems")
    more = " --hidden-dropout 0 --attention-dropout 0 --vocab-size 32000"
    config = converted(PAI + more, tmp_path, "--without", "max-padding-length,extra-vocab-size",
                       "--without", "patch_tokenizer_type,dataset")  # fmt: skip
    assert num_parameters(config.model) == 6_738_415_616
    assert config.batch.global_batch_size * config.batch.seq_length * config.train.steps == 999_292_928
    s = config.lr_schedule
    assert (s.kind, s.wsd_decay_steps, s.warmup_steps, s.decay_steps, s.min_ratio) == ("wsd", 0, 9, 953, 0.1)
    assert [(d.path, d.documents) for d in config.data.valid] == [("mmap", (0.99, 1.0))]
    assert [(d.path, d.documents) for d in config.data.train] == [("mmap", (0.0, 1.0))]  # its own flag wins


def test_megatron_llm_llama2_7b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = converted(EPFL, tmp_path, "--ranks", "32")
    assert num_parameters(config.model) == 6_738_415_616
    assert (config.parallel.tp, config.parallel.pp, config.memory.recompute) == (4, 2, "selective")
    assert (config.lr_schedule.warmup_steps, config.optimizer.eps) == (100, 1e-5)
    assert config.lr_schedule.min_ratio == pytest.approx(1e-6 / 3e-4, rel=1e-11)
    assert [d.documents for d in (*config.data.train, *config.data.valid)] == [(0.0, 0.969), (0.969, 0.999)]
    assert (config.data.tokenizer, config.checkpoint.folder) == ("tokenizer.model", "ck")
    told = capsys.readouterr().err
    assert f"{LLAMA}:\n    --use_rms_norm, --glu_activation swiglu, --hidden_dropout 0.0, " in told
    assert "--load ck0: weights of Megatron become ours by megallama convert" in told
    assert "the last 0.1 % of the documents stay unread" in told


def megatron_lr(update: int, kind: str, lr: float, low: float, warmup: int, decay: int, anneal: int = 0) -> float:
    """Megatron's learning rate of update 0, 1, 2, ... with everything in updates (OptimizerParamScheduler)."""
    if warmup and update <= warmup:
        return lr * update / warmup
    if kind == "constant":
        return lr
    if update > decay:
        return low
    if kind == "WSD":
        start = decay - anneal
        return lr if update <= start else low + (lr - low) * (1 - (update - start) / anneal)
    x = (update - warmup) / (decay - warmup)
    return low + (lr - low) * (0.5 * (cos(pi * x) + 1) if kind == "cosine" else 1 - x)


@pytest.mark.parametrize(
    ("kind", "more"),
    [("cosine", ""), ("linear", ""), ("constant", ""), ("WSD", "--lr-wsd-decay-style linear --lr-wsd-decay-iters 20")],
)
@pytest.mark.parametrize("warmup", ["--lr-warmup-iters 10", "--lr-warmup-samples 80", "--lr-warmup-fraction 0.125"])
def test_learning_rates_are_megatrons(kind: str, more: str, warmup: str, tmp_path: Path) -> None:
    flags = f"{SMALL} --min-lr 1e-4 --lr-decay-style {kind} --lr-decay-iters 80 {warmup} {more}"
    config = converted(flags, tmp_path)
    for step in range(100):
        expected = megatron_lr(step + 1, kind, 1e-3, 1e-4, 10, 80, 20)  # one update ahead
        assert learning_rate(step, config.optimizer, config.lr_schedule) == pytest.approx(expected, rel=1e-9), step


def test_ramp_up(tmp_path: Path) -> None:
    """Sizes 4, 8, ..., 32 over 300 samples, then 32: steps as Megatron counts them from samples."""
    flags = SMALL.replace("--global-batch-size 8", "--global-batch-size 32").replace("--train-iters 100", "")
    more = "--rampup-batch-size 4 4 300 --train-samples 2000 --lr-warmup-samples 101 --lr-decay-samples 1500"
    config = converted(f"{flags} {more}", tmp_path)
    consumed, ends = 0, []
    while consumed < 2000:
        consumed += min(4 + int(consumed / (300 / 7)) * 4, 32)
        ends.append(consumed)
    inside = [sum(end <= samples for end in ends) for samples in (2000, 101, 1500)]
    assert [config.train.steps, config.lr_schedule.warmup_steps, config.lr_schedule.decay_steps] == inside
    assert config.batch.samples_after(config.train.steps) == ends[inside[0] - 1]
    assert (config.batch.ramp_start, config.batch.ramp_increment, config.batch.ramp_samples) == (4, 4, 300)


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1", "parallel.chunks", 2),
        ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2", "parallel.chunks", 2),
        ("--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 1", "parallel.stage_layers", (3, 1)),
        ("--use-tp-pp-dp-mapping", "parallel.rank_order", "tp-cp-pp-dp"),
        ("--tensor-model-parallel-size 2", "parallel.sequence_parallel", False),
        ("--recompute-granularity full --recompute-method uniform", "memory.recompute", "full"),
        ("--recompute-activations", "memory.recompute", "selective"),
        ("--checkpoint-activations", "memory.recompute", "full"),
        ("--use-rope-scaling --rope-scaling-factor 32", "model.rope_scaling.factor", 32.0),
        ("--kv-channels 32", "model.head_dim", 32),
        ("--group-query-attention --num-query-groups 2", "model.num_kv_heads", 2),
        ("--num-query-groups 2", "model.num_kv_heads", 4),  # Megatron ignores it
        ("--num-key-value-heads 2", "model.num_kv_heads", 2),
        ("--lr-warmup-fraction 0.29", "lr_schedule.warmup_steps", 29),
        ("--exit-interval 0", "train.stop_after_steps", None),
        ("--norm-epsilon 1e-6", "model.norm_eps", 1e-6),
        ("--rotary-base 500000", "model.rope_theta", 500000.0),
        ("--init-method-std 0.006", "model.init_std", 0.006),
        ("--wandb-project llama", "log.wandb_project", "llama"),
        ("--seed 7", "train.seed", 7),
        ("--exit-interval 50", "train.stop_after_steps", 50),
        ("--deterministic-mode", "train.deterministic", True),
        ("--save ck --save-interval 10 --save-retain-interval 50", "checkpoint.keep_every", 50),
        ("--padded-vocab-size 640", "model.vocab_size", 640),
        ("--num-layers 8", "model.num_layers", 8),  # a later flag wins
        ("--train-iters 1_000", "train.steps", 1000),
    ],
)
def test_one_flag_one_setting(flags: str, key: str, value: object, tmp_path: Path) -> None:
    found: object = converted(f"{SMALL} {flags}", tmp_path)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


def test_fp16_brings_megatrons_loss_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = converted(SMALL.replace("--bf16", "--fp16 --min-loss-scale 1"), tmp_path)
    assert "never falls below" not in capsys.readouterr().err
    converted(SMALL.replace("--bf16", "--fp16 --min-loss-scale 0.25"), tmp_path)
    assert "the fp16 loss scale never falls below 1 here" in capsys.readouterr().err
    p = config.precision
    assert (p.dtype, p.initial_loss_scale, p.loss_scale_window) == ("fp16", 2.0**32, 1000)
    assert converted(SMALL.replace("--bf16", ""), tmp_path).precision.dtype == "fp32"


def test_data(tmp_path: Path) -> None:
    flags = SMALL.replace("--mock-data", "--data-path 0.7 a 0.3 b --split 98,2,0 --reset-position-ids")
    config = converted(f"{flags} --reset-attention-mask --tokenizer-model t.model --eval-iters 5", tmp_path)
    d = config.data
    assert [(s.path, s.weight, s.documents) for s in d.train] == [("a", 0.7, (0.0, 0.98)), ("b", 0.3, (0.0, 0.98))]
    assert [(s.path, s.weight, s.documents) for s in d.valid] == [("a", 0.7, (0.98, 1.0)), ("b", 0.3, (0.98, 1.0))]
    assert (d.document_mask, d.tokenizer, config.eval.batches) == (True, "t.model", 5)


def test_what_megatron_derives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The feed-forward width and the batch that are not said; embeddings that are not untied."""
    flags = SMALL.replace("--ffn-hidden-size 176", "").replace("--global-batch-size 8", "")
    config = converted(flags.replace("--untie-embeddings-and-output-weights", ""), tmp_path, "--ranks", "6")
    assert (config.model.ffn_hidden_size, config.batch.global_batch_size, config.model.tie_embeddings) == (
        128,
        12,
        True,
    )
    assert "--global-batch-size is absent: one micro-batch per replica (ranks: 6) is 12" in capsys.readouterr().err
    config = converted(f"{flags} --context-parallel-size 2", tmp_path, "--ranks", "6")
    assert (config.parallel.cp, config.batch.global_batch_size) == (2, 6), "ranks that share a sequence are one replica"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--hidden-dropout 0.1", "--hidden-dropout 0.1: here this flag takes 0"),
        ("--normalization LayerNorm", "--normalization LayerNorm: here this flag takes RMSNorm"),
        ("--position-embedding-type learned_absolute", "learned_absolute: here this flag takes rope or rotary"),
        ("--glu-activation geglu", "--glu-activation geglu: here this flag takes swiglu"),
        ("--expert-model-parallel-size 2", "--expert-model-parallel-size 2: here this flag takes 1"),
        ("--num-experts 8", "--num-experts 8: here this flag takes 1 or 0"),
        ("--squared-relu", "--squared-relu: a LLaMA has none, or there is no counterpart; remove it (--without sq"),
        ("--qk-layernorm", "--qk-layernorm: a LLaMA has none, or there is no counterpart; remove it (--without qk-l"),
        ("--optimizer sgd", "--optimizer sgd: here this flag takes adam"),
        ("--rotary-percent 0.5", "--rotary-percent 0.5: here this flag takes 1"),
        ("--fp16", "--bf16 and --fp16: give one of them"),
        ("--train-samples 5", "--train-iters 100 and --train-samples 5: give one of them"),
        ("--lr-warmup-iters 5 --lr-warmup-fraction 0.1", "--lr-warmup-fraction 0.1 and --lr-warmup-iters or -samples"),
        ("--min-lr 1", "--min-lr 1 is above --lr 0.001; write at most this"),
        ("--lr-decay-style inverse-square-root", "here this flag takes cosine or linear or constant or WSD"),
        ("--lr-decay-style WSD", "--lr-wsd-decay-style exponential: write linear, as it is here"),
        ("--reset-position-ids", "are one setting, data.document_mask; give the first two, all three, or none"),
        ("--rampup-batch-size 4 4", "--rampup-batch-size 4 4: three whole numbers are needed"),
        ("--rampup-batch-size 4 x 8", "--rampup-batch-size 4 x 8: three whole numbers are needed"),
        ("--data-path a --split x", None),
        ("--recompute-granularity half", "--recompute-granularity half: here this flag takes full or selective"),
        ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
         "3: times 2 stages it does not divide --num-layers 4; write a divisor of 2"),
        ("--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 2",
         "--decoder-first-pipeline-num-layers 2: layers left for 3 stages: 2; leave them aside by --without, and "),
        ("--num-layrs 4", "--num-layrs 4: not known as Megatron's; if it is right, leave it aside (--without num-lay"),
        ("--lr", "--lr: here this flag takes a number"),
        ("--num-layers four", "--num-layers four: here this flag takes a whole number above 0"),
        ("--num-layers 4.5", "--num-layers 4.5: here this flag takes a whole number above 0"),
        ("--lr fast", "--lr fast: here this flag takes a number"),
        ("--hidden-size 0", "--hidden-size 0: here this flag takes a whole number above 0"),
        ("--lr-warmup-fraction nan", "--lr-warmup-fraction nan: here this flag takes a number"),
        ("--rotary-base 1e400", "--rotary-base 1e400: here this flag takes a number"),
        ("--swiglu yes", "--swiglu yes: here this flag takes no value"),
        ("--seed 1 2", "--seed 1 2: here this flag takes a whole number"),
        ("--save a b", "--save a b: here this flag takes one word"),
        ("--data-path", "--data-path: here this flag takes one word or more"),
        ("--tensor-model-parallel-size 3", "parallel.tp=3 does not divide model.num_heads=4; use 1, 2 or 4"),
    ],
)  # fmt: skip
def test_what_is_refused(flags: str, message: str | None) -> None:
    if message is None:
        base = SMALL.replace("--mock-data", "")
        assert "--split x: up to three numbers are needed, for example --split 99,1,0" in refused(f"{base} {flags}")
    else:
        assert message in refused(f"{SMALL} {flags}")


@pytest.mark.parametrize("flag", [
    "--tensor-model-parallel-size 0", "--pipeline-model-parallel-size 0", "--context-parallel-size 0", "--eval-iters x",
    "--padded-vocab-size 0", "--min-lr nan", "--eval-interval 4.5", "--lr-decay-style", "--num-layers -1",
    "--micro-batch-size 0", "--hidden-dropout nan", "--global-batch-size x", "--seq-length 0", "--train-iters x",
    "--vocab-size 0",
])  # fmt: skip
def test_a_wrong_value_is_one_problem_of_all(flag: str) -> None:
    """Also where others are computed from it: the rest goes on with Megatron's default, or without."""
    text = refused(f"{SMALL.replace(flag.split()[0], '--log-interval')} {flag} --num-layrs 4")
    assert text.startswith("2 problems") and f"- {flag}: here this flag takes " in text
    assert "--num-layrs 4: not known as Megatron's" in text


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("--swiglu", "--swiglu is absent, which means GELU; append -- --swiglu"),
        ("--disable-bias-linear", "--disable-bias-linear is absent, which means biases; append -- --disable-bias"),
        ("--normalization RMSNorm", "--normalization is absent, which means LayerNorm; append -- --normalization RMSN"),
        ("--position-embedding-type rope", "is absent, which means learned_absolute; append -- --position-embedding-t"),
        ("--attention-dropout 0", "--attention-dropout is absent, which means 0.1; append -- --attention-dropout 0"),
        ("--vocab-size 512", "--vocab-size is absent; append -- --vocab-size N"),
        ("--num-layers 4", "--num-layers is absent; append -- --num-layers N"),
        ("--hidden-size 64", "--hidden-size is absent; append -- --hidden-size N"),
        ("--num-attention-heads 4", "--num-attention-heads is absent; append -- --num-attention-heads N"),
        ("--seq-length 32", "--seq-length is absent; append -- --seq-length N"),
        ("--micro-batch-size 2", "--micro-batch-size is absent; append -- --micro-batch-size N"),
        ("--lr 1e-3", "--lr is absent; append -- --lr N"),
        ("--train-iters 100", "--train-iters is absent; append -- --train-iters N"),
        ("--global-batch-size 8", "--global-batch-size is absent: Megatron takes micro-batch x data parallel size"),
    ],
)
def test_what_must_be_said(gone: str, message: str) -> None:
    text = refused(SMALL.replace(gone, ""))
    assert message in text and text.startswith("1 problem on Megatron's command line:")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to convert; give a log, a launch script, or flags behind --\nusage: megallama from-megatron"),
        (["--ranks", "many", "--", "--lr", "1"], "--ranks 'many' is not a number of ranks; write"),
        (["-o"], "argument -o/--output: expected one argument\nusage: megallama from-megatron"),
        (["--without", "fp8-format", "--", *SMALL.split()], "--without fp8-format: the command line has no"),
        (["--ranks", "3", "--", *SMALL.split()], "batch.global_batch_size=8 is not a multiple of"),
        (["--", "8", "--lr", "1"], "'8' stands before the first flag; flags begin with --, values follow them"),
    ],
)  # fmt: skip
def test_the_tools_own_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main(arguments)
    assert message in str(caught.value)


def test_all_problems_at_once_and_nothing_written(tmp_path: Path) -> None:
    out = tmp_path / "a.toml"
    text = refused(SMALL + " --num-layrs 4 --hidden-dropout 0.1 --lr fast", "-o", str(out))
    assert text.startswith("3 problems") and not out.exists()


def test_as_a_program(tmp_path: Path) -> None:
    """Output, report and exit status as a user sees them, from another folder, and no traceback."""
    tool = Path(__file__).resolve().parents[2] / "tools" / "from_megatron_args.py"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, tool, *arguments], cwd=tmp_path, capture_output=True, text=True)

    good, bad, told = run("--", *SMALL.split()), run("--", *SMALL.split(), "--lr", "fast"), run("--help")
    lost = run("no/such.sh")
    assert (lost.returncode, lost.stdout, lost.stderr) == (2, "", "error: no/such.sh: No such file or directory\n")
    assert (
        good.returncode == 0 and tomllib.loads(good.stdout)["model"]["num_layers"] == 4 and "to look at" in good.stderr
    )
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == (
        "error: 1 problem on Megatron's command line:\n"
        "  - --lr fast: here this flag takes a number\n"
    )
    assert told.returncode == 0 and "--without" in told.stdout and "is read, never run" in told.stdout


def test_the_document_has_the_table() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "from_megatron.md").read_text(encoding="utf-8")
    rows, whys = [], list(dict.fromkeys(row.why for row in TABLE.values() if row.fate == "setting"))
    for key in whys:
        flags = [f"`--{name}`" for name, row in TABLE.items() if row.why == key]
        rows.append(f"| {', '.join(flags)} | {key if key in (LLAMA, ALWAYS) else f'`{key}`'} |")
    assert "\n".join(rows) in text, "\n".join(rows)
    instead = re.findall("`--([^`]*)`", "".join(re.findall(r"^\| `--.* \|", text, re.M)))
    assert [name for name in instead if find(name) is None] == []
    assert {"squared-relu", "finetune", "yaml-cfg", "loss-scale"} <= set(instead)
    keys = {setting.key for setting in settings()}
    assert set(whys) - {LLAMA, ALWAYS} <= keys and len(whys) > 50


def test_the_tables_do_not_contradict() -> None:
    flags = [flag for text in (SETTINGS, REFUSED, NO_EFFECT) for line in text.splitlines() for flag in names_in(line)]
    flat = [name for flag in flags for name in flag]
    assert sorted({n for n in flat if flat.count(n) > 1}) == [] and len(flat) > 300
    assert {*TABLE, *ALIASES} == set(flat) and set(ALIASES.values()) <= set(TABLE) and set(IMPLIES) <= set(TABLE)
    assert [n for n in flat if n.startswith("-") or "_" in n] == []


def names_in(line: str) -> list[list[str]]:
    """The flags of a line of the table, each with its other names."""
    rest = line if line.startswith(" ") else line.partition(": ")[2]
    return [re.split("[>:]", word)[0].split("|") for word in rest.split()]


# ---- the report has everything ----

EOD = "--reset-position-ids --reset-attention-mask --eod-mask-loss"


def reported(flags: str, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, str]:
    """The report's sections of flags that were given, by their titles."""
    main([*options, "--", *flags.split()])
    out: dict[str, str] = {}
    for part in capsys.readouterr().err.split("\n\n")[1:]:
        title, _, body = part.partition(":")
        if title not in ("to look at", "not given"):
            out[title] = " ".join(body.split())
    return out


def sections_of(flag: str, found: dict[str, str]) -> list[str]:
    return [title for title, body in found.items() for _ in re.findall(rf"(?<![\w-]){flag}(?![\w-])", body)]


VALUES = {
    **{"lr-decay-style": "cosine", "recompute-granularity": "full", "split": "98,2,0", "rampup-batch-size": "4 4 8"},
    **{"lr-wsd-decay-style": "linear", "kv-channels": "16", "min-lr": "1e-5", "lr-warmup-fraction": "0.1"},
    **{"context-parallel-size": "2", "num-query-groups": "2", "tensor-model-parallel-size": "2"},
    **dict.fromkeys(("lr-decay-samples", "lr-warmup-samples"), "80"),
    **{"distributed-timeout-minutes": "10", "train-samples": "800", "num-key-value-heads": "2"},
}
TOGETHER = {"reset-position-ids": EOD, "reset-attention-mask": EOD, "eod-mask-loss": EOD}
NOT_HERE = ("num-layers-per-virtual", "num-virtual-stages", "decoder-", "fp16")  # need or exclude others


def value_of(name: str) -> str:
    row = TABLE[name]
    if row.fate == "setting":
        some = {"": "", "int": "8", "size": "8", "float": "0.5", "str": "word", "list": "word"}
        return VALUES.get(name) or some.get(row.kind, row.kind.partition("|")[0])
    return ""


@pytest.mark.parametrize("name", sorted({*ALIASES, *(name for name, row in TABLE.items() if row.fate != "refused")}))
def test_every_flag_is_in_exactly_one_section(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    known, base = ALIASES.get(name, name), SMALL
    if f"--{known}" in base.split() or name.startswith(NOT_HERE):
        return
    if name == "train-samples":
        base = base.replace("--train-iters 100", "")
    flags = f"{base} {TOGETHER.get(name) or f'--{name} {value_of(known)}'}".replace("*", "x")
    found = reported(flags, capsys)
    for word in flags.split():
        if word.startswith("--"):
            assert len({*sections_of(word, found)}) == 1, (word, found)


@pytest.mark.parametrize("flags, idle", [
    ("--rope-scaling-factor 4", "--rope-scaling-factor 4"),
    ("--num-query-groups 2", "--num-query-groups 2"),
    ("--min-loss-scale 2", "--min-loss-scale 2"),
    ("--data-path a", "--data-path a"),
    ("--lr-wsd-decay-style linear", "--lr-wsd-decay-style linear"),
    ("--save-retain-interval 5", "--save-retain-interval 5"),
])  # fmt: skip
def test_what_has_no_effect_is_said(flags: str, idle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(f"{SMALL} {flags}", capsys)["no effect beside the other flags"] == idle
    if "rope" in flags:
        with_it = reported(f"{SMALL} {flags} --use-rope-scaling", capsys)
        assert sections_of("--rope-scaling-factor", with_it) == ["became settings, or decided about them"]


def test_what_is_given_again_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = reported(f"{SMALL} --lr 3e-4 --bf16 --layernorm-epsilon 1e-6 --norm-epsilon 1e-5", capsys)
    assert found["given again later, which counts"] == "--lr 1e-3, --bf16, --layernorm-epsilon 1e-6"
    assert sections_of("--lr", found) == ["became settings, or decided about them", "given again later, which counts"]


def test_unknown_flags_are_ignored_only_when_asked_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"{SMALL} --newest-thing 4 5 --num-layrs 9"
    text = refused(flags)
    assert "--newest-thing 4 5: not known as Megatron's; if it is right, leave it aside (--without newest-thi" in text
    found = reported(flags, capsys, "--ignore-unknown")
    assert found["left aside, as the options say"] == "--newest-thing 4 5, --num-layrs 9"
    script = tmp_path / "a.sh"
    script.write_text(f"python pretrain_gpt.py {flags}\n")
    main([str(script), "--ignore-unknown"])
    assert "--newest-thing 4 5" in capsys.readouterr().err
    assert "--apply-layernorm-1p" in refused(f"{SMALL} --apply-layernorm-1p", "--ignore-unknown")  # known, and refused


def test_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = SMALL.replace("--mock-data", "--data-path a")
    assert converted(f"{data} {EOD}", tmp_path).data.document_mask
    assert "without --eod-mask-loss" not in capsys.readouterr().err
    assert converted(f"{data} --reset-position-ids --reset-attention-mask", tmp_path).data.document_mask
    told = "without --eod-mask-loss Megatron still predicts the first token of a document; data.document_mask leaves it"
    assert told in capsys.readouterr().err
    one = "--reset-position-ids, --reset-attention-mask and --eod-mask-loss are one setting, data.document_mask; give"
    assert one in refused(f"{data} --eod-mask-loss")
    assert one in refused(f"{data} --reset-position-ids --eod-mask-loss")
    assert not converted(f"{data} --eod-mask-loss", tmp_path, "--without", "eod-mask-loss").data.document_mask
