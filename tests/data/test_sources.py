"""From the section `data` of a configuration to open, checked sources."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megallama.config.schema import DataConfig, SourceConfig
from megallama.data.errors import DataError
from megallama.data.indexed import IndexedDataset, IndexedWriter, dtype_for
from megallama.data.preprocess import preprocess
from megallama.data.sources import open_sources


def config(train: list[tuple[Path, float]], valid: list[Path] = [], **more: Any) -> DataConfig:  # noqa: B006
    return DataConfig(
        train=tuple(SourceConfig(path=str(p), weight=w) for p, w in train),
        valid=tuple(SourceConfig(path=str(p)) for p in valid),
        **more,
    )


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
    train = open_sources(config([(a, 3), (b, 1)]), 10, 7, 2000).train
    samples = [train.sample(i) for i in range(40)]
    from_a = [int(s[0]) for s in samples if s[0] < 1000]
    assert len(from_a) == 30
    assert all(sorted(from_a[e : e + 10]) == list(range(0, 100, 10)) for e in (0, 10, 20))
    assert train.progress(40) == [
        {"path": str(a), "samples": 30, "tokens": 300, "epochs": 3.0},
        {"path": str(b), "samples": 10, "tokens": 100, "epochs": 2.0},
    ]
    again = open_sources(config([(a, 3), (b, 1)]), 10, 7, 2000).train
    assert np.array_equal(again.sample(33), samples[33])
    other = open_sources(config([(a, 3), (b, 1)]), 10, 8, 2000).train
    assert any(not np.array_equal(other.sample(i), samples[i]) for i in range(40))
    assert train.fingerprints() == {str(p): IndexedDataset(p).fingerprint() for p in (a, b)}


def test_validation_visits_every_window_once_in_order(corpus: Path, tokenizer_path: Path) -> None:
    given = config([(Path(f"{corpus}_train"), 1)], [Path(f"{corpus}_valid")], tokenizer=str(tokenizer_path))
    data = open_sources(given, 16, 7, 330)
    (valid,) = data.valid
    tokens = IndexedDataset(f"{corpus}_valid").read(0, 16 * valid.num_samples + 1)
    assert valid.name == "text_valid"
    assert np.array_equal(np.concatenate([valid.sample(i)[:-1] for i in range(valid.num_samples)]), tokens[:-1])
    facts = json.loads(Path(f"{corpus}_valid.json").read_text())
    assert valid.bytes_per_token == facts["bytes"] / facts["tokens"]
    assert data.tokenizer is not None and data.tokenizer.vocab_size == 330


def test_synthetic_data_needs_no_files() -> None:
    train = open_sources(config([], synthetic=True), 8, 1, 50).train
    assert train.sample(3).shape == (9,) and train.sample(3).max() < 50
    assert train.progress(10) == [] and train.fingerprints() == {}


def test_no_training_data_is_an_error() -> None:
    with pytest.raises(DataError, match=r'data.train is empty; write data.train=\["path/prefix"\] .* data.synth'):
        open_sources(config([]), 8, 1, 50)


def test_missing_truncated_and_small_sources(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone.idx does not exist; give the prefix"):
        open_sources(config([(tmp_path / "gone", 1)]), 8, 1, 330)
    small = numbers(tmp_path / "small", 0, 5)
    with pytest.raises(DataError, match="small holds 5 tokens, fewer than one sample of batch.seq_length . 1 = 9"):
        open_sources(config([(Path(f"{corpus}_train"), 1), (small, 1)]), 8, 1, 330)
    os.truncate(f"{corpus}_train.bin", 1000)
    with pytest.raises(DataError, match=r"text_train.bin has 1000 bytes, expected \d+ from text_train.idx"):
        open_sources(config([(Path(f"{corpus}_train"), 1)]), 8, 1, 330)


def test_the_vocabularies_must_agree(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    train = Path(f"{corpus}_train")
    with pytest.raises(DataError, match="has 330 ids but model.vocab_size=512; write model.vocab_size=330"):
        open_sources(config([(train, 1)], tokenizer=str(tokenizer_path)), 8, 1, 512)
    with pytest.raises(DataError, match="vocabulary of at least 330 ids but model.vocab_size=300; write .*=330"):
        open_sources(config([(train, 1)]), 8, 1, 300)
    foreign = numbers(tmp_path / "foreign", 0, 100)  # nothing recorded: the tokens themselves are looked at
    with pytest.raises(DataError, match="vocabulary of at least 100 ids but model.vocab_size=99; write .*=100"):
        open_sources(config([(foreign, 1)]), 8, 1, 99)


def test_data_of_another_tokenizer_is_refused(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer_path.read_bytes() + b"\x12\x00")  # the same pieces, another file
    with pytest.raises(DataError, match=r"text_train was made with another tokenizer \(tokenizer.model, sha256 \w{12}"):
        open_sources(config([(Path(f"{corpus}_train"), 1)], tokenizer=str(other)), 8, 1, 330)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_record_is_named(corpus: Path, content: str) -> None:
    Path(f"{corpus}_train.json").write_text(content)
    with pytest.raises(DataError, match=r"text_train.json is damaged .* or delete this file"):
        open_sources(config([(Path(f"{corpus}_train"), 1)]), 8, 1, 330)
