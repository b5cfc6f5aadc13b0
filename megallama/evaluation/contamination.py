"""How much of each task stood in the data that a model was trained on: n-grams of words that are in both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, islice
from pathlib import Path

import numpy as np

from megallama.checkpoint.folder import step_folder
from megallama.checkpoint.manifest import read_manifest
from megallama.comm.group import Group
from megallama.config.errors import DataError
from megallama.data.tokenizer import Tokenizer
from megallama.evaluation.results import Results, take
from megallama.evaluation.texts import Text
from megallama.text.ngrams import Ngrams

Asked = Mapping[str, Sequence[list[str]]]  # by task, the passages of each item


def trained_on(folder: Path) -> tuple[Path, ...]:
    """The corpora of the run that saved the model. Raises: DataError where they are not known, or not there."""
    step = step_folder(folder)
    paths = tuple(Path(source["path"]) for source in (read_manifest(step).config["data"]["train"] if step else ()))
    if not paths or (lost := [path for path in paths if not Path(f"{path}.idx").is_file()]):
        why = f"{lost[0]} is not here" if paths else "it does not say so"
        raise DataError(f"what {folder} was trained on: {why}; name it: --check-contamination FILE ...")
    return paths


def check(results: Results, asked: Asked, documents: Iterable[Text], tokenizer: Tokenizer, group: Group) -> Results:
    """Of every item the n-grams that are there; results of clean items, and of dirty ones, which have any of them."""
    of = [(task, i) for task, items in asked.items() for i, item in enumerate(items) for _ in item]  # of a passage
    index = Ngrams([passage for items in asked.values() for item in items for passage in item])
    places, number = dict[int, list[object]](), count()  # of an n-gram, number and source of its first document
    own = islice(zip(number, documents, strict=False), group.rank, None, group.size)
    while batch := list(islice(own, 32)):  # documents
        texts = [text if isinstance(text, str) else tokenizer.decode(text) for _, (_, text, _) in batch]
        for place, gram in index.find(texts).T.tolist():
            places.setdefault(gram, [batch[place][0], batch[place][1][0]])
    for gram, where in (pair for part in group.gather_values([*places.items()]) for pair in part):
        places[gram] = min(where, places.get(gram, where))
    seen = np.isin(np.arange(index.size), [*places])
    shares = {task: np.full(len(items), np.nan) for task, items in asked.items()}
    for (task, i), share in zip(of, index.shares(seen), strict=True):
        shares[task][i] = np.fmax(shares[task][i], share)  # of the passage of which most is there
    out: Results = defaultdict(dict, documents=next(number) - 1)
    for passage, gram, words in index.examples(seen):
        out["examples"].setdefault(of[passage][0], {})[of[passage][1]] = [words, *places[gram]]
    for task, part in shares.items():
        out["shares"][task] = part.tolist()
        for kind, chosen in (("clean", part == 0), ("dirty", part > 0), ("too short", np.isnan(part))):
            values = {name: np.array(own)[chosen] for name, own in results["items"][task].items()}
            if chosen.any():
                take(out, f"{task}: {chosen.sum()} of {len(part)} {kind}", values, results["n-shot"][task], 0.0)
    return out
