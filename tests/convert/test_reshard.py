"""Conversion between formats: bit-exact round trips, and each format as its own programs read it."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

from megallama.checkpoint import manifest
from megallama.config.presets import PRESETS
from megallama.config.schema import ModelConfig, RopeScaling
from megallama.convert.foreign import meta_ffn, meta_params
from megallama.convert.source import open_source
from tests.checkpoint.states import empty_solo, make_config, make_manager, make_state, solo_shards
from tests.checkpoint.test_huggingface import train_sentencepiece
from tests.convert.formats import (
    GQA,
    LLAMA3,
    MHA,
    MODELS,
    assert_equal,
    hf_folder,
    megatron_ranks,
    meta_logits,
    meta_shards,
    read_hf,
    to,
    write_ranks,
)
from tests.pool import Pool
from tests.small import small_config
from tests.train.runs import curve, state_files

transformers = pytest.importorskip("transformers")
TOKENS = torch.tensor([5, 3, 77, 130, 0, 41, 41, 9, 100, 2])
RUN = "tests.train.runs:run"
KINDS = ("step", "hf", "meta", "megatron")


def hf_logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        return model(TOKENS[None]).logits[0].double()


# ---- every pair ----


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("a", KINDS)
@pytest.mark.parametrize("b", KINDS)
def test_any_format_to_any_other_and_back_changes_no_bit(tmp_path: Path, a: str, b: str, model: str) -> None:
    tensors = hf_folder(tmp_path / "start", MODELS[model], files=3)
    tp = {"meta": 1 if model == "gqa" else 4, "megatron": 2}
    pp = {"megatron": 2}
    one = to(tmp_path / "start", tmp_path / "one", a, tp.get(a, 1), pp.get(a, 1))
    two = to(one, tmp_path / "two", b, tp.get(b, 1), pp.get(b, 1))
    last = to(two, tmp_path / "last", "hf", shard_bytes=20_000)
    assert_equal(read_hf(last), tensors)
    with open_source(two) as source:
        assert {**source.model.model_dump(), "init_std": 0} == {**MODELS[model].model_dump(), "init_std": 0}
        assert source.kind == b


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("model", ["mha", "llama3-tied"])
def test_meta_round_trips_for_every_number_of_files(tmp_path: Path, model: str, ranks: int, dtype: torch.dtype) -> None:
    chosen = MODELS[model].model_copy(update={"num_kv_heads": 8})
    tensors = hf_folder(tmp_path / "hf", chosen, dtype)
    to(tmp_path / "hf", tmp_path / "meta", "meta", ranks)
    assert len(meta_shards(tmp_path / "meta")) == ranks
    to(tmp_path / "meta", tmp_path / "back", "hf")
    assert_equal(read_hf(tmp_path / "back"), tensors)


@pytest.mark.parametrize("tp,pp", [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2), (2, 4), (4, 2), (4, 4)])
@pytest.mark.parametrize("model", MODELS)
def test_megatron_shards_are_what_its_layers_hold(tmp_path: Path, model: str, tp: int, pp: int) -> None:
    tensors = hf_folder(tmp_path / "hf", MODELS[model])
    to(tmp_path / "hf", tmp_path / "ours", "megatron", tp, pp, vocab_multiple=16)
    padded = -(-MODELS[model].vocab_size // (16 * tp)) * 16 * tp
    want = megatron_ranks(tensors, MODELS[model], tp, pp, padded)
    assert {p.name for p in (tmp_path / "ours").glob("mp_rank_*")} == want.keys()
    for name, held in want.items():
        assert_equal(load_file(tmp_path / "ours" / name / "model.safetensors"), held)
    write_ranks(tmp_path / "theirs", want, tmp_path / "hf")
    to(tmp_path / "theirs", tmp_path / "back", "hf")
    assert_equal(read_hf(tmp_path / "back"), tensors)


def test_vocabulary_is_padded_to_128_times_tp_and_cut_again(tmp_path: Path) -> None:
    tensors = hf_folder(tmp_path / "hf", GQA)
    to(tmp_path / "hf", tmp_path / "mg", "megatron", 2)
    found = [load_file(tmp_path / f"mg/mp_rank_0{t}/model.safetensors")["output_layer.weight"] for t in (0, 1)]
    assert [tuple(x.shape) for x in found] == [(128, 64), (128, 64)]
    assert torch.equal(torch.cat(found)[:131], tensors["lm_head.weight"]) and not torch.cat(found)[131:].any()


def test_norms_of_megatron_without_transformer_engine_are_read(tmp_path: Path) -> None:
    tensors = hf_folder(tmp_path / "hf", GQA)
    names = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    ranks = {}
    for rank, held in megatron_ranks(tensors, GQA, 2, 2, 256).items():
        ranks[rank] = {k.replace(old, names[old]): v for k, v in held.items() for old in names if old in k}
        ranks[rank] |= {k: v for k, v in held.items() if not k.endswith(tuple(names))}
        ranks[rank]["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(3)
    write_ranks(tmp_path / "local", ranks, tmp_path / "hf")
    to(tmp_path / "local", tmp_path / "back", "hf")
    assert_equal(read_hf(tmp_path / "back"), tensors)


# ---- what the other programs compute ----


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("model", ["mha", "llama3-tied"])
def test_meta_files_give_hugging_faces_logits(tmp_path: Path, model: str, ranks: int) -> None:
    hf_folder(tmp_path / "hf", MODELS[model], torch.float32)
    to(tmp_path / "hf", tmp_path / "meta", "meta", ranks)
    want = hf_logits(tmp_path / "hf")
    assert (meta_logits(tmp_path / "meta", TOKENS) - want).abs().max() < 1e-5 * want.abs().max()
    to(tmp_path / "meta", tmp_path / "back", "hf")
    assert torch.equal(hf_logits(tmp_path / "back"), want)


def test_each_meta_tensor_is_cut_as_its_parallel_layer_cuts_it(tmp_path: Path) -> None:
    for model, embedding in ((MHA, [160, 16]), (LLAMA3, [40, 64])):
        hf_folder(tmp_path / f"hf{embedding[0]}", model)
        to(tmp_path / f"hf{embedding[0]}", tmp_path / f"meta{embedding[0]}", "meta", 4)
        for held in meta_shards(tmp_path / f"meta{embedding[0]}"):
            shapes = {k: list(t.shape) for k, t in held.items() if "layers." not in k or k.startswith("layers.2.")}
            kv = 64 // 4 if model is MHA else 32 // 4
            assert shapes == {
                "tok_embeddings.weight": embedding,
                "norm.weight": [64],
                "output.weight": [40, 64],
                "layers.2.attention.wq.weight": [16, 64],
                "layers.2.attention.wk.weight": [kv, 64],
                "layers.2.attention.wv.weight": [kv, 64],
                "layers.2.attention.wo.weight": [64, 16],
                "layers.2.feed_forward.w1.weight": [24, 64],
                "layers.2.feed_forward.w2.weight": [64, 24],
                "layers.2.feed_forward.w3.weight": [24, 64],
                "layers.2.attention_norm.weight": [64],
                "layers.2.ffn_norm.weight": [64],
            }


def test_a_tensor_of_a_pth_file_has_a_storage_of_its_own(tmp_path: Path) -> None:
    hf_folder(tmp_path / "hf", MHA)
    to(tmp_path / "hf", tmp_path / "meta", "meta", 2)
    held = meta_shards(tmp_path / "meta")[0]
    assert all(t.untyped_storage().nbytes() == t.numel() * 2 and t.storage_offset() == 0 for t in held.values())


# ---- params.json ----


@pytest.mark.parametrize(
    "model",
    [*PRESETS.values(), MHA, GQA, LLAMA3, MHA.model_copy(update={"ffn_hidden_size": 97})],
)
def test_params_json_gives_our_width_by_metas_formula(model) -> None:
    if not isinstance(model, ModelConfig):
        model = ModelConfig(**model)
    params = meta_params(model)
    assert meta_ffn(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier")) == model.ffn_hidden_size


def test_params_json_says_only_what_is_needed() -> None:
    llama = ModelConfig(
        hidden_size=4096, num_layers=32, num_heads=32, ffn_hidden_size=11008, vocab_size=32000, norm_eps=1e-6
    )
    want = {"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32000, "multiple_of": 256, "norm_eps": 1e-6}
    assert meta_params(llama) == want
    three = llama.model_copy(
        update={"num_kv_heads": 8, "ffn_hidden_size": 14336, "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 5e5}
    )
    more = {"n_kv_heads": 8, "ffn_dim_multiplier": 1.3, "rope_theta": 5e5}
    assert meta_params(three) == want | more | {"vocab_size": 128256, "norm_eps": 1e-5}
    small = three.model_copy(update={"rope_scaling": RopeScaling(factor=32.0)})
    assert meta_params(small) == meta_params(three) | {"use_scaled_rope": True, "rope_scaling_factor": 32.0}


def test_the_first_llama_says_its_vocabulary_nowhere_but_in_the_tensors(tmp_path: Path) -> None:
    tensors = hf_folder(tmp_path / "hf", MHA)
    to(tmp_path / "hf", tmp_path / "meta", "meta", 2)
    params = json.loads((tmp_path / "meta/params.json").read_text())
    (tmp_path / "meta/params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    shards = meta_shards(tmp_path / "meta")
    for r, held in enumerate(shards):
        torch.save(held | {"rope.freqs": torch.ones(4)}, tmp_path / f"meta/consolidated.{r:02d}.pth")
    to(tmp_path / "meta", tmp_path / "back", "hf", context=4096)
    assert_equal(read_hf(tmp_path / "back"), tensors)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["vocab_size"], config["max_position_embeddings"]) == (160, 4096)


# ---- number formats, small files ----


def test_dtype_changes_every_file_and_config_json(tmp_path: Path) -> None:
    tensors = hf_folder(tmp_path / "hf", GQA, torch.float32)
    to(tmp_path / "hf", tmp_path / "mg", "megatron", 2, dtype="bf16")
    to(tmp_path / "mg", tmp_path / "back", "hf", dtype="fp32")
    assert_equal(read_hf(tmp_path / "back"), {n: t.bfloat16().float() for n, t in tensors.items()})
    assert json.loads((tmp_path / "mg/config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "float32"


def test_config_and_tokenizer_are_carried_over(tmp_path: Path) -> None:
    hf_folder(tmp_path / "hf", GQA)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    config |= {"max_position_embeddings": 77, "eos_token_id": [4, 5], "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "hf" / name).write_text(json.dumps({"x": name}))
    (tmp_path / "hf/README.md").write_text("no")
    to(tmp_path / "hf", tmp_path / "mg", "megatron", 2, 2)
    to(tmp_path / "mg", tmp_path / "back", "hf")
    assert json.loads((tmp_path / "back/config.json").read_text()) == config
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert not (tmp_path / "back/README.md").exists()


def test_files_are_at_most_as_large_as_asked(tmp_path: Path) -> None:
    hf_folder(tmp_path / "hf", GQA)
    to(tmp_path / "hf", tmp_path / "out", "hf", shard_bytes=30_000)
    sizes = [p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 5 and max(sizes) < 34_000
    assert torch.equal(hf_logits(tmp_path / "out"), hf_logits(tmp_path / "hf"))


# ---- step folders ----


def test_a_step_from_weights_is_the_start_of_a_run(tmp_path: Path) -> None:
    tensors = hf_folder(tmp_path / "hf", GQA)
    step = to(tmp_path / "hf", tmp_path / "run", "step")
    assert step.name == "step-00000000" and not list(tmp_path.glob("*.tmp"))
    shards = empty_solo(GQA)
    counters = make_manager(tmp_path / "run", make_config(GQA)).resume(shards)
    assert counters is not None and (counters["step"], counters["tokens"], counters["scaler"]) == (0, 0, {})
    for shard in shards:
        assert torch.equal(shard.state["master"], tensors[shard.box.key].float().reshape(-1))
        assert not shard.state["exp_avg"].any() and not shard.state["exp_avg_sq"].any()
    assert_equal(read_hf(step / "model"), tensors)


def test_a_step_from_a_step_keeps_moments_and_counters(tmp_path: Path) -> None:
    state = make_state(GQA)
    make_manager(tmp_path / "a", make_config(GQA)).save(7, solo_shards(state), {"step": 7, "data": [1, 2]})
    step = to(tmp_path / "a/step-00000007", tmp_path / "b", "step", dtype="fp32")
    assert manifest.read_manifest(step).body["counters"] == {"step": 7, "data": [1, 2]}
    shards = empty_solo(GQA)
    make_manager(tmp_path / "b", make_config(GQA, "fp32")).resume(shards)
    for shard in shards:
        for kind, tensor in shard.state.items():
            assert torch.equal(tensor, state[kind][shard.box.key].reshape(-1)), kind
    assert_equal(read_hf(step / "model"), state["master"])


def test_a_wider_format_than_the_saved_one_comes_from_the_master_weights(tmp_path: Path) -> None:
    state = make_state(GQA)
    make_manager(tmp_path / "a", make_config(GQA)).save(1, solo_shards(state), {})
    to(tmp_path / "a/step-00000001", tmp_path / "wide", "hf", dtype="fp32")
    assert_equal(read_hf(tmp_path / "wide"), state["master"])
    to(tmp_path / "a/step-00000001", tmp_path / "as_saved", "hf")
    assert_equal(read_hf(tmp_path / "as_saved"), {n: t.bfloat16() for n, t in state["master"].items()})


# ---- memory ----


class AnonymousPeak:
    """Peak growth of this process's anonymous memory [bytes] while it is open."""

    def __enter__(self) -> AnonymousPeak:
        self.start, self.bytes, self._stop = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.bytes = max(self.bytes, self._now() - self.start)

    def _now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def test_memory_is_that_of_the_largest_tensor_whatever_the_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "head_dim": 64, "ffn_hidden_size": 1408, "num_layers": 16, "vocab_size": 4096}
    hf_folder(tmp_path / "hf", MHA.model_copy(update=sizes), torch.float32)  # 222 MB, the largest tensor 8.4 MB
    for kind, tp, pp, source, target in (
        ("megatron", 4, 4, "hf", "mg"),
        ("meta", 4, 1, "mg", "meta"),
        ("hf", 1, 1, "meta", "back"),
        ("step", 1, 1, "hf", "run"),
    ):
        with AnonymousPeak() as peak:
            to(tmp_path / source, tmp_path / target, kind, tp, pp)
        assert peak.bytes < 80e6, (kind, peak.bytes)
    shutil.rmtree(tmp_path)


