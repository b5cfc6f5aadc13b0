"""Text to tokens: exact content, the same bytes for any number of workers, every malformed record reported."""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from megallama.data import preprocess as module
from megallama.data.errors import DataError
from megallama.data.indexed import IndexedDataset
from megallama.data.preprocess import in_validation, preprocess
from megallama.data.tokenizer import load_tokenizer, sha256_of
from tests.data.conftest import text_of


def documents(prefix: Path) -> list[list[int]]:
    data = IndexedDataset(prefix)
    return [data.document(i).tolist() for i in range(data.num_documents)]


def content(prefix: Path, *suffixes: str) -> dict[str, bytes]:
    return {s: Path(f"{prefix}{s}").read_bytes() for s in suffixes or (".bin", ".idx", ".json")}


def test_documents_are_encoded_and_ended(jsonl: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    summary = preprocess([jsonl], tmp_path / "a", tokenizer_path, progress=lambda *x: seen.append(x))
    tokenizer = load_tokenizer(tokenizer_path)
    expected = [[*tokenizer.encode(text_of(i)), 2] for i in range(300)]
    assert documents(tmp_path / "a") == expected
    size, tokens = sum(len(text_of(i).encode()) for i in range(300)), sum(map(len, expected))
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "documents": 300,
        "tokens": tokens,
        "bytes": size,
        "tokenizer": "tokenizer.model",
        "tokenizer_sha256": sha256_of(tokenizer_path),
        "vocab_size": 330,
        "eos_id": 2,
        "skipped": {},
    }
    (out,) = summary.outputs
    assert (out.documents, out.tokens, out.text_bytes) == (300, tokens, size)
    assert seen[-1] == (jsonl.stat().st_size, jsonl.stat().st_size, tokens)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


