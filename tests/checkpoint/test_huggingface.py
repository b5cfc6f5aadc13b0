"""model/ opens with Hugging Face's own programs, and their folders open with ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megallama.checkpoint import reader
from megallama.checkpoint.disk import CheckpointError, DamagedError
from megallama.checkpoint.huggingface import model_files, read_model_config
from megallama.checkpoint.manifest import architecture
from megallama.config.load import load
from megallama.config.schema import Config, ModelConfig, RopeScaling
from megallama.inference.generate import load_llama
from megallama.plan.box import Box
from megallama.plan.topology import Topology
from tests.checkpoint.states import (
    MODEL,
    assert_holds,
    boxes,
    empty,
    empty_solo,
    make_config,
    make_manager,
    make_state,
    on_grid,
    save_on,
    solo_shards,
)

transformers = pytest.importorskip("transformers")

SCALED = MODEL.model_copy(
    update={
        "rope_theta": 500000.0,
        "tie_embeddings": True,
        "rope_scaling": RopeScaling(factor=32.0, original_max_position=8192),
    }
)
WIDE_HEADS = MODEL.model_copy(update={"head_dim": 16, "norm_eps": 1e-6, "num_kv_heads": None})


def saved(folder: Path, config: Config, **more) -> Path:
    make_manager(folder, config, **more).save(1, solo_shards(make_state(config.model)), {})
    return folder / "step-00000001"


def hf_folder(folder: Path, model: ModelConfig, dtype: torch.dtype, **save) -> dict[str, torch.Tensor]:
    """A folder written by transformers alone; its tensors."""
    scaling = model.rope_scaling
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if scaling:
        rope |= {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": scaling.original_max_position}
    config = transformers.LlamaConfig(
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        rms_norm_eps=model.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=model.tie_embeddings,
    )
    theirs = transformers.LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    theirs.save_pretrained(folder, **save)
    tensors = dict(theirs.state_dict())
    if model.tie_embeddings:
        del tensors["lm_head.weight"]
    return tensors


@pytest.mark.parametrize("model", [MODEL, SCALED, WIDE_HEADS], ids=["gqa", "llama3-tied", "head_dim"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_from_pretrained_has_our_weights_and_settings(model: ModelConfig, dtype: str, tmp_path) -> None:
    step = saved(tmp_path, make_config(model, dtype))
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(step / "model", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    want = make_state(model)["master"]
    bits = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert theirs.dtype == bits
    found = theirs.state_dict()
    assert all(torch.equal(found[name], tensor.to(bits)) for name, tensor in want.items())
    c = theirs.config
    rope = dict(c.rope_parameters)
    if model.rope_scaling is None:
        assert rope == {"rope_type": "default", "rope_theta": 10000.0} and c.max_position_embeddings == 64
    else:
        assert rope == {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        assert c.max_position_embeddings == 131_072
    assert (c.rms_norm_eps, c.tie_word_embeddings) == (model.norm_eps, model.tie_embeddings)
    assert (c.head_dim, c.bos_token_id, c.eos_token_id) == (model.head_dim, None, None)


@pytest.mark.parametrize("model", [MODEL, SCALED, WIDE_HEADS], ids=["gqa", "llama3-tied", "head_dim"])
def test_config_json_reads_back(model: ModelConfig, tmp_path) -> None:
    step = saved(tmp_path, make_config(model))
    assert architecture(read_model_config(step / "model")) == architecture(model)
    settings = json.loads((step / "model/config.json").read_text())
    if model.rope_scaling:  # the form of transformers 4: theta beside the scaling
        assert settings["rope_theta"] == 500000.0 and settings["rope_scaling"]["rope_type"] == "llama3"


@pytest.mark.parametrize(
    "preset, longest",
    [("llama-65b", 2048), ("llama3-8b", 8192), *((f"llama3.{x}", 131_072) for x in ("1-8b", "1-405b", "2-1b", "2-3b"))],
)
def test_the_longest_sequence_is_the_published_one_everywhere(preset: str, longest: int, tmp_path) -> None:
    tokenizer = tmp_path / "vocab.json"
    tokenizer.write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    files = model_files(load(None, [f"model.preset={preset}"], need_data=False), tokenizer)
    assert json.loads(files["config.json"])["max_position_embeddings"] == longest
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == longest


def test_another_scaling_reaches_as_far_as_it_stretches(tmp_path) -> None:
    words = ["model.preset=llama3.1-8b", "model.rope_scaling.factor=4", "batch.seq_length=1024"]
    for more, longest in ([], 32768), (["batch.seq_length=65536"], 65536):
        config = load(None, [*words, *more], need_data=False)
        assert json.loads(model_files(config, None)["config.json"])["max_position_embeddings"] == longest


@pytest.mark.parametrize("model", [MODEL, SCALED], ids=["gqa", "llama3-tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", ["5GB", "50KB"])
def test_weights_of_a_hugging_face_folder(model: ModelConfig, dtype: torch.dtype, size: str, tmp_path) -> None:
    tensors = hf_folder(tmp_path / "hf", model, dtype, max_shard_size=size)
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (size == "50KB")
    config, grid = make_config(model), Topology(tp=2, pp=2, dp=2)
    zeros = {name: torch.zeros(t.shape) for name, t in tensors.items()}
    state = {"master": {n: t.float() for n, t in tensors.items()}, "exp_avg": zeros, "exp_avg_sq": zeros}

    def rank(group):
        shards = empty(boxes(model, grid, 1, group.rank, owned=False))
        make_manager(tmp_path / "x", config, group).load_weights(tmp_path / "hf", shards)
        assert_holds(shards, state)

    on_grid(grid, rank)
    llama = load_llama(tmp_path / "hf")
    assert architecture(llama.model) == architecture(model) and llama.weights.keys() == tensors.keys()
    assert all(torch.equal(llama.weights[n], t) and llama.weights[n].dtype == dtype for n, t in tensors.items())


@pytest.mark.parametrize("span", [reader.SPAN_BYTES, 300])
def test_open_folder_reads_boxes_of_step_and_model_folders(tmp_path, monkeypatch, span: int) -> None:
    monkeypatch.setattr(reader, "SPAN_BYTES", span)
    step, want = saved(tmp_path, make_config()), make_state()["master"]
    name = "model.layers.2.mlp.down_proj.weight"
    for folder in (step, step / "model"):
        box, rows = torch.empty(27 * 14), torch.empty(9, 56, dtype=torch.bfloat16)
        with reader.open_folder(folder) as files:
            assert list(files.places) == list(want) and files.tensor(name).dtype == torch.bfloat16
            assert torch.equal(files.tensor(name), want[name].bfloat16())
            files.read_into(Box(name, (3, 7), (30, 21)), box)
            files.read_rows(name, 5, rows)
            assert reader.equal_rows(files, name, files, name)
            assert not reader.equal_rows(files, name, files, name.replace("2", "3"))
        assert torch.equal(box.view(27, 14), want[name].bfloat16().float()[3:30, 7:21])
        assert torch.equal(rows, want[name].bfloat16()[5:14])


def test_a_flipped_bit_under_load_llama_is_named(tmp_path) -> None:
    step = saved(tmp_path, make_config())
    path = next((step / "model").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=rf"{path.name} is damaged in block {(len(data) - 1) // 4096} "):
        load_llama(step)


def test_masters_of_our_step_folder_are_taken_and_moments_reset(tmp_path) -> None:
    step, shards, want = saved(tmp_path, make_config()), empty_solo(), make_state()
    make_manager(tmp_path / "x", make_config()).load_weights(step / "model", shards)
    zeros = {n: torch.zeros_like(t) for n, t in want["master"].items()}
    assert_holds(shards, want | {"exp_avg": zeros, "exp_avg_sq": zeros})


def test_tensors_that_do_not_fit_are_listed(tmp_path) -> None:
    hf_folder(tmp_path / "hf", MODEL.model_copy(update={"num_layers": 5, "ffn_hidden_size": 48}), torch.float32)
    with pytest.raises(CheckpointError) as error:
        make_manager(tmp_path / "x", make_config()).load_weights(tmp_path / "hf", empty_solo())
    text = str(error.value)
    assert "unknown: model.layers.4.self_attn.q_proj.weight [32, 32]" in text
    assert "model.layers.0.mlp.gate_proj.weight has shape [48, 32], the model needs [56, 32]" in text
    hf_folder(tmp_path / "tied", MODEL.model_copy(update={"tie_embeddings": True}), torch.float32)
    with pytest.raises(CheckpointError, match=r"missing: lm_head.weight \[131, 32\]\n  .*model.tie_embeddings=true"):
        make_manager(tmp_path / "x", make_config()).load_weights(tmp_path / "tied", empty_solo())


def test_settings_that_differ_without_changing_shapes_are_warnings(tmp_path) -> None:
    hf_folder(tmp_path / "hf", MODEL, torch.float32)
    log: list[str] = []
    config = make_config(MODEL.model_copy(update={"rope_theta": 500000.0}))
    make_manager(tmp_path / "x", config, log=log.append).load_weights(tmp_path / "hf", empty_solo())
    assert log == [f"warning: weights of {tmp_path / 'hf'}: model.rope_theta: checkpoint 10000.0, now 500000.0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "is not a LLaMA: model_type='mistral' instead of 'llama'"),
        ({"attention_bias": True}, "is not a LLaMA: attention_bias=True instead of False"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'; only 'llama3'"),
        ({"hidden_size": None}, "does not describe a LLaMA"),
    ],
)
def test_foreign_architectures_are_refused(change: dict, message: str, tmp_path) -> None:
    step = saved(tmp_path, make_config())
    shutil.copytree(step / "model", tmp_path / "other")
    path = tmp_path / "other/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load_llama(tmp_path / "other")


def test_folders_without_weights_are_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="config.json does not exist; give a step folder or a Hugging Face"):
        read_model_config(tmp_path)
    shutil.copy(saved(tmp_path, make_config()) / "model/config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"neither manifest.json nor model.safetensors\(.index.json\)"):
        load_llama(tmp_path)


def test_foreign_files_cut_short_are_named(tmp_path) -> None:
    hf_folder(tmp_path / "hf", MODEL, torch.float32)
    path = tmp_path / "hf/model.safetensors"
    whole = path.read_bytes()
    for data, message in (
        (whole[:-1], "does not fit the file"),
        (whole[:100], "ends at byte 100"),
        (b"\xff" * 8 + whole[8:], "ends at byte"),
        (whole[:8] + b"!" + whole[9:], "no valid safetensors header"),
        (b"", "ends at byte 0"),
    ):
        path.write_bytes(data)
        with pytest.raises(DamagedError, match=f"model.safetensors.*{message}"):
            load_llama(tmp_path / "hf")


def test_old_rotary_buffers_are_ignored(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = hf_folder(tmp_path / "hf", MODEL, torch.float32)
    path = tmp_path / "hf/model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)
    found = load_llama(tmp_path / "hf").weights
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], t) for n, t in tensors.items())


def train_sentencepiece(folder: Path) -> Path:
    import sentencepiece

    text = folder / "text.txt"
    text.write_text("\n".join(f"the quick brown fox {i} jumps over the lazy dog {i * 7}" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "spm"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "spm.model"


def test_sentencepiece_tokenizer_opens_with_transformers(tmp_path) -> None:
    import sentencepiece

    source = train_sentencepiece(tmp_path)
    config = make_config(MODEL.model_copy(update={"vocab_size": 330}))
    step = saved(tmp_path / "c", config, tokenizer=source)
    assert (step / "model/tokenizer.model").read_bytes() == source.read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(step / "model")
    ours = sentencepiece.SentencePieceProcessor(model_file=str(source))
    text = "the quick dog 7 Ωmega jumps"
    assert theirs.encode(text) == ours.encode(text)  # no bos: training documents begin without one
    assert theirs.decode(ours.encode(text)) == text
    found = transformers.AutoConfig.from_pretrained(step / "model")
    assert (found.bos_token_id, found.eos_token_id) == (2, 2)  # documents stood behind the end of others
    generation = transformers.GenerationConfig.from_pretrained(step / "model")
    assert (generation.bos_token_id, generation.eos_token_id) == (2, 2)


def test_tokenizer_json_opens_with_transformers(tmp_path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    ours = Tokenizer(models.BPE())
    ours.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    ours.train_from_iterator(["the quick brown fox"] * 9, trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    ours.save(str(tmp_path / "tok.json"))
    step = saved(tmp_path / "c", make_config(), tokenizer=tmp_path / "tok.json")
    theirs = transformers.AutoTokenizer.from_pretrained(step / "model")
    assert theirs.encode("the fox", add_special_tokens=False) == ours.encode("the fox").ids
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 1)
    assert json.loads((step / "model/config.json").read_text())["eos_token_id"] == 1


def test_gpt2_tokenizer_opens_with_transformers(tmp_path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    ours = ByteLevelBPETokenizer()
    ours.train_from_iterator(["the quick brown fox"] * 9, vocab_size=270, special_tokens=["<|endoftext|>"])
    ours.save_model(str(tmp_path))
    config = make_config(MODEL.model_copy(update={"vocab_size": ours.get_vocab_size()}))
    step = saved(tmp_path / "c", config, tokenizer=tmp_path / "vocab.json")
    assert (step / "model/vocab.json").is_file()
    theirs = transformers.AutoTokenizer.from_pretrained(step / "model")
    assert theirs.encode("the fox\n", add_special_tokens=False) == ours.encode("the fox\n").ids
    assert theirs.eos_token_id == json.loads((step / "model/config.json").read_text())["eos_token_id"] == 0


def test_saved_by_ranks_opens_too(tmp_path) -> None:
    config = make_config(SCALED, "fp16")
    save_on(tmp_path, config, make_state(SCALED), Topology(tp=4, dp=2))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "step-00000001/model")
    want = make_state(SCALED)["master"]
    assert all(torch.equal(theirs.state_dict()[n], t.half()) for n, t in want.items())
