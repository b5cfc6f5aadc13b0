"""From the section `data` of a configuration to open, checked sources."""

from __future__ import annotations

import json
import os
import timeit
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megallama.config.errors import DataError
from megallama.config.schema import Config, DataConfig, SourceConfig
from megallama.data.indexed import IndexedDataset
from megallama.data.samples import Synthetic
from megallama.data.sources import Data, TrainDataset, open_sources
from megallama.data.writer import IndexedWriter, dtype_for
from megallama.text.preprocess import preprocess


def opened(
    train: list[tuple[Path, float]],
    valid: Sequence[Path] = (),
    *,
    s: int,
    seed: int = 1,
    vocab: int,
    **more: Any,  # noqa: B006
) -> Data:
    data = DataConfig(
        train=tuple(SourceConfig(path=str(p), weight=w) for p, w in train),
        valid=tuple(SourceConfig(path=str(p)) for p in valid),
        **more,
    )
    sections = {"batch": {"seq_length": s}, "train": {"seed": seed}, "model": {"vocab_size": vocab}}
    return open_sources(Config.model_validate({"data": data, **sections}))


@pytest.fixture
def corpus(jsonl: Path, tokenizer_path: Path, tmp_path: Path) -> Path:
    preprocess([jsonl], tmp_path / "text", tokenizer_path, split_valid=0.1)
    return tmp_path / "text"


def numbers(prefix: Path, low: int, count: int) -> Path:
    with IndexedWriter(prefix, dtype_for(10**6)) as writer:
        writer.add(np.arange(low, low + count))
    return prefix


def test_a_mixture_takes_its_shares_in_each_sources_order(tmp_path: Path) -> None:
    a, b = numbers(tmp_path / "a", 0, 101), numbers(tmp_path / "b", 1000, 51)
    train = opened([(a, 3), (b, 1)], s=10, seed=7, vocab=2000).train
    assert isinstance(train, TrainDataset)
    samples = train.read(range(40)).tokens
    from_a = [int(s[0]) for s in samples if s[0] < 1000]
    assert len(from_a) == 30
    assert all(sorted(from_a[e : e + 10]) == list(range(0, 100, 10)) for e in (0, 10, 20))
    assert train.consumption(40) == {
        "a": {"samples": 30, "tokens": 300, "epochs": 3.0},
        "b": {"samples": 10, "tokens": 100, "epochs": 2.0},
    }
    again = opened([(a, 3), (b, 1)], s=10, seed=7, vocab=2000).train
    assert np.array_equal(again.read([33, 2]).tokens, samples[[33, 2]])
    other = opened([(a, 3), (b, 1)], s=10, seed=8, vocab=2000).train
    assert not np.array_equal(other.read(range(40)).tokens, samples)
    saved = train.state(40)["sources"]
    assert [(x["name"], x["path"], x["samples"]) for x in saved] == [("a", str(a), 30), ("b", str(b), 10)]
    assert all(
        x["identity"].items() >= IndexedDataset(p).fingerprint().items() for x, p in zip(saved, (a, b), strict=True)
    )


def test_validation_visits_every_window_once_in_order(corpus: Path, tokenizer_path: Path) -> None:
    files = [(Path(f"{corpus}_train"), 1.0)], [Path(f"{corpus}_valid")]
    data = opened(*files, tokenizer=str(tokenizer_path), s=16, seed=7, vocab=330)
    (valid,) = data.valid
    tokens = IndexedDataset(f"{corpus}_valid").read(0, 16 * valid.num_sequences + 1)
    assert valid.name == "text_valid"
    assert np.array_equal(valid.read(range(valid.num_sequences)).tokens[:, :-1].reshape(-1), tokens[:-1])
    facts = json.loads(Path(f"{corpus}_valid.json").read_text())
    assert valid.bytes_per_token == facts["bytes"] / facts["tokens"]
    assert data.tokenizer is not None and data.tokenizer.vocab_size == 330


def test_synthetic_data_needs_no_files() -> None:
    train = opened([], synthetic=True, s=8, seed=1, vocab=50).train
    assert isinstance(train, Synthetic)
    assert train.read([3, 4]).tokens.shape == (2, 9) and train.read([3]).tokens.max() < 50


def test_no_training_data_is_an_error() -> None:
    with pytest.raises(DataError, match=r'data.train is empty; write data.train=\["path/prefix"\] .* data.synth'):
        opened([], s=8, seed=1, vocab=50)