# ---- training goes on ----


def test_training_from_a_converted_step_is_training_from_the_weights(pool: Pool, tmp_path: Path) -> None:
    """Two runs on the same data: from Hugging Face weights, and resumed from the step made of Megatron's shards."""
    model = small_config().model
    model = model.model_copy(update={"num_kv_heads": model.num_heads, "head_dim": 8})
    hf_folder(tmp_path / "hf", model)
    to(tmp_path / "hf", tmp_path / "mg", "megatron", 2, 2)
    to(tmp_path / "mg", tmp_path / "resumed/checkpoints", "step")
    sections = {"parallel": {"tp": 2}, "precision": {"dtype": "bf16"}, "train": {"steps": 4}}
    for name, checkpoint in (("weights", {"weights_from": str(tmp_path / "hf")}), ("resumed", {"resume": "must"})):
        for answer in pool.run(2, RUN, str(tmp_path / name), sections | {"checkpoint": checkpoint}):
            assert answer == {"status": 0, "step": 4, "updates": 4}
    assert curve(tmp_path / "resumed") == curve(tmp_path / "weights")
    assert state_files(tmp_path / "resumed") == state_files(tmp_path / "weights")


# ---- tokenizers of Meta's release ----


def test_the_sentencepiece_tokenizer_above_metas_folder_is_carried_and_begins_with_bos(tmp_path: Path) -> None:
    hf_folder(tmp_path / "hf", MHA)
    to(tmp_path / "hf", tmp_path / "llama/7B", "meta", 2)
    model = train_sentencepiece(tmp_path).rename(tmp_path / "llama/tokenizer.model")
    to(tmp_path / "llama/7B", tmp_path / "back", "hf")
    assert (tmp_path / "back/tokenizer.model").read_bytes() == model.read_bytes()
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["max_position_embeddings"]) == (1, 2, 2048)
    assert json.loads((tmp_path / "back/tokenizer_config.json").read_text())["add_bos_token"] is True
    step = to(tmp_path / "llama/7B", tmp_path / "run", "step")
    assert (step / "model/tokenizer.model").read_bytes() == model.read_bytes()
    assert manifest.read_manifest(step).body["tokenizer"] == hashlib.sha256(model.read_bytes()).hexdigest()


