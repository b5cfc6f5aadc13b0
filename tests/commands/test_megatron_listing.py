"""The list of arguments that Megatron prints at its start gives what the flags of the run give."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from megallama.commands.from_megatron import run as main
from megallama.config.errors import ConfigError
from megallama.config.load import load
from megallama.config.schema import Config

FLAGS = (
    "--num-layers 28 --hidden-size 3072 --num-attention-heads 24 --ffn-hidden-size 10752 --seq-length 2048 "
    "--train-iters 20 --data-path 0.7 data/a 0.3 data/b --global-batch-size 512 --disable-bias-linear "
    "--init-method-std 0.00747 --normalization RMSNorm --seed 42 --untie-embeddings-and-output-weights --swiglu "
    "--attention-dropout 0 --hidden-dropout 0 --use-rotary-position-embeddings --group-query-attention "
    "--num-query-groups 8 --eval-iters 5 --log-interval 1 --adam-beta2 0.95 --adam-eps 1e-5 --lr 1.5e-4 "
    "--min-lr 1.5e-5 --lr-decay-style cosine --weight-decay 1e-1 --bf16 --tensor-model-parallel-size 4 "
    "--sequence-parallel --micro-batch-size 1 --recompute-activations --vocab-size 50257 "
    "--no-mmap-bin-files --lr-warmup-samples 1024"
)
# what a run with these flags prints, as far as it matters: names as in Megatron's namespace, defaults included
PRINTED: dict[str, object] = {
    "accumulate_allreduce_grads_in_fp32": True, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-05,
    "add_bias_linear": False, "add_position_embedding": True, "add_qkv_bias": False, "apply_layernorm_1p": False,
    "async_save": None, "async_tensor_model_parallel_allreduce": False, "attention_backend": "AttnBackend.auto",
    "attention_dropout": 0.0, "bert_binary_head": True, "bert_embedder_type": "megatron", "bf16": True,
    "clip_grad": 1.0, "config_logger_dir": "", "context_parallel_size": 1, "cp_comm_type": ["p2p"],
    "data_parallel_size": 2, "data_path": ["0.7", "data/a", "0.3", "data/b"], "decoder_num_layers": None,
    "decoupled_lr": None, "distributed_timeout_minutes": 10, "encoder_num_layers": 28, "encoder_seq_length": 2048,
    "end_weight_decay": 0.1, "eval_interval": 1000, "eval_iters": 5, "ffn_hidden_size": 10752, "fp16": False,
    "global_batch_size": 512, "group_query_attention": True, "hidden_dropout": 0.0, "hidden_size": 3072,
    "init_method_std": 0.00747, "initial_loss_scale": 4294967296, "kv_channels": 128, "layernorm_epsilon": 1e-05,
    "log_interval": 1, "lr": 0.00015, "lr_decay_iters": None, "lr_decay_style": "cosine", "lr_warmup_fraction": None,
    "lr_warmup_init": 0.0, "lr_warmup_iters": 0, "lr_warmup_samples": 1024, "lr_wsd_decay_style": "exponential",
    "make_vocab_size_divisible_by": 128, "micro_batch_size": 1, "min_lr": 1.5e-05, "mmap_bin_files": False,
    "mock_data": False, "mtp_loss_scaling_factor": 0.1, "multi_latent_attention": False, "normalization": "RMSNorm",
    "num_attention_heads": 24, "num_experts": None, "num_layers": 28, "num_query_groups": 8, "optimizer": "adam",
    "padded_vocab_size": 50688, "params_dtype": "torch.bfloat16", "pipeline_model_parallel_size": 1,
    "position_embedding_type": "rope", "profile_ranks": [0], "qk_layernorm": False, "rampup_batch_size": None,
    "recompute_granularity": "selective", "rope_scaling_factor": 8.0, "rotary_base": 10000, "rotary_percent": 1.0,
    "save": None, "seed": 42, "seq_length": 2048, "sequence_parallel": True, "split": "969, 30, 1",
    "start_weight_decay": 0.1, "swiglu": True, "tensor_model_parallel_size": 4, "train_data_path": None,
    "train_iters": 20, "train_samples": None, "transformer_impl": "transformer_engine",
    "untie_embeddings_and_output_weights": True, "use_distributed_optimizer": True,
    "use_rotary_position_embeddings": True, "virtual_pipeline_model_parallel_size": None, "vocab_size": 50257,
    "wandb_project": "", "weight_decay": 0.1, "world_size": 8,
}  # fmt: skip


def listing(prefix: str = "", **changes: object) -> str:
    """The lines as Megatron prints them."""
    rows = {**PRINTED, **changes}
    lines = [f"  {name} {'.' * (48 - len(name))} {value}" for name, value in sorted(rows.items())]
    begin, end = "-" * 24 + " arguments " + "-" * 24, "-" * 20 + " end of arguments " + "-" * 21
    return "".join(f"{prefix}{line}\n" for line in [begin, *lines, end])


def converted(text: str, tmp_path: Path, *more: str) -> Config:
    log, out = tmp_path / "train.log", tmp_path / "out.toml"
    log.write_text(text)
    main([str(log), "-o", str(out), *more])
    return load(out, ["run.folder=x"], need_data=False)


def by_flags(tmp_path: Path, flags: str = FLAGS) -> Config:
    main(["-o", str(tmp_path / "flags.toml"), "--ranks", "8", "--", *flags.split()])
    return load(tmp_path / "flags.toml", ["run.folder=x"], need_data=False)


@pytest.mark.parametrize("prefix", ["", "[default0]:", "0: ", "2026-01-01 10:00:00,123 [rank 0] INFO - "])
def test_the_listing_gives_what_the_flags_give(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = converted(f"using world size: 8\n{listing(prefix)}> building tokenizer ...\n", tmp_path)
    told = capsys.readouterr().err
    assert mine == by_flags(tmp_path)
    assert mine.lr_schedule.warmup_steps == 2 and mine.data.valid[0].documents == (0.969, 0.999)
    assert "for 8 ranks" in told and "--no-mmap-bin-files" in told
    for silent in ("--num-experts", "padded-vocab", "bert", "mtp", "weight-decay 0.1 ", "--encoder", "0-query-groups"):
        assert silent not in told
    assert "--end-weight-decay" not in told and "given again" not in told


def test_the_last_whole_list_counts(tmp_path: Path) -> None:
    first, last = listing(seed=1, hidden_size=1), listing(seed=2)
    cut = "".join(listing(seed=3).splitlines(keepends=True)[:20])
    assert converted(first + last + cut, tmp_path).train.seed == 2
    assert converted(first + cut + last, tmp_path).train.seed == 2
    with pytest.raises(ConfigError, match="the log holds no whole list of arguments"):
        converted(cut, tmp_path)


def test_flags_behind_win_and_flags_can_be_left_aside(tmp_path: Path) -> None:
    assert converted(listing(), tmp_path, "--", "--seed", "7", "--clip-grad", "2").train.seed == 7
    assert converted(listing(apply_layernorm_1p=True), tmp_path, "--without", "apply-layernorm-1p").train.seed == 42
    with pytest.raises(ConfigError, match="is a log, which has no variables; write flags behind --"):
        converted(listing(), tmp_path, "TP=2")


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(listing()))
    main(["-"])
    assert "seed = 42" in capsys.readouterr().out


def test_what_is_not_a_llama_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        converted(
            listing(add_bias_linear=True, add_qkv_bias=True, qk_layernorm=True, expert_model_parallel_size=2,
                    num_experts=8, normalization="LayerNorm", hidden_dropout=0.1, decoupled_lr=1e-3, mtp_num_layers=1),
            tmp_path,
        )  # fmt: skip
    for problem in (
        "9 problems on Megatron's command line:",
        "--disable-bias-linear is absent, which means biases; append", "--add-qkv-bias: a LLaMA has none, or there is",
        "--qk-layernorm: a LLaMA has none", "--mtp-num-layers 1: a LLaMA has none",
        "--expert-model-parallel-size 2: here this flag takes 1", "--num-experts 8: here this flag takes 1 or 0",
        "--hidden-dropout is absent, which means 0.1", "--normalization is absent, which means LayerNorm",
        "--decoupled-lr 0.001: a LLaMA has none, or there is no counterpart; remove it (--without decoupled-lr)",
    ):  # fmt: skip
        assert problem in str(caught.value)


def test_the_vocabulary(tmp_path: Path) -> None:
    """The tokenizer's size is known from a later line only; without it, the rows of the model."""
    later = " > padded vocab (size: 50257) with 431 dummy tokens (new size: 50688)\n"
    assert converted(listing(vocab_size=None, padded_vocab_size=None) + later, tmp_path).model.vocab_size == 50257
    assert converted(listing(vocab_size=None) + later, tmp_path).model.vocab_size == 50257
    assert converted(listing(vocab_size=None), tmp_path).model.vocab_size == 50688
    with pytest.raises(ConfigError, match="--vocab-size is absent; append -- --vocab-size N"):
        converted(listing(vocab_size=None, padded_vocab_size=None), tmp_path)


