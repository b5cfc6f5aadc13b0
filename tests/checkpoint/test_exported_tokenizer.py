"""An exported tokenizer gives the ids of the training, begins and ends as its documents did, or says that it cannot."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from megallama.checkpoint.huggingface import NotEqualError, model_files, special_tokens, to_tokenizer
from megallama.config.errors import MegallamaError
from megallama.data.tokenizer import load_tokenizer
from megallama.inference.generate import encode_prompt
from tests.checkpoint.states import make_config

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = "the quick brown fox jumps over a lazy dog\twhile 12 birds; def return self naïve 東京 🦙 == -- </ ".split(" ")
TEXTS = [
    *(
        "",
        " ",
        "   ",
        " leading",
        "  two  spaces  ",
        "\n",
        "\n\n a\r\n",
        "\t\tx\ty",
        "0123456789",
        "🦙👩\u200d👧🏽",
        "東京は",
    ),
    *(
        "<s>",
        "</s>",
        "a</s>b <s>c",
        "<unk>",
        "x<0x0A><0xFF>",
        "▁",
        "▁▁a ▁",
        "\0",
        "\ufeff\ufffd",
        "é" * 5,
        "cafe\u0301",
    ),
    *("a" * 200, " " * 70, "-" * 81, "ab" * 90, "def f(x):\n    return x\n", "<sep>", " <sep> a<sep>b<sep>"),
]
BPE: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bytes": {"byte_fallback": False},
    "no prefix": {"add_dummy_prefix": False},
    "no prefix, symbols": {"add_dummy_prefix": False, "user_defined_symbols": ["<sep>", "<se"]},
    "more control": {"control_symbols": ["<ctl>"], "pad_id": 3},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unigram": ({"model_type": "unigram"}, "it is no model of byte pairs"),
    "unigram, no bytes": ({"model_type": "unigram", "byte_fallback": False}, "it is no model of byte pairs"),
    "symbols": ({"user_defined_symbols": ["<sep>"]}, "it has user-defined symbols"),
    "nfkc": ({"normalization_rule_name": "nmt_nfkc"}, "the text .* becomes other ids"),
    "spaces removed": ({"remove_extra_whitespaces": True}, "the text .* becomes other ids"),
    "suffix": ({"treat_whitespace_as_suffix": True}, "the text .* becomes other ids"),
}


def train(**options: Any) -> bytes:
    """A SentencePiece model of 500 pieces."""
    import sentencepiece

    draw, out = random.Random(1), io.BytesIO()
    lines = [" ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 12))) for _ in range(600)]
    base = {"model_type": "bpe", "vocab_size": 380, "byte_fallback": True, "normalization_rule_name": "identity"}
    base |= {"remove_extra_whitespaces": False, "split_digits": True, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **base | options)
    return out.getvalue()


def fuzzed(count: int = 400) -> list[str]:
    draw = random.Random(3)
    alphabets = ("ab -=▁<s>/", " aeinrst", "a ", "theq uickbrown", "=-#_ \n")
    return ["".join(draw.choice(alphabets[i % 5]) for _ in range(draw.randint(0, 40))) for i in range(count)]


def exported(folder: Path, tokenizer: Path, marks: dict[str, int | None] | None = None) -> tuple[Any, list[str]]:
    """The export as AutoTokenizer opens it, and what was said."""
    output: list[str] = []
    folder.mkdir(exist_ok=True)
    for name, content in model_files(make_config(), tokenizer, marks, None, output.append).items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder), output


@pytest.mark.parametrize("kind", BPE)
def test_sentencepiece_ids_are_those_of_the_training(tmp_path: Path, kind: str) -> None:
    (tmp_path / "t.model").write_bytes(train(**BPE[kind]))
    ours = load_tokenizer(tmp_path / "t.model")
    for begin in (None, ours.bos_id):
        theirs, output = exported(tmp_path / "out", tmp_path / "t.model", {"bos_id": begin, "eos_id": 2})
        assert output == [] and len(theirs) == ours.vocab_size
        first = [] if begin is None else [begin]
        for text in TEXTS + fuzzed():
            ids = ours.encode(text)
            assert theirs(text)["input_ids"] == first + ids, text
            assert theirs.encode(text, add_special_tokens=False) == ids
            if kind != "no bytes":  # what is unknown is shown otherwise
                assert theirs.decode(ids) == ours.decode(ids)
        assert [*theirs("a")] == ["input_ids", "attention_mask"]
        assert load_tokenizer(tmp_path / "out").path.name == "tokenizer.model"
        prompt = encode_prompt(tmp_path / "out", load_tokenizer(tmp_path / "out"), " a")
        assert prompt == theirs(" a")["input_ids"]
        assert encode_prompt(tmp_path / "out", load_tokenizer(tmp_path / "out"), "") == (first or [2])
        again = theirs.save_pretrained(tmp_path / "again") and transformers.AutoTokenizer.from_pretrained(
            tmp_path / "again"
        )
        assert [again(text)["input_ids"] for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_equal_is_said_and_not_written(tmp_path: Path, kind: str) -> None:
    options, why = REFUSED[kind]
    (tmp_path / "t.model").write_bytes(train(**options))
    output: list[str] = []
    files = model_files(make_config(), tmp_path / "t.model", None, None, output.append)
    assert "tokenizer.json" not in files and files["tokenizer.model"] == (tmp_path / "t.model").read_bytes()
    assert len(output) == 1
    with pytest.raises(NotEqualError, match=why):
        to_tokenizer((tmp_path / "t.model").read_bytes())
    assert "t.model is exported without a tokenizer.json, for it" in output[0] or "for the text" in output[0]
    assert "transformers may give other ids than the training had" in output[0]


def test_pieces_of_one_score_are_refused() -> None:
    """As in vocabularies that were extended by hand: which of two merges comes first is then not theirs to say."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(train())
    merged = [piece for piece in model.pieces if piece.type == 1 and len(piece.piece) > 1]
    merged[5].score = merged[4].score
    with pytest.raises(NotEqualError, match="another piece has the score of its piece"):
        to_tokenizer(model.SerializeToString())


