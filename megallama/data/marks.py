"""How the documents of corpora begin and end: as PREFIX.json records it, else as the tokens themselves show."""

from __future__ import annotations

from collections.abc import Sequence

from megallama.data.errors import DataError
from megallama.data.indexed import IndexedDataset
from megallama.data.metadata import read_metadata
from megallama.data.tokenizer import Tokenizer

LOOK = 16  # documents looked at where nothing is recorded
Marks = dict[str, int | None]  # "bos_id", "eos_id": what begins and ends documents; None: nothing does


def marks_of(dataset: IndexedDataset, tokenizer: Tokenizer | None) -> Marks:
    """The marks of a corpus, as far as they are known.

    Where nothing is recorded, a control token that begins (ends) all of the first documents is their mark.
    """
    metadata = read_metadata(dataset.prefix)
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


def agreed_marks(datasets: Sequence[IndexedDataset], tokenizer: Tokenizer | None, eos_token: str | None) -> Marks:
    """The marks that all corpora have; an end that nobody knows is the tokenizer's.

    Raises: DataError if corpora differ, or do not end with `eos_token`, where it is given.
    """
    agreed: Marks = {"eos_id": tokenizer.eos_id if tokenizer else None}
    for kind, verb in (("eos_id", "end"), ("bos_id", "begin")):
        seen: dict[int | None, str] = {}  # id -> the first corpus with it
        for dataset in datasets:
            if kind in (marks := marks_of(dataset, tokenizer)):
                seen.setdefault(marks[kind], dataset.prefix)
        if len(seen) > 1:
            values = " and ".join(f"those of {prefix} with {_name(mark)}" for mark, prefix in seen.items())
            raise DataError(
                f"documents {verb} differently: {values}; preprocess the text again with the same --eos-token and --bos"
            )
        if seen and kind == "eos_id" and eos_token and tokenizer and tokenizer.eos_id not in seen:
            raise DataError(
                f"data.eos_token={eos_token!r} is id {tokenizer.eos_id}, but documents of {[*seen.values()][0]} end "
                f"with {_name([*seen][0])}; leave it out, or preprocess the text again with --eos-token"
            )
        agreed |= dict.fromkeys([kind] if seen else [], next(iter(seen), None))
    return agreed


def _name(mark: int | None) -> str:
    return "no token of their own" if mark is None else f"id {mark}"
