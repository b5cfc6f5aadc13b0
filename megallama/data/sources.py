"""From the configuration to open data: the training sources mixed by weight, validation and test sources.

Everything that can be known to be wrong before the first step is checked here: files, token ids against the model's
vocabulary, the tokenizer against both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megallama.config.schema import Config, SourceConfig
from megallama.data.errors import DataError
from megallama.data.indexed import IndexedDataset
from megallama.data.marks import Marks, agreed_marks
from megallama.data.metadata import read_metadata
from megallama.data.samples import Reader, Source, Synthetic
from megallama.data.tokenizer import Tokenizer, load_tokenizer, sha256_of
from megallama.data.train_dataset import TrainDataset
from megallama.plan.batch import BatchPlan


@dataclass(frozen=True)
class ValidDataset:
    """One validation or test source: samples 0 .. num_samples - 1 are all its sequences, each once, in file order.

    bytes_per_token: bytes of text per token (eos included), None where the corpus does not record it; bits per byte is
    loss / ln 2 / bytes_per_token.
    """

    name: str
    read: Reader
    num_samples: int
    bytes_per_token: float | None


@dataclass(frozen=True)
class Data:
    """All the data of a run, open and checked."""

    train: TrainDataset | Synthetic
    valid: tuple[ValidDataset, ...]
    test: tuple[ValidDataset, ...]
    tokenizer: Tokenizer | None
    marks: Marks
    notes: Sequence[str]  # why blocks of a source are not compared with checksums


def open_sources(config: Config) -> Data:
    """Open what the section `data` names.

    Raises: DataError for a missing or damaged file, a source too small for one sample, token ids outside the
    vocabulary, or a tokenizer that is not the one the data was made with.
    """
    data, vocab_size = config.data, config.model.vocab_size
    tokenizer = load_tokenizer(data.tokenizer, eos_token=data.eos_token) if data.tokenizer else None
    if tokenizer and tokenizer.vocab_size > vocab_size:  # a larger vocabulary is padded: those ids never occur
        raise DataError(
            f"data.tokenizer={tokenizer.path} has {tokenizer.vocab_size} ids but model.vocab_size={vocab_size}; "
            f"write model.vocab_size={tokenizer.vocab_size} or more"
        )
    paths = dict.fromkeys(source.path for source in (*data.train, *data.valid, *data.test))
    opened = {path: _open(path, config, tokenizer) for path in paths}
    notes = [dataset.unchecked for dataset in opened.values() if dataset.unchecked]
    marks = agreed_marks([*opened.values()], tokenizer, data.eos_token)
    valid, test = (tuple(_valid(s, config, opened[s.path]) for s in held) for held in (data.valid, data.test))
    if data.synthetic:
        synthetic = Synthetic(vocab_size, config.batch.seq_length, config.train.seed)
        return Data(synthetic, valid, test, tokenizer, marks, notes)
    if not data.train:
        raise DataError(
            'data.train is empty; write data.train=["path/prefix"] (made with megallama prepare) or data.synthetic=true'
        )
    sources = [_source(s, config, opened[s.path]) for s in data.train]
    return Data(TrainDataset(data, sources, BatchPlan(config.batch, 1)), valid, test, tokenizer, marks, notes)


def _source(source: SourceConfig, config: Config, dataset: IndexedDataset, *, shuffle: bool = True) -> Source:
    num_ids = read_metadata(dataset.prefix).get("vocab_size", config.model.vocab_size)
    return Source(dataset, config.batch.seq_length, config.train.seed, shuffle=shuffle, documents=source.documents,
                  mark_documents=config.data.document_mask, num_ids=num_ids)  # fmt: skip


def _valid(source: SourceConfig, config: Config, dataset: IndexedDataset) -> ValidDataset:
    opened = _source(source, config, dataset, shuffle=False)
    metadata = read_metadata(dataset.prefix)
    ratio = metadata["bytes"] / metadata["tokens"] if metadata.get("bytes") and metadata.get("tokens") else None
    return ValidDataset(source.label, opened.read, opened.num_sequences, ratio)


def _open(path: str, config: Config, tokenizer: Tokenizer | None) -> IndexedDataset:
    dataset, vocab_size = IndexedDataset(path), config.model.vocab_size
    if config.data.checksums:
        dataset.check_blocks()
    metadata = read_metadata(dataset.prefix)
    largest = max(dataset.largest_token(), int(metadata.get("vocab_size", 0)) - 1)
    if largest >= vocab_size:
        raise DataError(
            f"{dataset.prefix} was made with a vocabulary of at least {largest + 1} ids but model.vocab_size="
            f"{vocab_size}; write model.vocab_size={metadata.get('vocab_size', largest + 1)} (the size of its "
            "tokenizer) or more, or preprocess the text again"
        )
    made_with = metadata.get("tokenizer_sha256")
    if tokenizer and made_with and made_with != sha256_of(tokenizer.path):
        raise DataError(
            f"{dataset.prefix} was made with another tokenizer ({metadata.get('tokenizer')}, sha256 {made_with[:12]}"
            f"...) than data.tokenizer={tokenizer.path}; name that one, or preprocess the text again"
        )
    return dataset
