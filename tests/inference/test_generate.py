"""Generation against Hugging Face, the cache against the full forward, sampling statistics, every error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from megallama.checkpoint.disk import CheckpointError
from megallama.checkpoint.manifest import render
from megallama.cli import command
from megallama.config.errors import ConfigError
from megallama.data.tokenizer import load_tokenizer
from megallama.inference.generate import Sampling, draw, encode_prompt, find_model, generate, load_llama, stream_text

main = command("generate")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
SHAPES: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"num_key_value_heads": 1, "head_dim": 24},
    "llama3": {"num_key_value_heads": 2, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
}
GREEDY = Sampling(temperature=0)


def reference(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **keys: Any) -> Any:
    """A small random LLaMA of Hugging Face, saved to `folder`."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "eos_token_id": None,
            "bos_token_id": None,
            "dtype": dtype,
            **keys,
        }
    )
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_equal_hugging_face(shape: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = reference(tmp_path, dtype, **SHAPES[shape])
    llama = load_llama(tmp_path)
    assert llama.embed.dtype == dtype
    for length in (1, 7, 40):
        prompt = torch.randint(0, 97, (1, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(prompt)
        want = theirs.generate(prompt, attention_mask=mask, max_new_tokens=20, do_sample=False)[0, length:].tolist()
        assert list(generate(llama, prompt[0].tolist(), 20, GREEDY)) == want
    assert len(set(want)) > 3  # not one token over and over


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_hugging_face(shape: str, tmp_path: Path) -> None:
    theirs = reference(tmp_path, **SHAPES[shape])
    llama = load_llama(tmp_path)
    tokens = torch.arange(50) % 97
    with torch.no_grad():
        want = theirs(tokens[None]).logits[0]
    got = llama.forward(tokens, llama.cache(50))
    assert ((got - want).norm() / want.norm()).item() < 2e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_logits_equal_the_full_forward(shape: str, tmp_path: Path) -> None:
    reference(tmp_path, torch.float64, **SHAPES[shape])
    llama = load_llama(tmp_path)
    tokens = (torch.arange(40) * 31) % 97
    full = llama.forward(tokens, llama.cache(40))
    cache = llama.cache(40)
    parts = [llama.forward(part, cache) for part in tokens.split([11, 1, 9, 1, 1, 17])]
    assert (torch.cat(parts) - full).abs().max().item() < 1e-11 * full.abs().max().item()
    last = llama.forward(tokens, llama.cache(40), last_only=True)
    assert last.shape == (1, 97)
    assert torch.allclose(last[0], full[-1], rtol=1e-12)


def test_reads_sharded_files_and_converts(tmp_path: Path) -> None:
    theirs = reference(tmp_path, shard="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    llama = load_llama(tmp_path, torch.bfloat16)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(llama.weights[name], theirs.state_dict()[name].bfloat16())
    got = llama.forward(torch.arange(9), llama.cache(9)).float()
    with torch.no_grad():
        want = theirs(torch.arange(9)[None]).logits[0]
    assert ((got - want).norm() / want.norm()).item() < 0.05


def test_stops_at_eos_and_at_the_end_of_the_context(tmp_path: Path) -> None:
    reference(tmp_path, eos_token_id=[5, 96])
    llama = load_llama(tmp_path)
    assert llama.eos == {5, 96}
    llama.eos = frozenset()
    free = list(generate(llama, [1, 2, 3], 40, GREEDY))
    llama.eos = frozenset({free[7]})
    assert list(generate(llama, [1, 2, 3], 40, GREEDY)) == free[: free.index(free[7])]
    assert len(list(generate(llama, [1] * 60, 100, GREEDY))) == 4  # the context has 64


def test_ids_that_only_pad_the_vocabulary_are_never_drawn(tmp_path: Path) -> None:
    reference(tmp_path)
    llama = load_llama(tmp_path)
    for sampling in (GREEDY, Sampling(1.0, 1.0, 3), Sampling(5.0, 0.9, 4)):
        exact = list(generate(llama, [1, 2], 30, sampling, num_ids=90))
        assert max(exact) < 90
        llama.head[90:] = 0
        llama.head[90:] += 100 * llama.head[exact[0]]  # they would win every time
        assert list(generate(llama, [1, 2], 30, sampling, num_ids=90)) == exact
    assert max(generate(llama, [1, 2], 30, GREEDY)) >= 90


def test_same_seed_same_text(tmp_path: Path) -> None:
    reference(tmp_path)
    llama = load_llama(tmp_path)
    texts = [list(generate(llama, [1, 2], 30, Sampling(1.0, 0.95, seed))) for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.5, 0.25, 0.15, 0.1]),
        (0.5, 1.0, [0.7246, 0.1812, 0.0652, 0.0290]),  # squares, normalised
        (2.0, 1.0, [0.3701, 0.2617, 0.2027, 0.1655]),  # square roots, normalised
        (1.0, 0.74, [2 / 3, 1 / 3, 0.0, 0.0]),  # the first two have 0.75
        (1.0, 0.76, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0.0]),
        (1.0, 1e-6, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_sampling_statistics(temperature: float, top_p: float, expected: list[float]) -> None:
    logits = torch.tensor([0.15, 0.5, 0.1, 0.25]).log()
    order = [1, 3, 0, 2]  # likeliest first
    generator = torch.Generator().manual_seed(3)
    count = 4000
    sampling = Sampling(temperature, top_p)
    drawn = torch.bincount(torch.tensor([draw(logits, sampling, generator) for _ in range(count)]), minlength=4)
    shares = [drawn[i].item() / count for i in order]
    assert shares == pytest.approx(expected, abs=0.03)
    assert [share == 0 for share in shares] == [share == 0 for share in expected]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(torch.tensor([0.1, 2.0, 1.9]), GREEDY, None) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 is negative; use 0 for greedy"),
        ({"temperature": float("nan")}, "temperature=nan is negative"),
        ({"top_p": 0.0}, "top_p=0.0 is not a share; use a value above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5 is not a share"),
    ],
)
def test_sampling_values_out_of_range(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**keys)


def test_prompts_that_cannot_be_run(tmp_path: Path) -> None:
    reference(tmp_path)
    llama = load_llama(tmp_path)
    for prompt, message in [
        ([], "the prompt has no tokens"),
        ([1] * 64, "the prompt has 64 tokens; this model sees 64: give at most 63"),
        ([1, 97], "the prompt holds token id 97, the model 0..96"),
        ([1, -3], "the prompt holds token id -3, the model 0..96"),
    ]:
        with pytest.raises(ConfigError, match=message):
            next(generate(llama, prompt, 5, GREEDY))


def step_folder(folder: Path, sequence: int) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    model = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "ffn_hidden_size": 8, "vocab_size": 9}
    body = {"format": 1, "step": 1, "sequence": sequence, "line": "", "counters": {}, "architecture": model}
    body |= {"files": {}, "precision": "fp32", "shard_bytes": 1, "block_bytes": 1, "tokenizer": None, "config": {}}
    (folder / "manifest.json").write_bytes(render(body | {"versions": {}, "saved_at": "", "saved_by_ranks": 1}))
    return folder


