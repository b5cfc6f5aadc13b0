"""gigatoken gives the ids of the reference libraries on everything, or is not used and the reason is told."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import sysconfig
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.data.tokenizer import Tokenizer, byte_characters
from megallama.text import fast_encoder
from megallama.text.fast_encoder import FastTokenizer, load_fast_tokenizer

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("sentencepiece", "json", "gpt2")
CONTROL = ["<s>", "</s>", "<unk>", "<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>", "<0x0A>", "<0x41>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def real_texts(size: int) -> Iterator[str]:
    """About `size` bytes of this machine's own text: sources of the standard library, and documentation if there is."""
    folders = [(Path(sysconfig.get_paths()["stdlib"]), "*.py"), (Path("/usr/share/doc"), "copyright")]
    for folder, pattern in folders:
        left = size // len(folders)
        for path in sorted(folder.rglob(pattern), key=lambda p: p.name):
            if left > 0 and (raw := path.read_bytes()[:20000]):
                left -= len(raw)
                yield raw.decode("utf-8", "ignore")


def strange_texts(size: int) -> Iterator[str]:
    """About `size` bytes of text in which every character, control string and white space may stand anywhere."""
    draw = random.Random(0)
    parts = [*CONTROL, *"  \n\t\r09aAzZ'._<>|/é東🦙▁\u0301\u200d\u3000\xa0", "\r\n", "    ", "'ll", "12345", "</", "<|"]
    while size > 0:
        text = "".join(
            draw.choice(parts) if draw.random() < 0.7 else chr(draw.choice([draw.randrange(0xD800), 0x1F300, 0x20000]))
            for _ in range(draw.randrange(400))
        )
        size -= len(text.encode())
        yield text


def llama3_json(vocabulary: dict[str, int], merges: list[tuple[str, str]], **other: object) -> dict:
    """A tokenizer.json in the form of LLaMA 3's."""
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = [special(name, len(vocabulary) + i) for i, name in enumerate(("<|begin_of_text|>", "<|end_of_text|>"))]
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "decoder": bytes_,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": True},
        "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
    } | other


def special(content: str, number: int, **other: object) -> dict:
    """An added token as a tokenizer.json has it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **flags, **other}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tokenizer of each kind, trained on text that is full of control strings."""
    import sentencepiece
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("made")
    texts = [t for text in real_texts(1_500_000) for t in (text, "".join(CONTROL), " ".join(CONTROL * 2))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.replace("\0", "").split("\n")),
        **{"model_prefix": str(folder / "sentencepiece"), "vocab_size": 4000, "model_type": "bpe"},
        **{"byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity", "minloglevel": 2},
        **{"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "max_sentence_length": 1 << 20},
    )
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=6000, show_progress=False)
    bpe.save_model(str(folder))
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(llama3_json(vocabulary, merges)))  # type: ignore[arg-type]
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"<|endoftext|>": len(vocabulary)}))
    return folder


def opened(folder: Path, kind: str) -> FastTokenizer:
    """The tokenizer of a kind, with its proof done."""
    names = {"sentencepiece": "sentencepiece.model", "json": "tokenizer.json", "gpt2": "vocab.json"}
    tokenizer = load_fast_tokenizer(folder / names[kind])
    assert isinstance(tokenizer, FastTokenizer) and tokenizer.encoder.startswith("gigatoken, proven equal to ")
    return tokenizer


