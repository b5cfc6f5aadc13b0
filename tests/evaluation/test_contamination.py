"""Which items stood in the data: planted ones and no others, on one rank and on several."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megallama.cli import command
from megallama.config.errors import ConfigError, DataError
from megallama.evaluation.evaluate import evaluate, trained_on
from megallama.evaluation.harness import Request
from tests.evaluation.test_evaluate import named_byte_tokenizer
from tests.inference.test_generate import reference
from tests.pool import Pool

NAMES = [f"w{i}" for i in range(300)]


def words(draw: random.Random, count: int) -> list[str]:
    return draw.choices(NAMES, k=count)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, 100 documents, and items: of 20 words, of 9, of 3; every other one is planted, the longest by half."""
    path, draw = tmp_path_factory.mktemp("contamination"), random.Random(2)
    reference(path, vocab_size=258, bos_token_id=256, eos_token_id=257, max_position_embeddings=256)
    named_byte_tokenizer(path)
    documents, items = [" ".join(words(draw, 60)) for _ in range(100)], []
    for i, size in enumerate([20] * 6 + [9] * 4 + [3] * 2):
        own = words(draw, size)
        items.append({"context": " ".join(own[:-2]), "choices": [f" {' '.join(own[-2:])}", " no"], "gold": 0})
        if i % 2:
            planted = own[3:18] if size == 20 else own  # 15 words: 3 of the 8 n-grams
            documents[90 - 7 * i] += f".  {', '.join(planted).upper()}!"
            documents[95] += f" {' '.join(planted)}"
    (path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (path / "one.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:50]))
    (path / "two.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[50:]))
    return path


def checked(folder: Path, *data: str, shown: list[str] | None = None) -> dict[str, Any]:
    files = tuple(folder / name for name in data)
    asked = Request(folder, ("precision.dtype=fp64",), items=(folder / "items.jsonl",), check_contamination=files)
    return evaluate(asked, (shown if shown is not None else []).append, lambda text: None)


def test_planted_items_are_found_and_scored_apart(folder: Path) -> None:
    shown: list[str] = []
    results = checked(folder, "one.jsonl", "two.jsonl", shown=shown)
    found, items = results["contamination"], results["items"]["items"]
    np.testing.assert_allclose(found["shares"]["items"], [0, 3 / 8, 0, 3 / 8, 0, 3 / 8, 0, 1, 0, 1, np.nan, np.nan])
    assert found["documents"] == 100
    examples = found["examples"]["items"]
    assert {i: where[1:] for i, where in examples.items()} == {
        i: [90 - 7 * i, "two.jsonl" if 90 - 7 * i >= 50 else "one.jsonl"] for i in (1, 3, 5, 7, 9)
    }
    first = json.loads((folder / "items.jsonl").read_text().splitlines()[1])
    assert examples[1][0] == " ".join((first["context"] + first["choices"][0]).split()[3:16])
    for kind, chosen in (("clean", [0, 2, 4, 6, 8]), ("dirty", [1, 3, 5, 7, 9]), ("too short", [10, 11])):
        name = f"items: {len(chosen)} of 12 {kind}"
        for metric, values in items.items():
            own = np.array(values)[chosen]
            assert found["results"][name][f"{metric},none"] == pytest.approx(own.mean())
            assert found["results"][name][f"{metric}_stderr,none"] == pytest.approx(own.std(ddof=1) / len(own) ** 0.5)
        assert f"{name} " in shown[1]


def test_a_corpus_says_the_same_as_its_text(folder: Path) -> None:
    text = checked(folder, "one.jsonl")["contamination"]
    words = [str(folder / "one.jsonl"), "--tokenizer", str(folder), "--output", str(folder / "corpus")]
    assert command("prepare")(words) == 0
    corpus = checked(folder, "corpus")["contamination"]
    np.testing.assert_equal(corpus["shares"], text["shares"])
    assert corpus["documents"] == text["documents"] == 50
    assert [v[:2] for v in corpus["examples"]["items"].values()] == [v[:2] for v in text["examples"]["items"].values()]
    assert len(text["examples"]["items"]) == 2  # of 9 and 7: where the others were planted is not read


def test_ranks_share_the_documents(pool: Pool, folder: Path) -> None:
    alone, *several = [
        pool.run(ranks, "tests.evaluation.workers:contaminated", folder, ["one.jsonl", "two.jsonl"]) for ranks in (1, 3)
    ]
    assert len(several[0]) == 3
    for found in several[0]:
        np.testing.assert_equal(found, alone[0])
    assert alone[0]["documents"] == 100 and len(alone[0]["examples"]["items"]) == 5


def test_the_data_of_the_run_are_the_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="was trained on: it does not say so; name it: --check-contamination FILE"):
        checked(folder)
    (folder / "there.idx").touch()
    named = {"data": {"train": [{"path": str(folder / "there")}, {"path": "/nowhere/b"}]}}
    monkeypatch.setattr("megallama.evaluation.evaluate.step_folder", lambda path: path)
    monkeypatch.setattr("megallama.evaluation.evaluate.read_manifest", lambda step: SimpleNamespace(config=named))
    with pytest.raises(DataError, match="was trained on: /nowhere/b is not here; name it"):
        trained_on(folder)
    named["data"]["train"].pop()
    assert trained_on(folder) == (folder / "there",)


def test_it_needs_items(folder: Path) -> None:
    with pytest.raises(ConfigError, match="looks for the questions of items; give --items or --tasks"):
        Request(folder, data=(folder / "one.jsonl",), check_contamination=()).check()
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        checked(folder, "none.jsonl")