def test_what_is_not_known_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a_new_argument_whose_name_is_longer_than_all_the_dots"
    converted(listing(**{name: "all", "newest_thing": True, "off_thing": False, "none_thing": None}), tmp_path)
    told = capsys.readouterr().err
    assert "printed, but not known here, defaults among them (does one change the model?):\n" in told
    assert f"{name.replace('_', '-')}=all" in told and "newest-thing=True" in told and "-thing=" in told
    assert "off-thing" not in told and "none-thing" not in told


def test_values_that_stand_for_no_default(tmp_path: Path) -> None:
    """Megatron's defaults are not said again where nothing follows from them; other values are."""
    converted(listing(lr_wsd_decay_style="exponential"), tmp_path)
    for name, value, problem in (
        ("hidden_dropout", 0.2, "--hidden-dropout 0.2: here this flag takes 0"),
        ("optimizer", "sgd", "--optimizer sgd: here this flag takes adam"),
        ("lr_decay_style", "WSD", "--lr-wsd-decay-style exponential: write linear, as it is here"),
        ("num_layers", "many", "--num-layers many: here this flag takes a whole number above 0"),
    ):
        with pytest.raises(ConfigError) as caught:
            converted(listing(**{name: value}), tmp_path)
        assert problem in str(caught.value) and str(caught.value).startswith("1 problem ")


