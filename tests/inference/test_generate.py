"""Generation against Hugging Face, the cache against the full forward, sampling statistics, every error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from megallama.checkpoint.disk import CheckpointError
from megallama.checkpoint.manifest import render
from megallama.cli import command
from megallama.config.errors import ConfigError
from megallama.data.tokenizer import load_tokenizer
from megallama.inference.generate import (
    Sampling,
    Transcript,
    draw,
    encode_prompt,
    find_model,
    generate,
    generate_batch,
    load_llama,
    probabilities,
    read_prompts,
)
from megallama.inference.llama import Cache, Llama, packer

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


def logits_of(llama: Llama, tokens: list[int], first: int) -> torch.Tensor:
    """Logits from that of token first - 1 to the last: `first` tokens are the prompt, the others come one by one."""
    cache = Cache(llama, [tokens[:first]], len(tokens) - first)
    return torch.cat([cache.prefill(), *(cache.step([token]) for token in tokens[first:])])


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
    got = logits_of(llama, tokens.tolist(), 1)
    assert ((got - want).norm() / want.norm()).item() < 2e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_whole_prompt(shape: str, tmp_path: Path) -> None:
    """Token by token after a prompt of any length, and in rows of other lengths that come and go."""
    reference(tmp_path, torch.float64, **SHAPES[shape])
    llama = load_llama(tmp_path)
    text = [i * 31 % 97 for i in range(40)]
    full = logits_of(llama, text, 1)
    for first in (11, 40):
        assert (logits_of(llama, text, first) - full[first - 1 :]).abs().max() < 1e-11 * full.abs().max()
    lengths = [20, 3, 33, 7]
    cache = Cache(llama, [text[:length] for length in lengths], 6)
    logits = cache.prefill()
    for kept in ([0, 1, 2, 3], [0, 1, 3], [2, 1], [1], [0]):  # the longest goes, then others and the first
        cache.keep(kept)
        lengths = [lengths[row] + 1 for row in kept]
        logits = cache.step([text[length - 1] for length in lengths])
        for row, length in zip(logits, lengths, strict=True):
            assert (row - full[length - 1]).abs().max() < 1e-11 * full.abs().max()
    assert lengths == [8]


def test_reads_sharded_files_and_converts(tmp_path: Path) -> None:
    theirs = reference(tmp_path, shard="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    llama = load_llama(tmp_path, torch.bfloat16)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(llama.weights[name], theirs.state_dict()[name].bfloat16())
    got = logits_of(llama, [*range(9)], 1).float()
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


PROMPTS = [[int(i) for i in (torch.arange(n) * 29 + n) % 97] for n in (7, 1, 40, 12, 3, 30, 7, 2, 21)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_batches_equal_hugging_face(shape: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = reference(tmp_path, dtype, **SHAPES[shape])
    llama = load_llama(tmp_path)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    new = theirs.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)[:, longest:]
    rows = generate_batch(llama, PROMPTS, 20, GREEDY)
    assert [row.tokens for row in rows] == new.tolist()
    assert {row.ended for row in rows} == {"length"}
    assert not llama.weights, "weights are held twice"


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 0.9, 5, 30)], ids=["greedy", "sampled"])
def test_a_row_is_what_its_prompt_makes_alone(sampling: Sampling, tmp_path: Path) -> None:
    """Whatever the batch, the order, and what ends when: at eos, at a stop string, at the end of the context."""
    reference(tmp_path, torch.float64, num_key_value_heads=2)
    llama = load_llama(tmp_path)
    free = [list(generate(llama, prompt, 50, replace(sampling, seed=5 + i))) for i, prompt in enumerate(PROMPTS)]
    llama.eos = frozenset({free[0][4], free[3][9], free[5][0]})
    alone = [list(generate(llama, prompt, 50, replace(sampling, seed=5 + i))) for i, prompt in enumerate(PROMPTS)]
    assert [len(row) for row in alone] != [len(row) for row in free]
    size = llama.bytes_per_position()
    for limits in ({}, {"max_rows": 4}, {"max_rows": 1}, {"cache_bytes": 300 * size}, {"cache_bytes": 1}):
        rows = generate_batch(llama, PROMPTS, 50, sampling, **limits)
        assert [row.tokens for row in rows] == alone
        for row, own in zip(rows, alone, strict=True):
            room = 64 - len(row.prompt)
            full = "context" if room < 50 else "length"
            assert row.ended == (full if len(own) == min(50, room) else "eos")
    assert {row.ended for row in rows} == {"eos", "context", "length"} or sampling != GREEDY
    if sampling.temperature:  # a prompt draws with its place's seed, whoever stands beside it
        changed = generate_batch(llama, [PROMPTS[0], [5] * 30, PROMPTS[2]], 50, sampling)
        assert [changed[0].tokens, changed[2].tokens] == [alone[0], alone[2]]
        twice = generate_batch(llama, [PROMPTS[1]] * 2, 50, sampling)
        assert twice[0].tokens != twice[1].tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["mha", "gqa"])
def test_a_row_has_the_same_bits_in_every_batch(shape: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In bf16 one other rounding would soon be another text."""
    reference(tmp_path, dtype, max_position_embeddings=128, intermediate_size=1040, **SHAPES[shape])
    llama = load_llama(tmp_path)
    text = [i * 31 % 97 for i in range(128)]
    lengths = [20, 3, 90, 7, 41]
    if packer(llama.embed)[1] is torch.nn.functional.linear:
        pytest.skip("oneDNN has no products of this format on this machine")
    together = Cache(llama, [text[:length] for length in lengths], 30)
    alone = [Cache(llama, [text[:length]], 30) for length in lengths]
    assert torch.equal(together.prefill(), torch.cat([cache.prefill() for cache in alone]))
    for step in range(30):
        if step == 10:
            together.keep([0, 4, 2, 3])
            alone = [alone[row] for row in (0, 4, 2, 3)]
        tokens = [step * 7 % 97 + row for row in range(len(alone))]
        want = torch.cat([cache.step([token]) for cache, token in zip(alone, tokens, strict=True)])
        assert torch.equal(together.step(tokens), want), step


