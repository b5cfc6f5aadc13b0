"""Near-duplicates made of real text by editing words: which are found, and whether each that is removed is one."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from megallama.curate.duplicates import NearDuplicates
from megallama.curate.hashing import normalise
from megallama.curate.run import curate
from tests.curate.recipes import read_rows, recipe, write_rows

N = 5


def pieces(words: int = 150) -> list[str]:
    """Parts of Python's language reference, which do not overlap."""
    text = " ".join(topics[name] for name in sorted(topics)).split()
    return [" ".join(text[at : at + words]) for at in range(0, len(text) - words, words)]


def edited(text: str, edits: int, draw: random.Random) -> str:
    words = text.split()
    for _ in range(edits):
        at = draw.randrange(len(words))
        words[at : at + draw.choice((0, 1, 1, 2))] = draw.sample(words, draw.choice((0, 1, 1, 2)))
    return " ".join(words)


def ngrams(text: str) -> set[tuple[str, ...]]:
    words = normalise(text).decode().split()
    return {tuple(words[i : i + N]) for i in range(max(len(words) - N + 1, 1))}


def jaccard(one: str, other: str) -> float:
    a, b = ngrams(one), ngrams(other)
    return len(a & b) / len(a | b)


def test_recall_and_precision(tmp_path: Path) -> None:
    draw = random.Random(4)
    originals = [*dict.fromkeys(pieces())][:400]
    variants = [edited(text, draw.choice((0, 1, 1, 2, 2, 3, 4, 6)), draw) for text in originals]
    write_rows(tmp_path / "in" / "a.jsonl", originals)
    write_rows(tmp_path / "in" / "b.jsonl", variants)
    texts = {f"{file}-{n}": text for file, rows in (("a", originals), ("b", variants)) for n, text in enumerate(rows)}
    curate(recipe(tmp_path / "in", [{"kind": "near_duplicates"}], unit_mb=0.05), tmp_path / "out")
    removed = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    for pair in removed:
        exact = jaccard(texts[pair["dropped"]], texts[pair["kept"]])
        assert exact >= 0.8 and pair["similarity"] == pytest.approx(exact, abs=5e-5)
    gone, kept = {pair["dropped"] for pair in removed}, {row["id"] for row in read_rows(tmp_path / "out")}
    assert gone | kept == set(texts) and not gone & kept
    true = {f"b-{n}": jaccard(a, b) for n, (a, b) in enumerate(zip(originals, variants, strict=True))}
    near = [name for name, exact in true.items() if exact >= 0.9]
    assert len(near) > 100 and sum(name in gone for name in near) >= 0.99 * len(near)
    assert sum(0.6 < exact < 0.8 for exact in true.values()) > 20  # some that are not, to be taken for them
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sum(row["kept"] for row in report["histograms"]["near-duplicates: copies of a text"].values()) > 50


def test_the_estimate_is_that_of_minhash() -> None:
    """Of two texts, the share of equal hashes is their similarity, to its standard error."""
    stage = NearDuplicates(kind="near_duplicates", bands=256, rows=4)
    draw, text = random.Random(8), pieces(2000)[0]
    for edits in (20, 100, 300):
        other = edited(text, edits, draw)
        true = jaccard(text, other)
        one, two = (stage.signature(t) for t in (text, other))
        error = (true * (1 - true) / 1024) ** 0.5
        assert abs((one == two).mean() - true) < 4 * error, (true, (one == two).mean())


def test_a_book_within_another_is_an_overlap(tmp_path: Path) -> None:
    parts = pieces(3000)
    book, other = " ".join(parts[:2]), parts[5]
    write_rows(tmp_path / "in" / "a.jsonl", [book, other, edited(parts[0], 20, random.Random(1)), other.upper()])
    stage = {"kind": "near_duplicates", "measure": "overlap", "threshold": 0.9, "bands": 64, "rows": 2}
    curate(recipe(tmp_path / "in", [stage], unit_mb=9), tmp_path / "out")
    assert [row["id"] for row in read_rows(tmp_path / "out")] == ["a-0", "a-1"]
    curate(recipe(tmp_path / "in", [{"kind": "near_duplicates"}], unit_mb=9), tmp_path / "jaccard")
    assert [row["id"] for row in read_rows(tmp_path / "jaccard")] == ["a-0", "a-1", "a-2"]


def test_texts_without_words_are_no_duplicates(tmp_path: Path) -> None:
    write_rows(tmp_path / "in" / "a.jsonl", ["...", "!!!", "one two", "One, two", "one two three"])
    curate(recipe(tmp_path / "in", [{"kind": "near_duplicates"}]), tmp_path / "out")
    assert [row["text"] for row in read_rows(tmp_path / "out")] == ["...", "!!!", "one two", "one two three"]


def test_many_copies_and_across_sources(tmp_path: Path) -> None:
    """A text of hundreds of copies is read once; the source that comes first keeps it."""
    text = re.sub(r"\s+", " ", pieces()[7])
    write_rows(tmp_path / "a" / "a.jsonl", ["something else entirely", text])
    write_rows(tmp_path / "b" / "b.jsonl", [f"{text} {n}" for n in range(300)])
    sources = tuple({"name": n, "inputs": (str(tmp_path / n),), "keys": ("id",)} for n in "ab")
    made = recipe(tmp_path / "a", []).model_validate({"sources": sources, "stages": ({"kind": "near_duplicates"},)})
    curate(made, tmp_path / "out")
    assert [row["id"] for row in read_rows(tmp_path / "out", "a")] == ["a-0", "a-1"]
    assert read_rows(tmp_path / "out", "b") == []
    removed = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    assert {pair["kept"] for pair in removed} == {"a-1"} and len(removed) == 300
    assert np.mean([pair["similarity"] for pair in removed]) > 0.98