def test_a_piece_of_unknown_characters_is_refused() -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(train())
    model.pieces.add(piece="ЖЖ", score=-5000.0)
    with pytest.raises(NotEqualError, match="its piece 'ЖЖ' has characters that are no pieces"):
        to_tokenizer(model.SerializeToString())


# ---- tokenizer.json ----


def byte_level(path: Path, names: tuple[str, ...], begin: str | None = None) -> Path:
    """A tokenizer.json of bytes with these added tokens; with `begin` its post-processor puts that first."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=[*names], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the quick brown fox"] * 9, trainer)
    if begin is not None:
        template = tokenizers.processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, names.index(begin))])
        made.post_processor = tokenizers.processors.Sequence([tokenizers.processors.ByteLevel(), template])
    path.parent.mkdir(exist_ok=True)
    made.save(str(path))
    return path


LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>")


@pytest.mark.parametrize("processor", [None, LLAMA3[0], LLAMA3[1]])
@pytest.mark.parametrize("trained", [None, 0])
def test_a_tokenizer_json_begins_as_the_documents_did(
    tmp_path: Path, processor: str | None, trained: int | None
) -> None:
    path = byte_level(tmp_path / "t.json", LLAMA3, processor)
    theirs, output = exported(tmp_path / "out", path, {"bos_id": trained, "eos_id": 1})
    ours = load_tokenizer(path)
    first = [] if trained is None else [trained]
    for text in [text for text in TEXTS if "\0" not in text] + ["<|end_of_text|>x", "<|begin_of_text|>"]:
        assert theirs(text)["input_ids"] == first + ours.encode(text), text
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert raw.encode("the").ids == first + ours.encode("the") and output == []
    assert encode_prompt(tmp_path / "out", load_tokenizer(tmp_path / "out"), "the") == raw.encode("the").ids
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is (trained is not None) and settings["add_eos_token"] is False
    unchanged = (processor, trained) in ((None, None), (LLAMA3[0], 0))
    assert ((tmp_path / "out/tokenizer.json").read_bytes() == path.read_bytes()) == unchanged
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1 if trained is None else 0, 1)


@pytest.mark.parametrize("as_dict", [False, True])
def test_what_the_tokenizer_declares_comes_first(tmp_path: Path, as_dict: bool) -> None:
    names = ("</s>", "<|end_of_text|>", "<|fin|>", "<|start|>")
    path = byte_level(tmp_path / "t/tokenizer.json", names)
    assert load_tokenizer(path).eos_id == special_tokens(path)["eos"][1] == 0
    for kind, name in (("eos", "<|fin|>"), ("bos", "<|start|>")):
        output = {"content": name, "lstrip": False, "special": True} if as_dict else name
        file = path.with_name("tokenizer_config.json" if kind == "eos" else "special_tokens_map.json")
        file.write_text(json.dumps({f"{kind}_token": output}))
    ours = load_tokenizer(path)
    assert (ours.bos_id, ours.eos_id) == (3, 2)
    assert special_tokens(path) == {"bos": ("<|start|>", 3), "eos": ("<|fin|>", 2)}
    theirs, _ = exported(tmp_path / "out", path, {"bos_id": 3, "eos_id": 2})
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs("a").input_ids[0]) == (3, 2, 3)
    path.with_name("tokenizer_config.json").write_text('{"eos_token": "<|none|>"}')  # it has no such token
    assert load_tokenizer(path).eos_id == 0
    path.with_name("tokenizer_config.json").write_text("{")
    with pytest.raises(MegallamaError, match="tokenizer_config.json cannot be read .*; mend it, or move it away"):
        load_tokenizer(path)


def test_a_declared_bos_is_not_added_where_documents_had_none(tmp_path: Path) -> None:
    """tokenizer_config.json of LLaMA beside the tokenizer, and documents that were tokenized without bos."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train())
    output = {
        "add_bos_token": True,
        "tokenizer_class": "LlamaTokenizer",
        "model_max_length": 4,
        "chat_template": "{{ x }}",
    }
    path.with_name("tokenizer_config.json").write_text(json.dumps(output | {"bos_token": "<s>", "eos_token": "</s>"}))
    theirs, _ = exported(tmp_path / "out", path, {"eos_id": 2})
    assert theirs(" a")["input_ids"] == load_tokenizer(path).encode(" a")
    assert theirs.model_max_length == 64 and theirs.chat_template == "{{ x }}"
    assert theirs.split_special_tokens is False  # a template's own tokens must be seen


def test_a_recorded_end_wins_over_a_declared_one(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "t.json", ("</s>", "<|end_of_text|>"))
    theirs, _ = exported(tmp_path / "out", path, {"bos_id": None, "eos_id": 1})
    assert theirs.eos_token_id == 1
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == 1
    assert load_tokenizer(tmp_path / "out").eos_id == 1