def test_find_model_takes_the_checkpoint_saved_last(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    old = step_folder(checkpoints / "step-00000200", 1)
    new = step_folder(checkpoints / "step-00000100", 2)  # saved later, after a restart from scratch
    damaged = step_folder(checkpoints / "step-00000300", 3)
    (damaged / "manifest.json").write_text("{}")
    step_folder(checkpoints / "step-00000400.tmp", 4)
    step_folder(checkpoints / "step-00000500.damaged", 5)  # its manifest verifies, other bytes do not
    messages: list[str] = []
    assert find_model(checkpoints, messages.append) == new / "model"
    assert len(messages) == 1 and messages[0].startswith(f"{damaged} is left out: {damaged}/manifest.json is damaged")
    for options in (tmp_path / "run", checkpoints, new, new / "model"):
        assert find_model(options) == new / "model"
    assert find_model(old) == old / "model"


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path} has no complete checkpoint in it; give a step folder"):
        find_model(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        find_model(tmp_path / "nowhere")


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    reference(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for key, value, message in [
        ("model_type", "gpt2", "model_type='gpt2'"),
        ("num_hidden_layers", 4, r"missing: model\.layers\.3\.input_layernorm\.weight"),
        ("num_hidden_layers", 2, r"unknown: model\.layers\.2\."),
        ("vocab_size", 98, r"model\.embed_tokens\.weight has shape \[97, 64\]"),
        ("max_position_embeddings", None, "has max_position_embeddings=None; write the longest sequence"),
    ]:
        changed = {**config, key: value}
        path.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))
        with pytest.raises(CheckpointError, match=message):
            load_llama(tmp_path)
    path.write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=str(weights)):
        load_llama(tmp_path)


