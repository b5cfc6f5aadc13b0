"""Tokenizers: round trips, control strings that stay text, training, and what is refused."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

from megallama.config.errors import DataError
from megallama.data.tokenizer import load_tokenizer
from megallama.text.fast_encoder import load_fast_tokenizer
from megallama.text.train_tokenizer import train_tokenizer
from tests.words import text_of

HARD = "a</s><s>b\0c\n\n    <unk> d  e\t\r\n 🦙 12345 <|end_of_text|> "


def test_sentencepiece_has_llamas_ids(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (330, 1, 2)
    assert tokenizer.encode("\n")[-1] == 3 + 10  # the byte piece <0x0A>, as in LLaMA
    digits = tokenizer.encode("12")
    assert tokenizer.encode("1221")[-4:] == [digits[-2], digits[-1], digits[-1], digits[-2]]  # digits never merge


def test_sentencepiece_without_marks(jsonl: Path, tmp_path: Path) -> None:
    texts = iter(jsonl.read_text().splitlines())
    options = {"vocab_size": 300, "bos_id": -1, "eos_id": -1, "hard_vocab_limit": False, "minloglevel": 2}
    with (tmp_path / "t.model").open("wb") as file:
        SentencePieceTrainer.train(sentence_iterator=texts, model_writer=file, **options)
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.control_ids) == (None, None, [0])


@pytest.mark.parametrize("fast", [True, False])
def test_a_trained_tokenizer_keeps_any_text_as_it_is(tokenizer_path: Path, fast: bool) -> None:
    tokenizer = load_fast_tokenizer(tokenizer_path, fast=fast)

    @settings(max_examples=300, deadline=None)
    @given(st.text(st.characters(codec="utf-8", exclude_characters="\u2581")))  # SentencePiece's own sign for a space
    def check(text: str) -> None:
        tokens, lengths = tokenizer.encode_arrays([text])
        assert tokens.tolist() == tokenizer.encode(text) and lengths.tolist() == [len(tokens)]
        assert tokenizer.decode(tokens.tolist()) == text and not {0, 1, 2} & {*tokens.tolist()}

    check()
    pairs = (("ﬁ", "fi"), ("²", "2"), ("\u212b", "\xc5"), ("e\u0301", "é"), ("Ａ", "A"), ("\u3000", " "), ("  ", " "))
    for one, other in pairs:
        assert tokenizer.encode(one) != tokenizer.encode(other)  # NFKC, or removing white space, would make them equal
    number = tokenizer.encode("9876543210")[-10:]
    assert [tokenizer.decode([i]) for i in number] == [*"9876543210"] and len(set(number)) == 10


@pytest.mark.parametrize("kind", ["tokenizer_path", "json_path"])
def test_ids_that_it_does_not_have(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    last = tokenizer.vocab_size - 1
    assert tokenizer.decode([]) == "" and isinstance(tokenizer.decode([last]), str)
    with pytest.raises(DataError, match=rf" has the ids 0 to {last} and not {last + 7}; name the tokenizer that these"):
        tokenizer.decode([last, last + 7, 3])


def test_json_has_llama_3s_names(json_path: Path) -> None:
    tokenizer = load_tokenizer(json_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (320, 0, 1)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", ["tokenizer_path", "json_path"])
def test_text_round_trips_and_never_becomes_a_control_token(
    kind: str, fast: bool, request: pytest.FixtureRequest
) -> None:
    tokenizer = load_fast_tokenizer(request.getfixturevalue(kind), fast=fast)
    for text in (HARD, text_of(1), " leading", "東京"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.encode_arrays([text])[0].tolist() == ids
        assert not {tokenizer.bos_id, tokenizer.eos_id, 0 if kind == "tokenizer_path" else 1}.intersection(ids)
    texts = [text_of(i) for i in range(20)]
    tokens, lengths = tokenizer.encode_arrays(texts)
    want = [tokenizer.encode(t) for t in texts]
    assert tokens.tolist() == sum(want, []) and lengths.tolist() == list(map(len, want))
    ids = tokenizer.encode("a")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "a"  # type: ignore[list-item]


def test_a_folder_names_its_tokenizer(tokenizer_path: Path, tmp_path: Path) -> None:
    assert load_tokenizer(tokenizer_path.parent).path == tokenizer_path
    with pytest.raises(DataError, match="holds neither tokenizer.model nor tokenizer.json nor vocab.json with"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name, content, text", [
    ("gone.model", None, "does not exist; name a SentencePiece .model, a tokenizer.json or a GPT-2 vocab.json, or tr"),
    ("a.txt", b"", r"suffix '.txt', expected .model \(SentencePiece\) or .json"),
    ("a.model", b"no model at all", "is not a SentencePiece model"),
    ("a.model", b"", "is not a SentencePiece model"),
    ("a.model", b"IQ== 0\nIg== 1\n", "is a tiktoken vocabulary, .* use the tokenizer.json"),
    ("a.json", b"{}", "is not a tokenizer.json that `tokenizers` can read"),
])  # fmt: skip
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, name: str, content: bytes | None, text: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=text):
        load_tokenizer(tmp_path / name)


def test_training_is_deterministic_over_threads(jsonl: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    again = train_tokenizer([jsonl], tmp_path / "t.model", 330, threads=3)
    ours, theirs = load_tokenizer(tokenizer_path), load_tokenizer(again)
    assert all(ours.encode(text_of(i)) == theirs.encode(text_of(i)) for i in range(50))
    assert list(tmp_path.iterdir()) == [again]


def test_training_reads_everything_and_keeps_an_even_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def train(sentence_iterator: Iterator[str], model_writer: object, **_: object) -> None:
        lines[:] = sentence_iterator

    monkeypatch.setattr("sentencepiece.SentencePieceTrainer.train", train)
    texts = [f"{i} " + "x" * random.Random(i).randrange(200) for i in range(1000)]
    raw = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    samples: dict[tuple[str, int], list[int]] = {}
    seen: list[tuple[int, int]] = []
    size = sum(map(len, texts))
    for name, content in (("a.jsonl", raw), ("b.jsonl.gz", gzip.compress(raw))):
        (tmp_path / name).write_bytes(content)
        for share in (1, 4, 8):
            seen.clear()
            options = {"sample_bytes": size // share, "progress": lambda *x: seen.append(x)}
            train_tokenizer([tmp_path / name], tmp_path / "a.model", 300, **options)
            assert [*{total for _, total in seen}] == [len(content)] and seen[-1][0] == len(content)
            assert size // share - 500 < sum(map(len, lines)) <= size // share
            chosen = samples[name, share] = [int(line.split()[0]) for line in lines]
            assert lines == [texts[i] for i in chosen] and chosen == sorted(chosen)
            assert abs(sum(chosen) / len(chosen) - 500) < 60
    assert len(samples["a.jsonl", 1]) == 1000 and {*samples["a.jsonl", 8]} < {*samples["a.jsonl", 4]}
    assert [samples["a.jsonl", n] for n in (1, 4, 8)] == [samples["b.jsonl.gz", n] for n in (1, 4, 8)]
    train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "a.model", 300, sample_bytes=1)
    assert len(lines) == 1


@pytest.mark.parametrize("size, text", [
    (20000, r"vocab_size=20000 is more than this text supports; use \d+ or less, or more text"),
    (100, "vocab_size=100 leaves no room beside 3 control and 256 byte pieces; use 260 or more"),
    (262, r"vocab_size=262 is less than the characters of this text need; use \d+ or more"),
])  # fmt: skip
def test_a_vocabulary_the_text_does_not_support(jsonl: Path, tmp_path: Path, size: int, text: str) -> None:
    with pytest.raises(DataError, match=text):
        train_tokenizer([jsonl], tmp_path / "a.model", size)
    assert list(tmp_path.iterdir()) == []


def test_training_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "a.model", 300)
    (tmp_path / "a.jsonl").write_text("\n{}\n")
    with pytest.raises(DataError, match=r'1 file cannot be read:\n  \S+a.jsonl: none of 1 record can be used: no key'):
        train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "a.model", 300)
    for options in ({"sample_bytes": 0}, {"threads": 0}):
        with pytest.raises(DataError, match=r"sample_bytes=\d+, threads=\d; use 1 or more of each"):
            train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "a.model", 300, **options)
    with pytest.raises(DataError, match="must end in .model"):
        train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "a", 300)