def test_a_step_of_an_earlier_version_is_converted_with_an_equal_tokenizer_json(tmp_path: Path) -> None:
    """Which it has not got itself: such versions wrote the SentencePiece model alone."""
    hf_folder(tmp_path / "hf", MHA)
    train_sentencepiece(tmp_path).rename(tmp_path / "hf/tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": False, "legacy": False}
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(settings))
    step = to(tmp_path / "hf", tmp_path / "run", "step")
    assert not (step / "model/tokenizer.json").exists()
    to(step, tmp_path / "out", "hf")
    ours = SentencePieceProcessor(model_file=str(tmp_path / "hf/tokenizer.model"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("the quick", " the quick", "  7", "\n dog"):
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (step / "model/tokenizer.model").read_bytes()


def test_the_tokenizer_of_llama_3_is_carried_as_it_is(tmp_path: Path) -> None:
    hf_folder(tmp_path / "hf", LLAMA3)
    to(tmp_path / "hf", tmp_path / "meta", "meta", 2)
    (tmp_path / "meta/tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    to(tmp_path / "meta", tmp_path / "back", "hf")
    assert (tmp_path / "back/tokenizer.model").read_bytes() == b"IQ== 0\nIg== 1\n"
    step = to(tmp_path / "back", tmp_path / "run", "step")
    assert manifest.read_manifest(step).body["tokenizer"] is None