def test_batches_take_prompts_of_similar_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference(tmp_path)
    llama = load_llama(tmp_path)
    seen = []
    monkeypatch.setattr(Cache, "prefill", lambda self, run=Cache.prefill: seen.append(self) or run(self))
    made = generate_batch(llama, PROMPTS, 8, GREEDY, cache_bytes=100 * llama.bytes_per_position())
    assert [len(cache.tensor[0, 0]) for cache in seen] == [2, 3, 4]  # (40, 30), (21, 12, 7), (7, 3, 2, 1)
    assert [cache.tensor.shape[-2] for cache in seen] == [48, 32, 16]  # of 48, 29 and 15
    seen.clear()
    alike = generate_batch(llama, PROMPTS, 8, GREEDY, cache_bytes=1)
    assert [row.tokens for row in alike] == [row.tokens for row in made] and len(seen) == len(PROMPTS)
    monkeypatch.setattr("megallama.inference.llama.PROMPT_TOKENS", 80)  # prompts run two by two
    assert [row.tokens for row in generate_batch(llama, PROMPTS, 8, GREEDY)] == [row.tokens for row in made]
    assert generate_batch(llama, [], 8, GREEDY) == []


def test_texts_end_at_stop_strings(tmp_path: Path) -> None:
    reference(tmp_path)
    llama = load_llama(tmp_path)
    tokenizer: Any = SimpleNamespace(decode=lambda ids: "".join(chr(33 + i) for i in ids), vocab_size=90)
    prompts = [[1, 2, 3], [4] * 17, [5]]
    free = generate_batch(llama, prompts, 30, GREEDY, tokenizer=tokenizer)
    for prompt, row in zip(prompts, free, strict=True):
        assert row.tokens == list(generate(llama, prompt, 30, GREEDY, num_ids=90))
        assert row.text == tokenizer.decode(row.tokens)
    stop = [free[0].text[9:12], "\0", free[2].text[4:6]]
    rows = generate_batch(llama, prompts, 30, GREEDY, tokenizer=tokenizer, stop=stop)
    for row, before in zip(rows, free, strict=True):
        found = [at for at in map(before.text.find, stop) if at >= 0]
        assert row.text == before.text[: min(found)] if found else row.text == before.text
        assert row.ended == ("stop" if found else before.ended)
        assert row.tokens == before.tokens[: len(row.tokens)]
        assert tokenizer.decode(row.tokens).startswith(row.text)
        spelled = len(row.tokens) - len(row.text)  # the tokens of the stop string stay
        assert spelled in ((2, 3) if found else (0,))
    assert [row.ended for row in rows].count("stop") >= 2


