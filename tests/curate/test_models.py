"""The language model against the definition, the classifier on planted pages; both stay the same when made again."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megallama.config.errors import DataError
from megallama.curate import models
from megallama.curate.models import Perplexity, Reference, Table, estimate, hashes
from megallama.curate.recipe import train
from megallama.curate.run import curate
from megallama.curate.stage import Document
from tests.curate.recipes import read_rows, recipe, write_rows

VOCABULARY, BEGIN, END = 12, 0, 1


def lines(number: int) -> list[list[int]]:
    draw = random.Random(3)
    return [[BEGIN, *(draw.choice([2, 3, 3, 4, 5, 5, 5, 6, 9]) for _ in range(draw.randrange(1, 9))), END]
            for _ in range(number)]  # fmt: skip


def flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([np.array(row) for row in rows]), np.concatenate([np.arange(len(row)) for row in rows])


def definition(rows: list[list[int]], order: int, pruned: int) -> Any:
    """p(piece | pieces before), by loops and dicts: interpolated Kneser-Ney with one discount for each order."""
    grams = [Counter[tuple[int, ...]]() for _ in range(order + 1)]
    for row in rows:
        for n in range(1, order + 1):
            grams[n].update(tuple(row[i - n + 1 : i + 1]) for i in range(max(n - 1, 1), len(row)))
    counts = [Counter[tuple[int, ...]]() for _ in range(order)] + [grams[order]]
    for n in range(1, order):
        kinds = Counter(gram[1:] for gram in grams[n + 1])
        counts[n] = Counter({gram: count if gram[0] == BEGIN else kinds[gram] for gram, count in grams[n].items()})
    total = [defaultdict[tuple[int, ...], int](int) for _ in range(order + 1)]
    discount = [0.0]
    for n in range(1, order + 1):
        for gram, count in counts[n].items():
            total[n][gram[:-1]] += count
        once, twice = (sum(count == times for count in counts[n].values()) for times in (1, 2))
        discount.append(min(max(once / max(once + 2 * twice, 1), 0.1), 0.9))

    def kept(gram: tuple[int, ...]) -> bool:
        return counts[len(gram)][gram] > (1 if len(gram) >= pruned else 0)

    def p(gram: tuple[int, ...]) -> float:
        n = len(gram)
        if n == 0:
            return 1 / VOCABULARY
        if not total[n][gram[:-1]]:
            return p(gram[1:])
        share = {w: counts[n][(*gram[:-1], w)] - discount[n] for w in range(VOCABULARY) if kept((*gram[:-1], w))}
        left = 1 - sum(share.values()) / total[n][gram[:-1]]
        return max(share.get(gram[-1], 0), 0) / total[n][gram[:-1]] + left * p(gram[1:])

    return p


@pytest.mark.parametrize("order, pruned", [(1, 9), (2, 9), (3, 9), (4, 3), (5, 3)])
def test_the_language_model_is_kneser_ney(order: int, pruned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "PRUNED", pruned)
    rows, other = lines(60), [[BEGIN, 5, 3, 11, 5, 5, 2, END], [BEGIN, 9, 9, 9, END], [BEGIN, END]]
    table = estimate(*flat(rows), order, VOCABULARY)
    ids, place = flat(rows[:9] + other)
    found = table.score(hashes(ids, order), place)
    p, at = definition(rows, order, pruned), 0
    for row in rows[:9] + other:
        for i in range(1, len(row)):
            assert found[at + i] == pytest.approx(math.log(p(tuple(row[max(0, i - order + 1) : i + 1]))), abs=2e-5)
        at += len(row)


def test_the_probabilities_of_all_pieces_are_one() -> None:
    table = estimate(*flat(lines(60)), 5, VOCABULARY)
    for before in ([BEGIN], [BEGIN, 5], [BEGIN, 5, 3, 3], [BEGIN, 2, 9, 5, 5, 6], [BEGIN, 11, 7]):
        ids, place = flat([[*before, piece] for piece in range(VOCABULARY)])
        scores = table.score(hashes(ids, 5), place)[len(before) :: len(before) + 1]
        assert np.exp(scores).sum() == pytest.approx(1, abs=1e-5)


def test_a_table_finds_what_it_has() -> None:
    draw = np.random.default_rng(1)
    keys = np.unique(np.append(draw.integers(0, 2**63, 5000, dtype=np.uint64) * np.uint64(2), np.uint64(0)))
    table = Table(keys, np.zeros(len(keys), np.float32), np.zeros(len(keys), np.float32))
    assert (table.find(keys) == np.arange(len(keys))).all()
    assert (table.find(keys + np.uint64(1)) == -1).all()


SUBJECTS = ("The river", "A farmer", "The old road", "My sister", "The council", "Every winter the lake")
VERBS = ("runs past", "belongs to", "was built by", "came back from", "looks over", "is older than")
OBJECTS = ("the village.", "a quiet valley.", "the northern hills.", "that small harbour.", "the market town.")


def prose(draw: random.Random, sentences: int = 12) -> str:
    return "\n".join(" ".join(map(draw.choice, (SUBJECTS, VERBS, OBJECTS))) for _ in range(sentences))


def spam(draw: random.Random) -> str:
    words = ("CHEAP", "pills", "$$$", "click", "winner", "xx9", "free!!!", "bonus", "casino", "viagra", "qwe")
    return "\n".join(" ".join(draw.choices(words, k=8)) for _ in range(10))


def trained(folder: Path, kind: str, **more: Any) -> tuple[Any, list[str]]:
    """Planted texts, a model of them, and what was said of it."""
    draw, said = random.Random(5), list[str]()
    write_rows(folder / "good" / "a.jsonl", [prose(draw) for _ in range(80)])
    write_rows(folder / "bad" / "a.jsonl", [spam(draw) for _ in range(40)])
    good, bad, model = str(folder / "good"), str(folder / "bad"), str(folder / "models" / f"{kind}.npy")
    named = {"reference": (good,)} if kind == "perplexity" else {"positive": (good,), "negative": (bad,)}
    made = recipe(folder / "in", [{"kind": kind, "model": model, **named, **more}])
    train(made, said.append)
    return made, said


def test_likely_texts_stay_and_unlikely_go(tmp_path: Path) -> None:
    draw = random.Random(9)
    write_rows(tmp_path / "in" / "a.jsonl", [*(prose(draw) for _ in range(20)), *(spam(draw) for _ in range(20))])
    made, said = trained(tmp_path, "perplexity", vocabulary=300, head=50, middle=100)
    assert "median of 8 held-out texts" in said[-1]
    curate(made, tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    assert {row["id"] for row in rows} <= {f"a-{n}" for n in range(20)} and len(rows) >= 15
    assert {row["scores"]["part"] for row in rows} == {"head", "middle"}
    reasons = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]["web 00 perplexity"]["reasons"]
    assert reasons["perplexity tail"]["documents"] == 40 - len(rows)
    model = {p.name: p.read_bytes() for p in (tmp_path / "models" / "perplexity.npy").iterdir()}
    train(made, said.append)
    assert {p.name: p.read_bytes() for p in (tmp_path / "models" / "perplexity.npy").iterdir()} == model
    with pytest.raises(DataError, match="another recipe or of other files"):  # the model has another date
        curate(made, tmp_path / "out")


def test_the_classifier_tells_reference_pages(tmp_path: Path) -> None:
    made, said = trained(tmp_path, "reference", bits=12)
    assert said == ["reference: 12 of 12 held-out pages judged rightly, 108 trained on"]
    apply, draw = made.sources[0].stages[0].start(), random.Random(11)
    pages = [Document(prose(draw) if n % 2 else spam(draw), str(n), "web") for n in range(40)]
    assert [apply(page) for page in pages] == ["unlike reference pages", ""] * 20
    weights = Path(made.sources[0].stages[0].model).read_bytes()
    train(made, said.append)
    assert Path(made.sources[0].stages[0].model).read_bytes() == weights
    file = Path(made.sources[0].stages[0].model)
    for other in (np.load(file)[:-1], np.zeros((2, 2)), np.zeros(0)):  # of words that were hashed in another way
        np.save(file, other)
        with pytest.raises(DataError, match="hashed in another way; make it with --train from reference"):
            made.sources[0].stages[0].start()


@pytest.mark.parametrize("kind", ["perplexity", "reference"])
def test_a_model_that_is_missing_is_told(kind: str, tmp_path: Path) -> None:
    stage: Any = {"perplexity": Perplexity, "reference": Reference}[kind](kind=kind, model=str(tmp_path / "no"))
    with pytest.raises(DataError, match=rf"{kind}.model: .*no.*make it with --train from {kind}\."):
        stage.start()
    with pytest.raises(DataError, match="is empty; name files, folders or patterns"):
        stage.train(lambda text: None)
    with pytest.raises(DataError, match=rf"^{kind}.model is not set; name where its model goes"):
        train(recipe(tmp_path / "in", [{"kind": kind}]), lambda text: None)