def assert_equal(tokenizer: FastTokenizer, texts: list[str]) -> int:
    """Every document has the reference's ids, one by one; how many tokens that were."""
    tokens, lengths = tokenizer.encode_arrays(texts)
    expected = [tokenizer.reference.encode(text) for text in texts]
    assert tokens.dtype == np.uint32 and lengths.dtype == np.int64 and lengths.tolist() == [*map(len, expected)]
    rows = np.split(tokens, np.cumsum(lengths)[:-1])
    assert [t for t, row, ids in zip(texts, rows, expected, strict=True) if row.tolist() != ids] == []
    return len(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_of_megabytes_are_the_references(made: Path, kind: str) -> None:
    tokenizer = opened(made, kind)
    assert assert_equal(tokenizer, [*real_texts(2_500_000)]) > 500_000
    strange = [*strange_texts(600_000)]
    assert assert_equal(tokenizer, strange) > 100_000
    assert [len(a) for a in tokenizer.encode_arrays([])] == [0, 0]
    assert not set(tokenizer.encode_arrays(strange)[0].tolist()) & set(tokenizer.control_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_has_the_references_ids(made: Path, kind: str) -> None:
    tokenizer = opened(made, kind)
    piece = st.one_of(st.text(st.characters(codec="utf-8"), max_size=8), st.sampled_from([*CONTROL, " ", "\n", "'s"]))

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.lists(piece, max_size=12).map("".join), min_size=1, max_size=5))
    def check(texts: list[str]) -> None:
        assert_equal(tokenizer, texts)

    check()


@pytest.mark.parametrize("kind", ["json", "gpt2"])
def test_every_character_is_split_off_alike(tmp_path: Path, kind: str) -> None:
    """In this vocabulary a byte merges with the character before it if the expression leaves them together."""
    names, vocabulary, merges = byte_characters(), {}, []
    vocabulary.update({c: b for b, c in enumerate(names)})
    for first in b".a1 ":
        for lead in range(0xC2, 0xF5):
            merges.append((names[first], names[lead]))
            vocabulary["".join(merges[-1])] = len(vocabulary)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, merges)))
    (tmp_path / "tokenizer.json").write_text(json.dumps(llama3_json(vocabulary, merges)))
    tokenizer = opened(tmp_path, kind)
    known = [c for c in range(128, 0x32400) if unicodedata.category(chr(c)) not in ("Cs", "Co", "Cn")]
    new = [0x16EA0, 0x16EBB, 0x88F, 0xC5C, 0x1E6E0, 0x323B0, 0x10ED9, 0x558, 0x3D000, 0x10FFFF, 0xE000]
    around = "..{0}\na{0}\n1{0} {0}x".format
    texts = ["".join(around(chr(c)) for c in known[i : i + 100]) for i in range(0, len(known), 100)]
    assert_equal(tokenizer, texts + [around(chr(c)) for c in new])


def test_control_strings_in_the_fast_path_stay_text(made: Path) -> None:
    for kind in KINDS:
        tokenizer = opened(made, kind)
        for text in [*CONTROL, "a<s>b</s>c", "".join(CONTROL), "<s></s>" * 50]:
            tokens, lengths = tokenizer.encode_arrays(["x", text, "x"])
            assert not set(tokens.tolist()) & {*tokenizer.control_ids, tokenizer.eos_id}
            assert tokenizer.decode(tokens[lengths[0] : -lengths[2]].tolist()) == text
    tokenizer = opened(made, "sentencepiece")
    expected = [i for text in CONTROL for i in tokenizer.reference.encode(text)]
    tokenizer.reference = SimpleNamespace()  # type: ignore[assignment]  # none of them is work for it
    assert tokenizer.encode_arrays(CONTROL)[0].tolist() == expected


@pytest.mark.parametrize("change", ["nonspecial", "normalizer", "prefix", "llama2"])
def test_other_forms_of_tokenizer_json(made: Path, tmp_path: Path, change: str) -> None:
    content = json.loads((made / "tokenizer.json").read_text())
    number = len(content["model"]["vocab"]) + 2
    if change == "nonspecial":
        extra = [special("  ", number, special=False), special("İi", number + 1, special=False, normalized=True)]
        content["added_tokens"] += extra
    elif change == "normalizer":
        content["normalizer"] = {"type": "NFC"}
        content["added_tokens"].append(special("é", number, normalized=True))
    elif change == "prefix":
        content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    else:
        content = json.loads(sentencepiece_to_tokenizer_json((made / "sentencepiece.model").read_bytes()))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_fast_tokenizer(tmp_path)
    assert isinstance(tokenizer, FastTokenizer)
    reasons = {"normalizer": "its normalizer is NFC()", "prefix": "it encodes"}
    if change in reasons:
        assert tokenizer.encoder.startswith(f"tokenizers (gigatoken is not used: {reasons[change]}")
    else:
        assert tokenizer.encoder == "gigatoken, proven equal to tokenizers"
    assert_equal(tokenizer, [*strange_texts(100_000), *real_texts(100_000), "e\u0301", "a  b", "İi"])