def test_missing_truncated_and_small_sources(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone.idx does not exist; give the prefix"):
        opened([(tmp_path / "gone", 1)], s=8, seed=1, vocab=330)
    small = numbers(tmp_path / "small", 0, 5)
    with pytest.raises(DataError, match="small holds 5 tokens, fewer than one sample of batch.seq_length . 1 = 9"):
        opened([(Path(f"{corpus}_train"), 1), (small, 1)], s=8, seed=1, vocab=330)
    os.truncate(f"{corpus}_train.bin", 1000)
    with pytest.raises(DataError, match=r"text_train.bin has 1000 bytes, expected \d+ from text_train.idx"):
        opened([(Path(f"{corpus}_train"), 1)], s=8, seed=1, vocab=330)


def test_the_vocabularies_must_agree(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    train = Path(f"{corpus}_train")
    with pytest.raises(DataError, match="has 330 ids but model.vocab_size=329; write model.vocab_size=330 or more"):
        opened([(train, 1)], tokenizer=str(tokenizer_path), s=8, seed=1, vocab=329)
    padded = opened([(train, 1)], tokenizer=str(tokenizer_path), s=8, seed=1, vocab=512).train
    exact = opened([(train, 1)], tokenizer=str(tokenizer_path), s=8, seed=1, vocab=330).train
    assert np.array_equal(padded.read(range(20)).tokens, exact.read(range(20)).tokens)
    with pytest.raises(DataError, match="vocabulary of at least 330 ids but model.vocab_size=300; write .*=330"):
        opened([(train, 1)], s=8, seed=1, vocab=300)
    foreign = numbers(tmp_path / "foreign", 0, 100)  # nothing recorded: the tokens themselves are looked at
    with pytest.raises(DataError, match="vocabulary of at least 100 ids but model.vocab_size=99; write .*=100"):
        opened([(foreign, 1)], s=8, seed=1, vocab=99)


def test_data_of_another_tokenizer_is_refused(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer_path.read_bytes() + b"\x12\x00")  # the same pieces, another file
    with pytest.raises(DataError, match=r"text_train was made with another tokenizer \(tokenizer.model, sha256 \w{12}"):
        opened([(Path(f"{corpus}_train"), 1)], tokenizer=str(other), s=8, seed=1, vocab=330)


def poison(prefix: Path, value: int, token: int) -> None:
    """Overwrite one token of a file that may be open."""
    itemsize = IndexedDataset(prefix).dtype.itemsize
    with Path(f"{prefix}.bin").open("r+b") as file:
        file.seek(token * itemsize)
        file.write((value % 256**itemsize).to_bytes(itemsize, "little"))


def read_all(data: Data) -> None:
    """Every sequence of every source once."""
    assert isinstance(data.train, TrainDataset)
    data.train.read(range(2 * max(source.num_sequences for source in data.train.sources) * len(data.train.sources)))
    for held in (*data.valid, *data.test):
        held.read(range(held.num_sequences))


@pytest.mark.parametrize("which", ["web", "code", "held", "last"])
@pytest.mark.parametrize("value, known", [(65535, 0), (330, 330), (330, 0), (511, 330)])
def test_an_id_outside_the_vocabulary_ends_the_run(tmp_path: Path, which: str, value: int, known: int) -> None:
    """In a training source, the other one, a validation and a test source, overwritten after it was opened: beyond
    what PREFIX.json knows of the tokenizer, else beyond the model's vocabulary. The largest id that is allowed is."""
    prefixes = {name: tmp_path / name for name in ("web", "code", "held", "last")}
    for number, prefix in enumerate(prefixes.values()):
        with IndexedWriter(prefix, dtype_for(330)) as writer:
            writer.add(np.arange(81 + number) % 300)
        if known:
            Path(f"{prefix}.json").write_text(json.dumps({"vocab_size": known}))
    vocab = 512 if known else 330
    last = (SourceConfig(path=str(prefixes["last"])),)
    mixed = [(prefixes["web"], 3.0), (prefixes["code"], 1.0)]
    data = opened(mixed, [prefixes["held"]], s=8, vocab=vocab, checksums=False, test=last)
    poison(prefixes[which], 329, 42)
    read_all(data)
    poison(prefixes[which], value, 43)
    expected = rf"{which}\.bin: token 43 of the stream, at byte 86, is id {value}, but the vocabulary has 330 ids: the"
    with pytest.raises(DataError, match=expected):
        read_all(data)


@pytest.mark.parametrize("value", [-1, 70_000, -(2**31)])
def test_an_int32_id_outside_the_vocabulary_ends_the_run(tmp_path: Path, value: int) -> None:
    data = opened([(numbers(tmp_path / "wide", 0, 81), 1)], s=8, vocab=70_000)
    poison(tmp_path / "wide", 69_999, 3)
    read_all(data)
    poison(tmp_path / "wide", value, 5)
    with pytest.raises(DataError, match=f"token 5 of the stream, at byte 20, is id {value}, .* has 70000 ids"):
        read_all(data)


def test_the_check_of_ids_costs_next_to_nothing(tmp_path: Path) -> None:
    """A thousandth of a step is the limit; the smallest step anyone measures here takes 100 ms."""
    data = opened([(numbers(tmp_path / "wide", 0, 100_000), 1)], s=256, vocab=100_000).train
    assert isinstance(data, TrainDataset)
    source = data.sources[0]
    tokens, offsets = source.read(range(8)).tokens, np.arange(8)
    seconds = min(timeit.repeat(lambda: source._check_ids(tokens, offsets), number=100, repeat=5)) / 100
    assert seconds < 1e-4


@pytest.mark.parametrize("fact", ['{"vocab_size": "330"}', '{"tokens": -1}', '{"bytes": 1.5}', '{"documents": true}'])
def test_a_record_of_the_wrong_kind_is_named(corpus: Path, fact: str) -> None:
    Path(f"{corpus}_train.json").write_text(fact)
    with pytest.raises(DataError, match=r"text_train.json is damaged \(\w+ is .*\); preprocess the text again"):
        opened([(Path(f"{corpus}_train"), 1)], s=8, seed=1, vocab=330)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_record_is_named(corpus: Path, content: str) -> None:
    Path(f"{corpus}_train.json").write_text(content)
    with pytest.raises(DataError, match=r"text_train.json is damaged .* or delete this file"):
        opened([(Path(f"{corpus}_train"), 1)], s=8, seed=1, vocab=330)
