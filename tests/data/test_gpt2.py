"""GPT-2's files: the ids of transformers' tokenizer, text that stays text, and files that are refused."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.errors import DataError
from megallama.data.tokenizer import Gpt2Tokenizer, byte_characters, load_tokenizer, sha256_of
from tests.text.test_fast_encoder import CONTROL, real_texts
from tests.words import text_of

HARD = (
    "I'll say: it's DON'T, we've 've '  's \n'S",
    "  two   three\n\n\n  four \t\t five\r\n\r\n   \n end   ",
    "naïve e\u0301 ½ Ⅷ ٣٤٥ 12345 3.14 x²",
    "東京 中文 한국어 ไทย हिन्दी العربية 🦙👩\u200d👩\u200d👧🏽 \U0001f1e9\U0001f1ea",
    "a<|endoftext|>b <|endoftext|><|endoftext|> <s></s>",
    "\0\x01\x7f\x85\xa0\u1680\u2003\u2028\u202f\u3000\ufeff\ufffd\t\v\f\r",
    "a" * 5000 + "=" * 3000 + " " * 3000 + "\n" * 999,
    "",
    " ",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt of 3,000 ids, the last one <|endoftext|> as in GPT-2's own."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("gpt2")
    model = ByteLevelBPETokenizer()
    texts = [*real_texts(600_000), *(text_of(i) for i in range(100)), *HARD, *CONTROL]
    model.train_from_iterator(texts, vocab_size=2999, show_progress=False)
    model.save_model(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"<|endoftext|>": 2999}))
    return folder


def test_it_is_transformers_tokenizer(folder: Path) -> None:
    from transformers import GPT2Tokenizer

    theirs = GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), split_special_tokens=True)
    ours = Gpt2Tokenizer(folder / "vocab.json")
    texts = [*HARD, *real_texts(400_000), *(text_of(i) for i in range(50))]
    draw = random.Random(1)
    texts += ["".join(draw.choices("ab \n'sdlt.19<|é東🦙\u0301\t", k=200)) for _ in range(200)]
    total = 0
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False) and ours.decode(ids) == text
        assert 2999 not in ids
        total += len(ids)
    assert total > 100_000 and ours.eos_id == theirs.eos_token_id == 2999 and ours.vocab_size == len(theirs) == 3000
    assert ours.encode_arrays(texts[:9])[0].tolist() == [i for t in texts[:9] for i in ours.encode(t)]

    @settings(max_examples=300, deadline=None)
    @given(st.text(st.characters(max_codepoint=0x3FF, codec="utf-8"), max_size=60))
    def check(text: str) -> None:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False) and ours.decode(ids) == text

    check()


def test_bytes_have_gpt_2s_characters() -> None:
    names = byte_characters()
    assert len(set(names)) == 256 and names[ord("A")] == "A" and names[ord(" ")] == "Ġ" and names[ord("\n")] == "Ċ"
    assert (names[0], names[127], names[160], names[173], names[255]) == ("Ā", "ġ", "ł", "Ń", "ÿ")


def test_its_names(folder: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(folder)
    assert ours.path == folder / "vocab.json" and (ours.bos_id, ours.eos_id, ours.control_ids) == (None, 2999, (2999,))
    assert ours.decode([*ours.encode("a b"), 2999]) == "a b"
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / f"gpt2-{name}").write_bytes((folder / name).read_bytes())
    other = load_tokenizer(tmp_path / "gpt2-vocab.json")
    assert other.encode(HARD[0]) == ours.encode(HARD[0])
    both = (folder / "vocab.json").read_bytes() + (folder / "merges.txt").read_bytes()
    assert sha256_of(other.path) == sha256_of(ours.path) == hashlib.sha256(both).hexdigest()
    with pytest.raises(DataError, match=r"merges.txt has the suffix '.txt', expected .model .* or GPT-2's vocab.json"):
        load_tokenizer(folder / "merges.txt")


BYTES = {c: b for b, c in enumerate(byte_characters())}


@pytest.mark.parametrize("vocabulary, merges, text", [
    ("{", "", "vocab.json is not JSON: Expecting property name"),
    ("[]", "", 'vocab.json is not a vocabulary of GPT-2\'s form {"token": id, ...}'),
    ('{"a": "b"}', "", "vocab.json is not a vocabulary of GPT-2's form"),
    ('{"a": 0}', "", "vocab.json lacks 255 of the 256 bytes, the first 0x00"),
    (json.dumps(BYTES), None, "merges.txt does not exist; a GPT-2 vocabulary needs its merges beside it"),
    (json.dumps(BYTES), "#version: 0.2\na b\n", "merges.txt merges 'a' and 'b', but 'ab' is not in vocab.json"),
    (json.dumps(BYTES | {"ab": 256}), "a b\n\na\n", "merges.txt:3: 'a' is not a merge; every line names two tokens"),
    (json.dumps(BYTES | {"ab": 256}), "a b c\n", "merges.txt:1: 'a b c' is not a merge"),
    (json.dumps(BYTES), "a \udcff\n", "merges.txt merges 'a' and '\ufffd', but '\ufffd' is not in vocab.json"),
])  # fmt: skip
def test_what_is_no_gpt_2_is_refused(tmp_path: Path, vocabulary: str, merges: str | None, text: str) -> None:
    (tmp_path / "vocab.json").write_text(vocabulary)
    if merges is not None:
        (tmp_path / "merges.txt").write_text(merges, "utf-8", "surrogateescape")
    with pytest.raises(DataError) as error:
        load_tokenizer(tmp_path)
    assert text in str(error.value)


def test_a_library_that_splits_otherwise_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would encode is not what the model was trained on."""
    monkeypatch.setattr("megallama.data.tokenizer.SPLIT", r"\S+|\s+")
    with pytest.raises(DataError, match="this version of `tokenizers` splits text unlike GPT-2; .* needs another one"):
        load_tokenizer(folder)