def test_ids_that_only_pad_the_vocabulary_are_never_drawn(tmp_path: Path) -> None:
    reference(tmp_path)
    for sampling in (GREEDY, Sampling(1.0, 1.0, 3), Sampling(5.0, 0.9, 4)):
        exact = list(generate(load_llama(tmp_path), [1, 2], 30, sampling, num_ids=90))
        assert max(exact) < 90
        llama = load_llama(tmp_path)
        llama.head[90:] = 0
        llama.head[90:] += 100 * llama.head[exact[0]]  # they would win every time
        assert list(generate(llama, [1, 2], 30, sampling, num_ids=90)) == exact
        assert max(generate(llama, [1, 2], 30, GREEDY)) >= 90


def test_same_seed_same_text(tmp_path: Path) -> None:
    reference(tmp_path)
    llama = load_llama(tmp_path)
    texts = [list(generate(llama, [1, 2], 30, Sampling(1.0, 0.95, seed))) for seed in (7, 7, 8, 7 + (5 << 64), -7)]
    assert texts[0] == texts[1] == texts[3] != texts[2] != texts[4]
    one, other = (list(generate(llama, [1, 2], 30, Sampling(1.0, 0.95, s))) for s in (3**80, -(3**81)))
    assert one != other and len(one) == 30


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "expected"),
    [
        (1.0, 1.0, 0, [0.5, 0.25, 0.15, 0.1]),
        (0.5, 1.0, 0, [0.7246, 0.1812, 0.0652, 0.0290]),  # squares, normalised
        (2.0, 1.0, 0, [0.3701, 0.2617, 0.2027, 0.1655]),  # square roots, normalised
        (1.0, 0.74, 0, [2 / 3, 1 / 3, 0.0, 0.0]),  # the first two have 0.75
        (1.0, 0.76, 0, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0.0]),
        (1.0, 1e-6, 0, [1.0, 0.0, 0.0, 0.0]),
        (1.0, 1.0, 1, [1.0, 0.0, 0.0, 0.0]),
        (1.0, 1.0, 3, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0.0]),
        (0.5, 1.0, 2, [0.8, 0.2, 0.0, 0.0]),
        (1.0, 0.8, 3, [2 / 3, 1 / 3, 0.0, 0.0]),  # of the three likeliest the first two have 0.83
        (1.0, 1.0, 9, [0.5, 0.25, 0.15, 0.1]),
    ],
)
def test_sampling_statistics(temperature: float, top_p: float, top_k: int, expected: list[float]) -> None:
    logits = torch.tensor([0.15, 0.5, 0.1, 0.25]).log()
    order = [1, 3, 0, 2]  # likeliest first
    generator = torch.Generator().manual_seed(3)
    count = 4000
    sampling = Sampling(temperature, top_p, top_k=top_k)
    rows = logits.expand(count, 4)
    drawn = torch.bincount(torch.tensor(draw(rows, sampling, [generator] * count)), minlength=4)
    shares = [drawn[i].item() / count for i in order]
    assert shares == pytest.approx(expected, abs=0.03)
    assert [share == 0 for share in shares] == [share == 0 for share in expected]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(torch.tensor([[0.1, 2.0, 1.9], [3.0, 2.0, 1.9]]), GREEDY, []) == [1, 0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 is negative; use 0 for greedy"),
        ({"temperature": float("nan")}, "temperature=nan is negative"),
        ({"top_p": 0.0}, "top_p=0.0 is not a share; use a value above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5 is not a share"),
        ({"top_k": -1}, "top_k=-1 is negative; use 0 for all tokens, about 40 for the likeliest"),
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


def test_batches_that_cannot_be_run(tmp_path: Path) -> None:
    reference(tmp_path)
    llama = load_llama(tmp_path)
    for prompts, keys, message in [
        ([[1], []], {}, "prompt 2 of 2 has no tokens; give at least one word"),
        ([[1], [2], [1] * 64], {}, "prompt 3 of 3 has 64 tokens; this model sees 64: give at most 63"),
        ([[1, 97], [1]], {}, "prompt 1 of 2 holds token id 97, the model 0..96: use the model's own tokenizer"),
        ([[1]], {"max_tokens": 0}, "max_tokens=0 makes no text; use 1 or more"),
        ([[1]], {"max_rows": 0}, "max_rows=0 makes no text; use 1 or more"),
        ([[1]], {"stop": ["a", ""]}, "a stop string is empty and would end every text before it begins; leave it out"),
        ([[1]], {"stop": ["a"]}, r"stop=\['a'\] is looked for in the text: hand over the tokenizer, too"),
    ]:
        with pytest.raises(ConfigError, match=message):
            generate_batch(llama, prompts, **{"max_tokens": 5, "sampling": GREEDY, **keys})
    assert llama.weights, "something has run"


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


def stream_text(
    tokens: Iterator[int], decode: Callable[[list[int]], str], prompt: list[int], stop: Sequence[str] = ()
) -> Iterator[str]:
    """Pieces of text as a terminal shows them."""
    transcript = Transcript(decode, prompt, stop)
    while not transcript.stopped and (token := next(tokens, None)) is not None:
        yield transcript.push(token)
    yield transcript.end()


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


TEXT = "one, two; naïve 日本語 ### END and more"


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        ([], TEXT),
        (["###"], "one, two; naïve 日本語 "),
        (["END", " ###"], "one, two; naïve 日本語"),  # the first in the text, not in the list
        (["###", "# END", "two; naïve"], "one, "),
        (["日本"], "one, two; naïve "),  # the bytes of a character come one by one
        (["###!", "ENDS"], TEXT),
        (["more"], TEXT[:-4]),
        (["o"], ""),
    ],
)
def test_a_stop_string_ends_the_text_however_it_is_cut_into_tokens(stop: list[str], kept: str) -> None:
    whole = list(TEXT.encode())
    for size in (1, 2, 3, 7):
        chunks = [whole[i : i + size] for i in range(0, len(whole), size)]  # a token is a number of bytes

        def decode_chunks(ids: list[int], chunks: list[list[int]] = chunks) -> str:
            return decode([byte for i in ids for byte in chunks[i]])

        transcript, shown = Transcript(decode_chunks, [], stop), ""
        for token in range(len(chunks)):
            shown += transcript.push(token)
            assert kept.startswith(shown), "a stop string or what may be one was shown"
            if transcript.stopped:
                break
        assert shown + transcript.end() == transcript.text == kept
        assert transcript.stopped == (kept != TEXT)
        asked: list[int] = []
        tokens = (asked.append(token) or token for token in range(len(chunks)))  # type: ignore[func-returns-value]
        assert "".join(stream_text(tokens, decode_chunks, [], stop)) == kept
        assert (len(asked) == len(chunks)) == (kept in (TEXT, TEXT[:-4]) or len(asked) * size >= len(whole))


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