@pytest.mark.parametrize("options, reason", [
    ({"model_type": "unigram"}, "only BPE sentencepiece models are supported"),
    ({"byte_fallback": False}, "only byte_fallback sentencepiece models are supported"),
    ({"normalization_rule_name": "nmt_nfkc"}, "its normalization is not the identity"),
    ({"remove_extra_whitespaces": True}, "its normalization is not the identity"),
    ({"user_defined_symbols": ["<tool>", "\t", "  "]}, ""),
    ({"add_dummy_prefix": False}, ""),
])  # fmt: skip
def test_other_forms_of_sentencepiece(tmp_path: Path, options: dict[str, object], reason: str) -> None:
    import sentencepiece

    lines = [line for text in real_texts(300_000) for line in text.split("\n")]
    base = {"model_prefix": str(tmp_path / "m"), "vocab_size": 800, "model_type": "bpe", "byte_fallback": True}
    base |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), minloglevel=2, **base | options)
    tokenizer = load_fast_tokenizer(tmp_path / "m.model")
    assert isinstance(tokenizer, FastTokenizer)
    refused = f"sentencepiece (gigatoken is not used: {reason}"
    expected = refused if reason else "gigatoken, proven equal to sentencepiece"
    assert tokenizer.encoder.startswith(expected)
    texts = [*strange_texts(100_000), *real_texts(100_000), "a<tool>b\tc  d", "ﬁ ² Å"]
    assert_equal(tokenizer, texts)


def test_pieces_that_together_spell_a_byte_are_not_it(tmp_path: Path) -> None:
    import sentencepiece

    lines = [f"a{name}b {name}<{name}>{name[:-1]} {name[1:]}" for name in ("<s>", "</s>", "<unk>", "<0x0A>")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 500),
        **{"model_prefix": str(tmp_path / "m"), "vocab_size": 300, "model_type": "bpe", "byte_fallback": True},
        **{"split_by_unicode_script": False, "split_by_number": False, "normalization_rule_name": "identity"},
        **{"remove_extra_whitespaces": False, "minloglevel": 2},
    )
    merges = json.loads(sentencepiece_to_tokenizer_json((tmp_path / "m.model").read_bytes()))["model"]["merges"]
    assert ["<", "0x0A>"] in merges and ["<", "unk>"] in merges  # what gigatoken is told if nobody takes it out
    tokenizer = load_fast_tokenizer(tmp_path / "m.model")
    assert tokenizer.encoder == "gigatoken, proven equal to sentencepiece" and isinstance(tokenizer, FastTokenizer)
    assert_equal(tokenizer, [*lines, "<0x0A>", "a<0x0A>b", "<unk>"])


