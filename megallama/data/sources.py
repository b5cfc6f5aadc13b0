"""From the configuration to open data: the training sources mixed by weight, validation and test sources.

Everything that can be known to be wrong before the first step is checked here: files, token ids against the model's
vocabulary, the tokenizer against both, how documents begin and end against one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megallama.config.schema import Config, SourceConfig
from megallama.data.errors import DataError
from megallama.data.indexed import IndexedDataset
from megallama.data.samples import Source, Synthetic
from megallama.data.tokenizer import Tokenizer, load_tokenizer, sha256_of
from megallama.data.train_dataset import TrainDataset

LOOK = 16  # documents looked at where nothing is recorded
SpecialIds = dict[str, int | None]  # "bos_id", "eos_id": what begins and ends documents; None: nothing does


@dataclass(frozen=True)
class Data:
    """All the data of a run, open and checked; validation and test sources are in file order."""

    train: TrainDataset | Synthetic
    valid: Sequence[Source]
    test: Sequence[Source]
    tokenizer: Tokenizer | None
    special_ids: SpecialIds
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
    special_ids = _common_ids([*opened.values()], tokenizer, data.eos_token)

    def source(of: SourceConfig, *, shuffle: bool = False) -> Source:
        return Source(
            opened[of.path],
            config.batch.seq_length,
            config.train.seed,
            name=of.label,
            shuffle=shuffle,
            documents=of.documents,
            mark_documents=data.document_mask,
            num_ids=opened[of.path].metadata.get("vocab_size", vocab_size),
        )

    valid, test = ([source(each) for each in held] for held in (data.valid, data.test))
    train: TrainDataset | Synthetic
    if data.synthetic:
        train = Synthetic(vocab_size, config.batch.seq_length, config.train.seed)
    elif data.train:
        train = TrainDataset(data, [source(each, shuffle=True) for each in data.train], config.batch)
    else:
        raise DataError(
            'data.train is empty; write data.train=["path/prefix"] (made with megallama prepare) or data.synthetic=true'
        )
    notes = [dataset.unchecked for dataset in opened.values() if dataset.unchecked]
    return Data(train, valid, test, tokenizer, special_ids, notes)


def _open(path: str, config: Config, tokenizer: Tokenizer | None) -> IndexedDataset:
    dataset, vocab_size = IndexedDataset(path), config.model.vocab_size
    if config.data.checksums:
        dataset.check_blocks()
    metadata = dataset.metadata
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


def _ids_of(dataset: IndexedDataset, tokenizer: Tokenizer | None) -> SpecialIds:
    """Those that are known: recorded, or a control token that begins (ends) all of the first documents."""
    metadata = dataset.metadata
    if "eos_id" in metadata:
        return {"bos_id": metadata.get("bos_id"), "eos_id": metadata["eos_id"]}
    if tokenizer is None:
        return {}
    starts = dataset.starts(0, min(LOOK, dataset.num_documents)).tolist()
    spans = [(a, b) for a, b in zip(starts, starts[1:], strict=False) if a < b]
    ends = ([a for a, _ in spans], [b - 1 for _, b in spans])
    seen = [{int(dataset.read(at, 1)[0]) for at in offsets} for offsets in ends]
    bos, eos = (ids.pop() if len(ids) == 1 and ids <= {*tokenizer.control_ids} else None for ids in seen)
    return {"bos_id": bos} | ({} if eos is None else {"eos_id": eos})


def _common_ids(datasets: Sequence[IndexedDataset], tokenizer: Tokenizer | None, eos_token: str | None) -> SpecialIds:
    """Those that all corpora have; an end that nobody knows is the tokenizer's.

    Raises: DataError if corpora differ, or do not end with `eos_token`, where it is given.
    """
    common: SpecialIds = {"eos_id": tokenizer.eos_id if tokenizer else None}
    for kind, verb in (("eos_id", "end"), ("bos_id", "begin")):
        seen: dict[int | None, str] = {}  # id -> the first corpus with it
        for dataset in datasets:
            if kind in (ids := _ids_of(dataset, tokenizer)):
                seen.setdefault(ids[kind], dataset.prefix)
        if len(seen) > 1:
            values = " and ".join(f"those of {prefix} with {_name(i)}" for i, prefix in seen.items())
            raise DataError(
                f"documents {verb} differently: {values}; preprocess the text again with the same --eos-token and --bos"
            )
        if seen and kind == "eos_id" and eos_token and tokenizer and tokenizer.eos_id not in seen:
            raise DataError(
                f"data.eos_token={eos_token!r} is id {tokenizer.eos_id}, but documents of {[*seen.values()][0]} end "
                f"with {_name([*seen][0])}; leave it out, or preprocess the text again with --eos-token"
            )
        common |= dict.fromkeys([kind] if seen else [], next(iter(seen), None))
    return common


def _name(mark: int | None) -> str:
    return "no token of their own" if mark is None else f"id {mark}"