def test_names_of_other_versions(tmp_path: Path) -> None:
    older = converted(listing(layernorm_epsilon=1e-6), tmp_path)
    assert older.model.norm_eps == 1e-6
    both = converted(listing(layernorm_epsilon=1e-6, norm_epsilon=1e-7), tmp_path)
    assert both.model.norm_eps == 1e-7


def test_other_values(tmp_path: Path) -> None:
    changes: dict[str, object] = {
        "train_iters": None, "train_samples": 10240, "rampup_batch_size": ["128", "128", "1024"], "mock_data": True,
        "data_path": None, "group_query_attention": False, "num_query_groups": 1, "bf16": False, "fp16": True,
        "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 7, "save": "ck", "load": "ck",
        "save_interval": 10, "exit_duration_in_mins": 30, "use_rope_scaling": True, "rope_scaling_factor": 32.0,
    }  # fmt: skip
    config = converted(listing(**changes), tmp_path)
    assert (config.model.num_kv_heads, config.precision.dtype, config.parallel.chunks) == (24, "fp16", 2)
    assert (config.batch.ramp_start, config.batch.ramp_samples, config.data.synthetic) == (128, 1024, True)
    assert config.model.rope_scaling is not None and config.model.rope_scaling.factor == 32.0
    assert (config.checkpoint.folder, config.checkpoint.interval, config.train.stop_after_minutes) == ("ck", 10, 30.0)