def decode(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize("cut", [0, 1, 5, 12])
def test_streaming_never_shows_half_a_character(cut: int) -> None:
    text = "naïve 日本語 🦙 ends"
    tokens = list(text.encode())
    pieces = list(stream_text(iter(tokens[cut:]), decode, tokens[:cut]))
    whole = tokens[:cut].copy()
    while whole and decode(whole).endswith("\N{REPLACEMENT CHARACTER}"):
        whole.pop()
    assert decode(whole) + "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_streaming_goes_on_after_bytes_that_are_no_text() -> None:
    def endless() -> Iterator[int]:
        yield from [0xFF] * 9 + list(b"ok")

    assert "".join(stream_text(endless(), decode, [])).endswith("ok")
    assert "".join(stream_text(iter([0xE6]), decode, [])) == "\N{REPLACEMENT CHARACTER}"


def byte_tokenizer(folder: Path, begin: bool = False) -> None:
    """tokenizer.json whose ids are bytes, then bos 256 and eos 257; with `begin` it puts bos first by itself."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    if begin:
        name = "<|begin_of_text|>"
        template = tokenizers.processors.TemplateProcessing(f"{name} $A", special_tokens=[(name, 256)])
        bytes_too = tokenizers.processors.ByteLevel()
        made.post_processor = tokenizers.processors.Sequence([bytes_too, template])
    made.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("begin", "config", "first"), [(False, {}, []), (True, {}, [256]), (True, {"add_bos_token": False}, [])]
)
def test_prompts_begin_as_the_tokenizer_says(
    begin: bool, config: dict[str, Any], first: list[int], tmp_path: Path
) -> None:
    byte_tokenizer(tmp_path, begin)
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert encode_prompt(tmp_path, tokenizer, "hi") == first + tokenizer.encode("hi")
    assert encode_prompt(tmp_path, tokenizer, "") == (first or [257])
    if not config:
        theirs = tokenizers.Tokenizer.from_file(str(tokenizer.path))
        assert encode_prompt(tmp_path, tokenizer, "hi") == theirs.encode("hi").ids


def test_the_tool_prints_what_hugging_face_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = reference(tmp_path, vocab_size=258, eos_token_id=257)
    byte_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    prompt = torch.tensor([tokenizer.encode("once")])
    new = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=25, do_sample=False)[0, 4:]
    assert main([str(tmp_path), "--prompt", "once", "--max-tokens", "25", "--greedy", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "once" + tokenizer.decode(new.tolist()) + "\n"
    assert "25 tokens, " in shown.err


def test_the_tool_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    reference(model)
    capsys.readouterr()
    for arguments, message in [
        ([str(tmp_path / "none")], f"error: {tmp_path / 'none'} is not a folder; give a step folder"),
        ([str(model)], f"error: {model} holds neither tokenizer.model nor tokenizer.json"),
        ([str(model), "--max-tokens", "0"], "error: --max-tokens=0 makes no text; use 1 or more"),
        ([str(model), "--top-p", "2"], "error: top_p=2.0 is not a share"),
    ]:
        assert main(arguments) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith(message)
        assert shown.out == ""
    if not torch.cuda.is_available():
        assert main([str(model), "--device", "cuda"]) == 2
        assert capsys.readouterr().err.startswith("error: --device=cuda: this machine has no CUDA device")
