"""How documents begin and end: what is asked for, recorded, seen, and held against one another."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megallama.cli import command
from megallama.config.errors import DataError
from megallama.config.schema import Config, DataConfig, SourceConfig
from megallama.data.indexed import IndexedDataset
from megallama.data.look import document
from megallama.data.sources import open_sources
from megallama.data.tokenizer import load_tokenizer, sha256_of
from megallama.data.writer import IndexedWriter, dtype_for
from megallama.text.preprocess import _origin, merge, preprocess
from megallama.text.shards import WorkFolder
from tests.words import text_of


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [document(dataset, i).tolist() for i in range(dataset.num_documents)]


def marks(tokenizer: Path | None, *prefixes: Path, eos_token: str | None = None) -> dict[str, int | None]:
    train, *valid = (SourceConfig(path=str(prefix)) for prefix in prefixes)
    options = None if tokenizer is None else str(tokenizer)
    data = DataConfig(train=(train,), valid=tuple(valid), tokenizer=options, eos_token=eos_token)
    return open_sources(Config.model_validate({"data": data, "batch": {"seq_length": 8}})).special_ids


@pytest.mark.parametrize("workers", [1, 2])
def test_bos_begins_every_document_where_it_is_asked_for(
    jsonl: Path, tokenizer_path: Path, tmp_path: Path, workers: int
) -> None:
    summary = preprocess([jsonl], tmp_path / "a", tokenizer_path, bos=True, workers=workers)
    encode = load_tokenizer(tokenizer_path).encode
    assert documents(tmp_path / "a") == [[1, *encode(text_of(i)), 2] for i in range(300)]
    assert json.loads((tmp_path / "a.json").read_text())["bos_id"] == 1
    assert summary.marks == "every document begins with id 1 and ends with id 2"
    assert marks(tokenizer_path, tmp_path / "a") == {"bos_id": 1, "eos_id": 2}
    assert marks(None, tmp_path / "a") == {"bos_id": 1, "eos_id": 2}


def test_without_it_nothing_is_recorded_that_was_not(jsonl: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    assert preprocess([jsonl], tmp_path / "a", tokenizer_path).marks == "every document ends with id 2"
    assert "bos_id" not in json.loads((tmp_path / "a.json").read_text())
    assert marks(tokenizer_path, tmp_path / "a") == {"bos_id": None, "eos_id": 2}


def test_empty_documents_have_both_marks(tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n')
    preprocess([tmp_path / "t.jsonl"], tmp_path / "a", tokenizer_path, bos=True)
    found = documents(tmp_path / "a")
    assert all(ids[0] == 1 and ids[-1] == 2 and not {1, 2} & {*ids[1:-1]} for ids in found) and len(found) >= 2


def test_another_end_by_name(jsonl: Path, json_path: Path, tmp_path: Path, capsys) -> None:
    arguments = [str(jsonl), "--tokenizer", str(json_path), "--quiet", "--workers", "1"]
    assert command("prepare")([*arguments, "--output", str(tmp_path / "a"), "--eos-token", "<|begin_of_text|>"]) == 0
    assert "every document ends with id 0;" in capsys.readouterr().out
    assert {ids[-1] for ids in documents(tmp_path / "a")} == {0}
    assert marks(json_path, tmp_path / "a") == {"bos_id": None, "eos_id": 0}  # what is recorded wins
    assert marks(json_path, tmp_path / "a", eos_token="<|begin_of_text|>")["eos_id"] == 0
    with pytest.raises(
        DataError, match=r"data.eos_token='<\|end_of_text\|>' is id 1, but documents of .*a end with id 0"
    ):
        marks(json_path, tmp_path / "a", eos_token="<|end_of_text|>")
    assert command("prepare")([*arguments, "--output", str(tmp_path / "b"), "--eos-token", "<none>"]) == 2
    assert "has no token '<none>'; name one that it has, or leave it out" in capsys.readouterr().err
    assert command("prepare")([*arguments, "--output", str(tmp_path / "b"), "--eos-token", "a\udcff"]) == 2
    assert "has no token 'a\\udcff'; name one that it has, or leave it out" in capsys.readouterr().err


def test_bos_of_a_tokenizer_that_has_none(jsonl: Path, json_path: Path, tmp_path: Path) -> None:
    held = json_path.read_text().replace("<|begin_of_text|>", "<|other|>")
    (tmp_path / "t.json").write_text(held)
    with pytest.raises(DataError, match="t.json has no beginning-of-document token; leave --bos out"):
        preprocess([jsonl], tmp_path / "a", tmp_path / "t.json", bos=True)


def test_sources_that_differ_are_refused(jsonl: Path, json_path: Path, tmp_path: Path) -> None:
    preprocess([jsonl], tmp_path / "a", json_path)
    preprocess([jsonl], tmp_path / "b", json_path, eos_token="<|begin_of_text|>")
    preprocess([jsonl], tmp_path / "c", json_path, bos=True)
    with pytest.raises(
        DataError, match=r"documents end differently: those of .*a with id 1 and those of .*b with id 0"
    ):
        marks(json_path, tmp_path / "a", tmp_path / "b")
    with pytest.raises(
        DataError, match="documents begin differently: .*a with no token of their own and .*c with id 0"
    ):
        marks(None, tmp_path / "a", tmp_path / "c")
    with pytest.raises(DataError, match=r"made with different tokenizers \(bos_id: 0 and None\)"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "d")


@pytest.mark.parametrize(
    "begin, end, want", [(1, 2, (1, 2)), (None, 2, (None, 2)), (None, None, (None, 2)), (1, 1, (1, 1))]
)
def test_where_nothing_is_recorded_the_tokens_are_looked_at(
    tokenizer_path: Path, tmp_path: Path, begin: int | None, end: int | None, want: tuple[int | None, int]
) -> None:
    with IndexedWriter(tmp_path / "a", dtype_for(330)) as writer:
        for i in range(40):
            ids = [*([] if begin is None else [begin]), *range(260 + i % 7, 290), *([] if end is None else [end])]
            writer.add(np.array(ids))
    assert tuple(marks(tokenizer_path, tmp_path / "a").values())[::-1] == want


def test_earlier_work_goes_on_and_never_mixes_with_other_marks(jsonl: Path, json_path: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(json_path)
    plain = _origin([jsonl], tokenizer, "text", 9, bos=False)
    assert plain.keys() == {"layout", "files", "tokenizer", "key", "limit"}  # as versions before had it
    assert plain["tokenizer"] == sha256_of(json_path)
    named = load_tokenizer(json_path, eos_token="<|end_of_text|>")  # the one that it is anyway
    assert _origin([jsonl], named, "text", 9, bos=False) == plain
    other = load_tokenizer(json_path, eos_token="<|begin_of_text|>")
    origins = [plain, _origin([jsonl], tokenizer, "text", 9, bos=True), _origin([jsonl], other, "text", 9, bos=False)]
    paths = []
    for origin in origins:
        with WorkFolder(str(tmp_path / "x"), origin) as work:
            paths.append(work.path)
    assert len({*paths}) == 3