def test_an_encoder_that_differs_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gigatoken

    true = gigatoken.Tokenizer.from_json
    wrong = {
        "a word": lambda text, ids: ids[::-1] if "東京" in text else ids,
        "a piece": lambda text, ids: ids[1:] if len(text) > 3000 else ids,
    }
    for change in wrong.values():
        fake = lambda content, change=change: SimpleNamespace(  # noqa: E731
            encode=lambda text: change(text, true(content).encode(text))
        )
        monkeypatch.setattr(gigatoken, "Tokenizer", SimpleNamespace(from_json=fake))
        tokenizer = load_fast_tokenizer(made / "tokenizer.json")
        assert tokenizer.encoder.startswith("tokenizers (gigatoken is not used: it encodes ")
        assert tokenizer.encode_arrays(["東京", "x"])[0].tolist() == tokenizer.encode("東京") + tokenizer.encode("x")

    class Panic(BaseException):
        """What Rust's panics are in Python."""

    def panic(content: str) -> None:
        raise Panic("index out of bounds")

    monkeypatch.setattr(gigatoken, "Tokenizer", SimpleNamespace(from_json=panic))
    expected = "tokenizers (gigatoken is not used: index out of bounds)"
    assert load_fast_tokenizer(made / "tokenizer.json").encoder == expected
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    expected = "sentencepiece (gigatoken is not installed; pip install gigatoken to encode faster)"
    assert load_fast_tokenizer(made / "sentencepiece.model").encoder == expected


def test_a_unicode_newer_than_the_libraries_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unicodedata, "unidata_version", "17.0.0")
    reason = "this Python has Unicode 17.0.0, which `tokenizers` does not know yet"
    assert load_fast_tokenizer(made / "tokenizer.json").encoder == f"tokenizers (gigatoken is not used: {reason})"
    assert opened(made, "sentencepiece").encoder == "gigatoken, proven equal to sentencepiece"


def test_without_fast_the_reference_encodes(made: Path) -> None:
    for name, encoder in (("sentencepiece.model", "sentencepiece"), ("tokenizer.json", "tokenizers")):
        tokenizer: Tokenizer = load_fast_tokenizer(made / name, fast=False)
        assert tokenizer.encoder == encoder and not isinstance(tokenizer, FastTokenizer)
        tokens, lengths = tokenizer.encode_arrays(["a b", "", "c"])
        assert tokens.dtype == np.uint32 and lengths.tolist() == [len(tokenizer.encode(t)) for t in ("a b", "", "c")]
        assert tokens.tolist() == tokenizer.encode("a b") + tokenizer.encode("c")


def test_starting_afresh_changes_no_ids(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_encoder, "CHECK_EVERY", 10_000)
    monkeypatch.setattr(fast_encoder, "CACHE_BYTES", -1 << 40)
    tokenizer = opened(made, "json")
    made_before = tokenizer._make
    count: list[int] = []
    tokenizer._make = lambda: count.append(1) or made_before()  # type: ignore[misc, func-returns-value]
    assert_equal(tokenizer, [*real_texts(300_000)])
    assert 15 <= len(count) <= 31


MEMORY = """
import random, sys
from megallama.text.fast_encoder import _resident_bytes, load_fast_tokenizer
tokenizer, draw = load_fast_tokenizer(sys.argv[1]), random.Random(0)
tokenizer.encode_arrays(["x"])
before = most = _resident_bytes()
for _ in range(60):
    letters = draw.randbytes(250_000).hex().translate(str.maketrans("0123456789", "ghijklmnop"))
    words = [letters[i : i + 9] for i in range(0, len(letters), 9)]  # none of them comes again
    tokenizer.encode_arrays([" ".join(words[i : i + 500]) for i in range(0, len(words), 500)])
    most = max(most, _resident_bytes())
print(most - before)
"""


@pytest.mark.parametrize("name", ["sentencepiece.model", "tokenizer.json"])
def test_new_words_without_end_take_bounded_memory(made: Path, name: str) -> None:
    command = [sys.executable, "-c", MEMORY, str(made / name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 128 << 20, done.stdout  # without the bound at least 230 million


def test_starting_is_quick_and_lazy(made: Path) -> None:
    code = "import sys; from megallama.text.fast_encoder import load_fast_tokenizer as l\n"
    code += "t = l(sys.argv[1]); t.encode('a'); "
    code += "assert 'gigatoken' not in sys.modules; t.encoder; m = sys.modules; print('gigatoken' in m, 'awkward' in m)"
    command = [sys.executable, "-c", code, str(made / "tokenizer.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"
