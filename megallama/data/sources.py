"""From the configuration to open data: the training sources mixed by weight, and the validation sources.

Everything that can be known to be wrong before the first step is checked here: files, token ids against the model's
vocabulary, the tokenizer against both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megallama.config.schema import DataConfig
from megallama.data.blend import Blend
from megallama.data.errors import DataError
from megallama.data.indexed import IndexedDataset
from megallama.data.samples import Source, Synthetic
from megallama.data.tokenizer import Tokenizer, load_tokenizer, sha256_of


@dataclass(frozen=True)
class TrainData:
    """The training samples. `sources` is empty for synthetic data."""

    sample: Callable[[int], np.ndarray]
    sources: tuple[Source, ...] = ()
    blend: Blend | None = None

    def progress(self, num_samples: int) -> list[dict[str, Any]]:
        """What the first num_samples samples took from each source: {"path", "samples", "tokens", "epochs"}."""
        counts = self.blend.counts(num_samples) if self.blend else []
        return [
            {"path": s.dataset.prefix, "samples": n, "tokens": n * s.seq_length, "epochs": n / s.num_windows}
            for s, n in zip(self.sources, counts, strict=True)
        ]

    def fingerprints(self) -> dict[str, dict[str, int | str]]:
        """What identifies each source's content, by path; for the checkpoint's manifest."""
        return {s.dataset.prefix: s.dataset.fingerprint() for s in self.sources}


@dataclass(frozen=True)
class ValidData:
    """One validation source: samples 0 .. num_samples - 1 are all its windows, each once, in file order.

    bytes_per_token: bytes of text per token (eos included), None where the corpus does not record it; bits per byte is
    loss / ln 2 / bytes_per_token.
    """

    name: str
    sample: Callable[[int], np.ndarray]
    num_samples: int
    bytes_per_token: float | None


@dataclass(frozen=True)
class Data:
    """All the data of a run, open and checked."""

    train: TrainData
    valid: tuple[ValidData, ...]
    tokenizer: Tokenizer | None


def open_sources(config: DataConfig, seq_length: int, seed: int, vocab_size: int) -> Data:
    """Open what the section `data` names. vocab_size is the model's.

    Raises: DataError for a missing or damaged file, a source too small for one sample, token ids outside the
    vocabulary, or a tokenizer that is not the one the data was made with.
    """
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    if tokenizer and tokenizer.vocab_size != vocab_size:
        raise DataError(
            f"data.tokenizer={tokenizer.path} has {tokenizer.vocab_size} ids but model.vocab_size={vocab_size}; "
            f"write model.vocab_size={tokenizer.vocab_size}"
        )
    valid = tuple(_valid(s.path, seq_length, seed, vocab_size, tokenizer) for s in config.valid)
    if config.synthetic:
        return Data(TrainData(Synthetic(vocab_size, seq_length, seed).sample), valid, tokenizer)
    if not config.train:
        raise DataError(
            'data.train is empty; write data.train=["path/prefix"] (made with tools/preprocess_data.py) or '
            "data.synthetic=true"
        )
    blend = Blend([s.weight for s in config.train])
    sources = tuple(Source(_open(s.path, vocab_size, tokenizer), seq_length, seed) for s in config.train)
    return Data(TrainData(_mixed(sources, blend), sources, blend), valid, tokenizer)


def _mixed(sources: Sequence[Source], blend: Blend) -> Callable[[int], np.ndarray]:
    def sample(i: int) -> np.ndarray:
        source, index = blend.locate(i)
        return sources[source].sample(index)

    return sample


def _valid(path: str, seq_length: int, seed: int, vocab_size: int, tokenizer: Tokenizer | None) -> ValidData:
    source = Source(_open(path, vocab_size, tokenizer), seq_length, seed, shuffle=False)
    facts = read_facts(source.dataset.prefix)
    ratio = facts["bytes"] / facts["tokens"] if facts.get("bytes") and facts.get("tokens") else None
    return ValidData(Path(source.dataset.prefix).name, source.sample, source.num_windows, ratio)


def _open(path: str, vocab_size: int, tokenizer: Tokenizer | None) -> IndexedDataset:
    dataset = IndexedDataset(path)
    facts = read_facts(dataset.prefix)
    largest = max(dataset.largest_token(), int(facts.get("vocab_size", 0)) - 1)
    if largest >= vocab_size:
        raise DataError(
            f"{dataset.prefix} was made with a vocabulary of at least {largest + 1} ids but "
            f"model.vocab_size={vocab_size}; "
            f"write model.vocab_size={facts.get('vocab_size', largest + 1)} (the size of its tokenizer), or "
            "preprocess the text again"
        )
    made_with = facts.get("tokenizer_sha256")
    if tokenizer and made_with and made_with != sha256_of(tokenizer.path):
        raise DataError(
            f"{dataset.prefix} was made with another tokenizer ({facts.get('tokenizer')}, sha256 {made_with[:12]}...) "
            "than "
            f"data.tokenizer={tokenizer.path}; name that one, or preprocess the text again"
        )
    return dataset


def read_facts(prefix: str) -> dict[str, Any]:
    """What preprocessing recorded in PREFIX.json; {} where there is no such file (a corpus of another tool)."""
    path = Path(prefix + ".json")
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); preprocess the text again, or delete this file") from error
    if not isinstance(facts, dict):
        raise DataError(f"{path} is damaged (it holds no object); preprocess the text again, or delete this file")
    return facts