def test_the_tool_continues_several_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference(tmp_path, vocab_size=258, eos_token_id=257)
    byte_tokenizer(tmp_path)
    options = [str(tmp_path), "--max-tokens", "12", "--greedy", "--device", "cpu"]
    alone = {}
    for text in ("once", "é", "q: 1"):
        assert main([*options, "--prompt", text]) == 0
        alone[text] = capsys.readouterr().out.removesuffix("\n")
    (tmp_path / "more.jsonl").write_text('{"prompt": "é"}\n{"prompt": "q: 1", "answer": 2}\n', encoding="utf-8")
    several = [*options, "--prompt", "once", "--prompts", str(tmp_path / "more.jsonl")]
    assert main(several) == 0
    shown = capsys.readouterr()
    assert shown.out == "".join(f"--- {i} of 3 ---\n{text}\n" for i, text in enumerate(alone.values(), 1))
    assert "36 tokens, " in shown.err and " tokens/s" in shown.err and "10 prompt tokens" in shown.err
    assert main([*several, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] + line["text"] for line in lines] == list(alone.values())
    assert [(len(line["tokens"]), line["ended"]) for line in lines] == [(12, "length")] * 3
    text = lines[0]["text"]
    stop = next(text[i : i + 2] for i in range(2, len(text)) if text[i : i + 2].isascii())
    assert main([*options, "--prompt", "once", "--stop", "never there", "--stop", stop]) == 0
    assert capsys.readouterr().out == alone["once"][: alone["once"].index(stop, 4)] + "\n"
    (tmp_path / "lines.txt").write_text("once\nq: 1\n")
    assert main([*options, "--prompts", str(tmp_path / "lines.txt"), "--stop", stop, "--json"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["text"] == lines[0]["text"].partition(stop)[0] and first["ended"] == "stop"
    assert second["prompt"] == "q: 1"
    assert main([*options, "--prompt", "once", "--temperature", "3", "--top-k", "1"]) == 0
    assert capsys.readouterr().out == alone["once"] + "\n"


def test_a_prompt_is_a_line_of_its_file(tmp_path: Path) -> None:
    """Not less: other signs end lines for Python, and stand in texts; nor with the mark that some editors write."""
    texts = ["one\u2028two", "three\x0cfour\x85five", " six"]
    (tmp_path / "a.txt").write_text("\ufeff" + "\n".join(texts) + "\n", "utf-8")
    rows = (json.dumps({"prompt": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n".join(rows), "utf-8")
    assert read_prompts(tmp_path / "a.txt") == read_prompts(tmp_path / "a.jsonl") == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "FileNotFoundError"),
        ("bytes.txt", b"\xff\xfe", "UnicodeDecodeError"),
        ("empty.txt", b"", "it is empty"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "Expecting ':' delimiter"),
        ("other.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "KeyError('prompt')"),
        ("string.jsonl", b'"a"\n', "TypeError"),
    ],
)
def test_files_without_prompts(
    name: str, content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main([str(tmp_path), "--prompts", str(tmp_path / name)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: --prompts={tmp_path / name} cannot be read: ") and message in shown.err
    assert '; write one prompt a line, {"prompt": "text"} in a .jsonl' in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--prompt", "\udcff"], r"the prompt '\udcff' is no text in UTF-8"),
        (["--prompts", "null.jsonl"], "the prompt None is no text"),
        (["--prompts", "number.jsonl"], "the prompt 5 is no text"),
        (["--prompts", "deep.jsonl"], "deep.jsonl cannot be read: RecursionError"),
    ],
    ids=["half", "null", "number", "deep"],
)
def test_what_no_text_can_be_made_from(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(tmp_path / word) if word.endswith(".jsonl") else word for word in options]
    (tmp_path / "null.jsonl").write_text('{"prompt": null}\n')
    (tmp_path / "number.jsonl").write_text('{"prompt": 5}\n')
    (tmp_path / "deep.jsonl").write_text('{"prompt": ' + "[" * 100_000)
    assert main([str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_temperature_next_to_nothing_is_greedy() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.5, 0.0, 0.4]])
    assert probabilities(logits, Sampling(1e-320)).tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_make_no_text(value: float, temperature: float) -> None:
    logits = torch.tensor([[1.0, 2.0], [value, 0.0]])
    with pytest.raises(CheckpointError, match="logits are not finite: weights are damaged, or too large for this"):
        draw(logits, Sampling(temperature), [torch.Generator(), torch.Generator()])


def test_files_that_mix_number_formats(tmp_path: Path) -> None:
    """Norms in fp32 beside weights in bf16: all is as wide as the norms."""
    reference(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v if "norm" in k else v.bfloat16() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    llama = load_llama(tmp_path)
    assert {str(weight.dtype) for weight in llama.weights.values()} == {"torch.float32"}
    assert len([*generate(llama, [1, 2], 5, GREEDY)]) == 5


def test_an_empty_stop_string_ends_no_stream() -> None:
    with pytest.raises(ConfigError, match="a stop string is empty and would end every text before it begins"):
        Transcript(None, (), ["x", ""])


def test_the_tool_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    reference(model)
    capsys.readouterr()
    for arguments, message in [
        ([str(tmp_path / "none")], f"error: {tmp_path / 'none'} is not a folder; give a step folder"),
        ([str(model)], f"error: {model} holds neither tokenizer.model nor tokenizer.json"),
        ([str(model), "--max-tokens", "0"], "error: --max-tokens=0 makes no text; use 1 or more"),
        ([str(model), "--top-p", "2"], "error: top_p=2.0 is not a share"),
        ([str(model), "--top-k", "-2"], "error: top_k=-2 is negative"),
    ]:
        assert main(arguments) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith(message)
        assert shown.out == ""
    if not torch.cuda.is_available():
        assert main([str(model), "--device", "cuda"]) == 2
        assert capsys.readouterr().err.startswith("error: --device=cuda: this machine has no CUDA device")
