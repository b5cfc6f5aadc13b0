"""Joined pairs equal what preprocessing everything at once writes; what does not belong together is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megallama.config.errors import DataError
from megallama.data.indexed import IndexedDataset
from megallama.data.writer import IndexedWriter
from megallama.text import preprocess as module
from megallama.text.preprocess import merge, preprocess
from megallama.text.train_tokenizer import train_tokenizer
from tests.text.test_preprocess import content
from tests.words import text_of


@pytest.fixture
def pairs(tokenizer_path: Path, tmp_path: Path) -> list[Path]:
    """Three pairs, and `all` made of the text of all three."""
    files = []
    for name, numbers in (("a", range(50)), ("b", range(50, 51)), ("c", range(51, 200))):
        files.append(tmp_path / f"{name}.jsonl")
        lines = [json.dumps({"text": text_of(i)}) if i % 60 else "bad" for i in numbers]
        files[-1].write_text("\n".join(lines) + "\n")
        preprocess([files[-1]], tmp_path / name, tokenizer_path, max_bad="10%")
    preprocess(files, tmp_path / "all", tokenizer_path, max_bad="10%")
    return [tmp_path / name for name in "abc"]


@pytest.mark.parametrize("rows, span", [(1 << 16, 1 << 20), (7, 30), (1, 1)])
def test_merged_is_preprocessed_at_once(
    pairs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, span: int
) -> None:
    monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(module, "SPAN", span)
    seen: list[tuple[int, int]] = []
    merged = merge(pairs, tmp_path / "m", lambda *x: seen.append(x))
    assert merged.num_documents == 196 and seen[-1] == (merged.num_tokens * 2,) * 2
    assert content(tmp_path / "m") == content(tmp_path / "all")
    assert json.loads((tmp_path / "m.json").read_text())["skipped"] == {"not JSON": 4}


def test_pairs_of_other_tools_are_merged_without_facts(tmp_path: Path) -> None:
    for name, ids in (("a", [5, 2]), ("b", [7, 8, 2])):
        with IndexedWriter(tmp_path / name, np.dtype("<i4")) as writer:
            writer.add(np.array(ids))
    merged = merge([tmp_path / "a.bin", tmp_path / "b.idx"], tmp_path / "m")
    assert merged.read(0, 5).tolist() == [5, 2, 7, 8, 2] and merged.starts(0, 2).tolist() == [0, 2, 5]
    assert not (tmp_path / "m.json").exists()


def test_what_does_not_belong_together_is_refused(
    pairs: list[Path], jsonl: Path, tmp_path: Path
) -> None:
    for name, dtype in (("wide", "<i4"), ("plain", "<u2")):
        with IndexedWriter(tmp_path / name, np.dtype(dtype)) as writer:
            writer.add(np.array([5, 2]))
    other = train_tokenizer([jsonl], tmp_path / "other.model", 310)
    preprocess([jsonl], tmp_path / "other", other)
    for inputs, output, text in (
        (["a", "wide"], "m", "wide holds int32 tokens and .*a uint16: they were made with vocabularies of different"),
        (["a", "plain"], "m", r"plain\.json is missing, so nothing says .* move .*a\.json away if you know"),
        (["plain", "a"], "m", r"plain\.json is missing, so nothing says .* move .*a\.json away if you know"),
        (["a", "other"], "m", "other and .*a were made with different tokenizers .tokenizer_sha256: [0-9a-f]{64} and"),
        (["a", "gone"], "m", "gone.idx does not exist"),
        (["a", "b"], "b", "b is one of the inputs; write to another --output"),
    ):  # fmt: skip
        before = {p.name for p in tmp_path.iterdir()}
        with pytest.raises(DataError, match=text):
            merge([tmp_path / name for name in inputs], tmp_path / output)
        assert {p.name for p in tmp_path.iterdir()} == before
    assert IndexedDataset(tmp_path / "b").num_documents == 1