@pytest.mark.parametrize("split", [0.0, 0.1])
def test_the_bytes_do_not_depend_on_workers_or_blocks(
    jsonl: Path, tokenizer_path: Path, tmp_path: Path, split: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(jsonl.read_bytes() + b"not json\n" + jsonl.read_bytes())
    parts = ["_train", "_valid"] if split else [""]
    summaries = []
    for name, workers, block in (("one", 1, 1 << 20), ("two", 2, 5000), ("three", 3, 700)):
        monkeypatch.setattr(module, "BLOCK_BYTES", block)
        summaries.append(preprocess([corpus], tmp_path / name, tokenizer_path, workers=workers, split_valid=split))
    for part in parts:
        one = content(tmp_path / f"one{part}")
        assert one == content(tmp_path / f"two{part}") == content(tmp_path / f"three{part}")
    assert all(s.skipped == {"not JSON": 1} and s.examples == summaries[0].examples for s in summaries)


def test_the_split_deals_out_every_document_once(jsonl: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    preprocess([jsonl], tmp_path / "all", tokenizer_path)
    preprocess([jsonl], tmp_path / "s", tokenizer_path, split_valid=0.05)
    valid = in_validation(np.arange(300), 0.05)
    everything = documents(tmp_path / "all")
    assert documents(tmp_path / "s_valid") == [d for d, v in zip(everything, valid, strict=True) if v]
    assert documents(tmp_path / "s_train") == [d for d, v in zip(everything, valid, strict=True) if not v]


@pytest.mark.parametrize("share", [0.5, 0.3, 0.05, 0.01, 1 / 3, 0.999])
def test_the_share_of_the_split_is_exact(share: float) -> None:
    n = 60000
    chosen = in_validation(np.arange(n), share)
    assert abs(int(chosen.sum()) - n * share) <= 2
    if share <= 0.3:  # which document of a group is chosen varies
        assert len(set((np.flatnonzero(chosen) % round(1 / share)).tolist())) == round(1 / share)
    assert np.array_equal(chosen[777:], in_validation(np.arange(777, n), share))


def test_text_files_folders_patterns_and_gzip(tokenizer_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")  # a byte-order mark is no text
    (folder / "deep" / "b.py").write_text("x = 1\n")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n{"text": "four"}'))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".git" / "d.txt").write_text("hidden")
    (folder / "old.idx").write_bytes(b"")
    (folder / "old.json").write_text('{\n  "documents": 3\n}')  # what an earlier run recorded
    preprocess([folder], tmp_path / "f", tokenizer_path, strict=True)
    encode = load_tokenizer(tokenizer_path).encode
    texts = ["one\r\ntwo", "three", "four", "x = 1\n"]
    assert documents(tmp_path / "f") == [[*encode(t), 2] for t in texts]
    preprocess([f"{folder}/**/*.py", folder / "a.txt"], tmp_path / "g", tokenizer_path)
    assert documents(tmp_path / "g") == [[*encode(t), 2] for t in ("x = 1\n", "one\r\ntwo")]


BAD = [
    (b"{", "not JSON (Expecting property name enclosed in double quotes at column 2)"),
    (b'{"text": "a\nb"}'[:11], "not JSON (Unterminated string starting at at column 10)"),
    (b'{"text": "a\x00b"}', "not JSON (Invalid control character at at column 12)"),
    (b"[" * 100000, "not JSON (maximum recursion depth exceeded"),
    (b'["text"]', 'not a JSON object (but a list; every line must be an object like {"text": "..."})'),
    (b'{"body": "x", "id": 1}', "no key \"text\" (it has 'body', 'id'; choose with --json-key)"),
    (b"{}", 'no key "text" (it has none; choose with --json-key)'),
    (b'{"text": 5}', '"text" is not a string (but a int)'),
    (b'{"text": null}', '"text" is not a string (but a NoneType)'),
    (b'{"text": ""}', "empty text"),
    (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9 at byte 13)"),
    ('{"text": "x"}'.encode("utf-16"), "not UTF-8 (byte 0xff at byte 0)"),
    (b'{"text": "ab\\ud800"}', "half a surrogate pair (\\ud800 at character 2)"),
    (b'{"text": "' + b"x" * 300000 + b'"}', "too long (300012 bytes, the limit is 200000)"),
]


@pytest.mark.parametrize("line, reason", BAD, ids=[reason[:25] for _, reason in BAD])
def test_a_bad_record_is_named_and_skipped(tokenizer_path: Path, tmp_path: Path, line: bytes, reason: str) -> None:
    good = [b'{"text": "one"}\r\n', b"\n", b'{"text": "tw\\u0000o \\ud83e\\udd99"}\n']
    path = tmp_path / "a.jsonl"
    path.write_bytes(good[0] + line.replace(b"\n", b"") + b"\n" + good[1] + good[2])
    summary = preprocess([path], tmp_path / "a", tokenizer_path, max_document_bytes=200000)
    encode = load_tokenizer(tokenizer_path).encode
    assert documents(tmp_path / "a") == [[*encode(t), 2] for t in ("one", "tw\0o 🦙")]
    assert summary.skipped.total() == 1 and summary.examples[0].startswith(f"{path}:2: {reason}")
    with pytest.raises(DataError) as error:
        preprocess([path], tmp_path / "b", tokenizer_path, strict=True, max_document_bytes=200000)
    assert str(error.value).startswith(f"{path}:2: {reason}") and "leave out --strict" in str(error.value)
    assert not list(tmp_path.glob("b*"))


@pytest.mark.parametrize("name, raw, reason", [
    ("a.txt", b"caf\xe9", "not UTF-8 (byte 0xe9 at byte 3)"),
    ("a.txt", b"a\0b", "a NUL character in plain text (at character 1; is it a binary file?)"),
    ("a.txt", b"", "empty text"),
    ("a.txt", b"x" * 300000, "too long (300000 bytes, the limit is 200000)"),
    ("a.txt.gz", b"plain", "not valid gzip (Not a gzipped file"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9)[:-12], "the gzip file is cut off"),
])  # fmt: skip
def test_a_bad_file_is_named(tokenizer_path: Path, tmp_path: Path, name: str, raw: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(raw)
    (tmp_path / "b.txt").write_text("good")
    summary = preprocess([tmp_path], tmp_path / "out", tokenizer_path, max_document_bytes=200000)
    assert summary.skipped.total() == 1
    assert summary.examples[0].startswith(str(tmp_path / name)) and reason in summary.examples[0]
    assert documents(tmp_path / "out")[-1] == [*load_tokenizer(tokenizer_path).encode("good"), 2]


def test_only_the_first_bad_records_are_described(tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x\n" * 1000 + '{"text": "good"}\n')
    summary = preprocess([tmp_path / "a.jsonl"], tmp_path / "a", tokenizer_path)
    assert summary.skipped == {"not JSON": 1000} and len(summary.examples) == 20
    assert json.loads((tmp_path / "a.json").read_text())["skipped"] == {"not JSON": 1000}


def test_nothing_to_write_is_an_error(tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("x\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "few.jsonl").write_text('{"text": "good"}\n' * 3)
    (tmp_path / "x.pdf").write_text("")
    (tmp_path / "folder").mkdir()
    for inputs, options, text in (
        (["bad.jsonl"], {}, "no documents were found: all 1 records are bad, the first: .*bad.jsonl:1: not JSON"),
        (["empty.jsonl"], {}, "no documents were found: the files are empty"),
        (["few.jsonl"], {"split_valid": 0.01}, "out_valid would hold none of the 3 documents with split_valid=0.01"),
        (["few.jsonl"], {"split_valid": 1.5}, "split_valid=1.5 is not a share"),
        (["few.jsonl"], {"workers": 0}, "workers=0; use 1 or more"),
        (["gone.jsonl"], {}, "gone.jsonl does not exist; give a file, a folder or a pattern"),
        (["*.zip"], {}, "zip does not exist; give a file, a folder or a pattern"),
        (["folder"], {}, "folder holds no text: expected files ending in .jsonl"),
        (["x.pdf"], {}, "x.pdf is of an unknown kind '.pdf'; JSON lines end in .jsonl .json .ndjson"),
        ([], {}, "no input files were given"),
    ):
        with pytest.raises(DataError, match=text):
            preprocess([tmp_path / i for i in inputs], tmp_path / "out", tokenizer_path, **options)
        assert not list(tmp_path.glob("out*"))


def test_a_tokenizer_without_end_of_document_is_refused(jsonl: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match="t.json has no end-of-document token; use one with </s>"):
        preprocess([jsonl], tmp_path / "a", tmp_path / "t.json")


def test_a_control_string_does_not_end_a_document(tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one</s>two<s>three")
    preprocess([tmp_path / "a.txt"], tmp_path / "a", tokenizer_path)
    ids = documents(tmp_path / "a")[0]
    assert ids.count(2) == 1 and ids[-1] == 2 and 1 not in ids


def test_a_worker_that_dies_is_reported(jsonl: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    import multiprocessing

    (tmp_path / "a.jsonl").write_bytes(jsonl.read_bytes() * 40)

    before = set(multiprocessing.active_children())  # other tests may keep processes of their own

    def kill(*_: int) -> None:
        for child in set(multiprocessing.active_children()) - before:
            os.kill(child.pid or 0, signal.SIGKILL)

    with pytest.raises(DataError, match=r"a worker process died \(exit status -9\)"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "a", tokenizer_path, workers=2, progress=kill)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    assert set(multiprocessing.active_children()) <= before
