"""Text to tokens: exact content, the same bytes for any number of workers, every malformed record reported."""

from __future__ import annotations

import gzip
import json
import os
import signal
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megallama.config.errors import DataError
from megallama.data.indexed import IndexedDataset
from megallama.data.look import document
from megallama.data.tokenizer import load_tokenizer, sha256_of
from megallama.text import preprocess as module
from megallama.text.preprocess import in_validation, preprocess, split_of
from tests.words import text_of


def documents(prefix: Path) -> list[list[int]]:
    data = IndexedDataset(prefix)
    return [document(data, i).tolist() for i in range(data.num_documents)]


def content(prefix: Path, *suffixes: str) -> dict[str, bytes]:
    return {s: Path(f"{prefix}{s}").read_bytes() for s in suffixes or (".bin", ".idx", ".sums", ".json")}


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
        "fingerprint": IndexedDataset(tmp_path / "a").fingerprint()["sha256"],
    }
    (out,) = summary.outputs
    assert (out.num_documents, out.num_tokens, out.text_bytes) == (300, tokens, size)
    assert seen[-1] == (jsonl.stat().st_size, jsonl.stat().st_size, tokens)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json", "a.sums"]


def megatron_files(documents: list[list[int]], code: int, letter: str) -> dict[str, bytes]:
    """What Megatron's tool writes with one sequence per document, from the description of the format alone."""
    lengths = [len(ids) for ids in documents]
    size, pointers = struct.calcsize("<" + letter), [0]
    for n in lengths[:-1]:
        pointers.append(pointers[-1] + n * size)
    index = [b"MMIDIDX\x00\x00", struct.pack("<Q", 1), struct.pack("<B", code), struct.pack("<Q", len(documents)),
             struct.pack("<Q", len(documents) + 1), struct.pack(f"<{len(lengths)}i", *lengths),
             struct.pack(f"<{len(lengths)}q", *pointers),
             struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))]  # fmt: skip
    stream = [struct.pack(f"<{len(ids)}{letter}", *ids) for ids in documents]
    return {".bin": b"".join(stream), ".idx": b"".join(index)}


def test_the_files_are_megatrons(jsonl: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    preprocess([jsonl], tmp_path / "a", tokenizer_path, workers=2)
    encode = load_tokenizer(tokenizer_path).encode
    expected = megatron_files([[*encode(text_of(i)), 2] for i in range(300)], 8, "H")
    assert content(tmp_path / "a", ".bin", ".idx") == expected


def test_the_fast_encoder_writes_the_same(
    jsonl: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert preprocess([jsonl], tmp_path / "a", tokenizer_path).encoder == "sentencepiece"  # little text: not worth it
    monkeypatch.setattr(module, "FAST_FROM", 0)
    summary = preprocess([jsonl], tmp_path / "b", tokenizer_path)
    assert "gigatoken" in summary.encoder  # or why it is not used
    assert preprocess([jsonl], tmp_path / "c", tokenizer_path, fast=False).encoder == "sentencepiece"
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path / "c")


def test_a_large_vocabulary_is_written_as_int32(jsonl: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{i}": i for i in range(70_000)} | {"the": 70_000, "<unk>": 70_001, "<|endoftext|>": 70_002}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save(str(tmp_path / "t.json"))
    preprocess([jsonl], tmp_path / "a", tmp_path / "t.json")
    words = [[70_000 if word == "the" else 70_001 for word in text_of(i).split()] for i in range(300)]
    assert content(tmp_path / "a", ".bin", ".idx") == megatron_files([[*ids, 70_002] for ids in words], 4, "i")


@pytest.mark.parametrize("split", [(0.0, 0.0), (0.1, 0.0), (0.1, 0.05)])
def test_the_bytes_do_not_depend_on_processes_jobs_or_blocks(
    jsonl: Path, tokenizer_path: Path, tmp_path: Path, split: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(jsonl.read_bytes() + b"not json\n" + jsonl.read_bytes())
    (tmp_path / "more").mkdir()
    for number in range(70):  # small files share a job
        (tmp_path / "more" / f"{number:02d}.txt").write_text(text_of(number))
    (tmp_path / "more" / "71.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes(), mtime=0))
    parts = [""] if split == (0, 0) else ["_train", "_valid", "_test"][: 3 if split[1] else 2]
    summaries = []
    for name, processes, job, block in (("one", 1, 1 << 20, 99999), ("two", 2, 5000, 99999), ("three", 3, 700, 300)):
        monkeypatch.setattr(module, "TASK_BYTES", job)
        monkeypatch.setattr("megallama.text.workers.BLOCK_BYTES", block)
        options = {"workers": processes, "split_valid": split[0], "split_test": split[1]}
        summaries.append(preprocess([corpus, tmp_path / "more"], tmp_path / name, tokenizer_path, **options))
    for part in parts:
        one = content(tmp_path / f"one{part}")
        assert one == content(tmp_path / f"two{part}") == content(tmp_path / f"three{part}")
    assert sum(out.num_documents for out in summaries[0].outputs) == 300 * 3 + 70
    first, *others = (summary.losses for summary in summaries)
    assert all(losses.skipped == {"not JSON": 1} and losses.lines() == first.lines() for losses in (first, *others))
    assert first.examples[0].startswith(f"{corpus}:301: not JSON")


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


@pytest.mark.parametrize("valid, test", [(0.1, 0.05), (0.01, 0.01), (0.2, 0.3), (0.0, 0.04), (0.05, 0.0), (0.3, 0.001)])
def test_valid_and_test_have_exact_shares_and_nothing_in_common(valid: float, test: float) -> None:
    n = 60000
    which = split_of(np.arange(n), valid, test)
    assert abs(int((which == 1).sum()) - n * valid) <= 2 and abs(int((which == 2).sum()) - n * test) <= 2
    assert np.array_equal(which > 0, in_validation(np.arange(n), Fraction(str(valid)) + Fraction(str(test))))
    assert np.array_equal(which[777:], split_of(np.arange(777, n), valid, test))
    ends = np.array([int((which[:k] == 2).sum()) - k * test for k in range(0, n, 997)])
    assert np.abs(ends).max() <= 2  # even along the way


def test_three_splits_deal_out_every_document_once(jsonl: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    preprocess([jsonl], tmp_path / "all", tokenizer_path)
    summary = preprocess([jsonl], tmp_path / "s", tokenizer_path, split_valid=0.05, split_test=0.1)
    assert [Path(out.prefix).name for out in summary.outputs] == ["s_train", "s_valid", "s_test"]
    which, everything = split_of(np.arange(300), 0.05, 0.1), documents(tmp_path / "all")
    for number, name in enumerate(("s_train", "s_valid", "s_test")):
        assert documents(tmp_path / name) == [d for d, w in zip(everything, which, strict=True) if w == number]
    summary = preprocess([jsonl], tmp_path / "t", tokenizer_path, split_test=0.1)
    assert [Path(out.prefix).name for out in summary.outputs] == ["t_train", "t_test"]
    assert documents(tmp_path / "t_test") == [
        d for d, w in zip(everything, split_of(np.arange(300), 0, 0.1), strict=True) if w
    ]


def test_text_files_folders_patterns_and_gzip(tokenizer_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")  # a byte-order mark is no text
    (folder / "deep" / "b.py").write_text("x = 1\n")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n{"text": "four"}', mtime=0))
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
    assert summary.losses.skipped.total() == 1 and summary.losses.examples[0].startswith(f"{path}:2: {reason}")
    with pytest.raises(DataError) as error:
        preprocess([path], tmp_path / "b", tokenizer_path, strict=True, max_document_bytes=200000)
    assert str(error.value).startswith(f"{path}:2: {reason}") and "leave out --strict" in str(error.value)
    assert not list(tmp_path.glob("b*"))


@pytest.mark.parametrize("name, raw, reason", [
    ("a.txt", b"caf\xe9", "none of 1 record can be used: not UTF-8 (byte 0xe9 at byte 3)"),
    ("a.txt", b"a\0b", "none of 1 record can be used: it is UTF-16 or UTF-32; convert it"),
    ("a.txt", b"abcdefgh\0b", "none of 1 record can be used: a NUL character in plain text (at character 8; is it a"),
    ("a.txt", b"x" * 300000, "none of 1 record can be used: too long (300000 bytes, the limit is 200000)"),
    ("a.txt.gz", b"plain", "not valid gzip (Not a gzipped file"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-12], "the gzip file is cut off"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_ends_the_run(
    tokenizer_path: Path, tmp_path: Path, name: str, raw: bytes, reason: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(raw)
    (tmp_path / "in" / "b.txt").write_text("good")
    with pytest.raises(DataError) as error:
        preprocess([tmp_path / "in"], tmp_path / "out", tokenizer_path, max_document_bytes=200000)
    assert str(error.value).startswith(f"1 file cannot be read:\n  {tmp_path}/in/{name}: {reason}")
    assert "--skip-bad-files" in str(error.value) and not list(tmp_path.glob("out*.*n"))
    options = {"max_document_bytes": 200000, "skip_bad_files": True}
    summary = preprocess([tmp_path / "in"], tmp_path / "out", tokenizer_path, **options)
    assert documents(tmp_path / "out")[-1] == [*load_tokenizer(tokenizer_path).encode("good"), 2]
    assert summary.losses.lines()[-1].startswith(f"left out what cannot be read of {tmp_path}/in/{name}: {reason}")
    assert json.loads((tmp_path / "out.json").read_text())["files not read"] == 1


def test_only_the_first_bad_records_are_described(tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x\n" * 1000 + '{"text": "good"}\n')
    options = {"max_bad": "1000", "max_bad_per_file": "100%"}
    summary = preprocess([tmp_path / "a.jsonl"], tmp_path / "a", tokenizer_path, **options)
    assert summary.losses.skipped == {"not JSON": 1000} and len(summary.losses.examples) == 20
    assert summary.losses.lines()[-1] == "  ... and 980 more"
    assert json.loads((tmp_path / "a.json").read_text())["skipped"] == {"not JSON": 1000}


def bad_lines(path: Path, bad: int, good: int) -> Path:
    """Bad lines spread evenly among good ones."""
    lines = [b"x\n" if (i + 1) * bad // (bad + good) > i * bad // (bad + good) else b'{"text": "good"}\n'
             for i in range(bad + good)]  # fmt: skip
    path.write_bytes(b"".join(lines))
    return path


@pytest.mark.parametrize("bad, good, arguments, stops", [
    (1, 50, "", False), (1, 1, "", False), (2, 50, "", True), (3, 1, "", True),  # the default: one
    (5, 5000, "", False), (15, 15000, "", False), (16, 15000, "", True),  # or one in a thousand
    (3, 50, "3", False), (4, 5000, "3", True), (1, 50, "0", True),
    (5, 95, "5%", False), (6, 94, "5%", True), (1, 99, "0%", True), (1, 199, "0.5%", False),
    (9, 1, "100%", True), (5, 45, "100%", False), (6, 45, "100%", True),  # a tenth of a file
])  # fmt: skip
def test_too_many_bad_records_stop_the_run(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    bad: int, good: int, arguments: str, stops: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "TASK_BYTES", 20000)
    processes = 2 if good >= 15000 else 1  # with several jobs
    path = bad_lines(tmp_path / "a.jsonl", bad, good)
    if not stops:
        summary = preprocess([path], tmp_path / "a", tokenizer_path, max_bad=arguments, workers=processes)
        assert summary.losses.skipped.total() == bad and summary.outputs[0].num_documents == good
        return
    with pytest.raises(DataError, match=r"\d+ of [\d,]+ records are bad, more than the .* that may be") as error:
        preprocess([path], tmp_path / "a", tokenizer_path, max_bad=arguments, workers=processes)
    first = path.read_bytes().split(b"\n").index(b"x") + 1
    assert f"\n  {path}:{first}: not JSON" in str(error.value) and "--max-bad 5%" in str(error.value)
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".bin", ".idx", ".sums", ".json", ".tmp")]


@pytest.mark.parametrize("arguments", ["many", "-1", "101%", "%", "1.5", "-2%"])
def test_a_wrong_limit_of_bad_records_is_refused(
    jsonl: Path, tokenizer_path: Path, tmp_path: Path, arguments: str
) -> None:
    with pytest.raises(DataError, match=f"max_bad='{arguments}' is neither a number of records nor a share such as 5%"):
        preprocess([jsonl], tmp_path / "a", tokenizer_path, max_bad=arguments)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_strict_names_the_first_bad_record_of_the_input(
    jsonl: Path, tokenizer_path: Path, tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TASK_BYTES", 3000)
    lines = jsonl.read_bytes().split(b"\n")[:-1]
    for number in (103, 104, 250, 299):
        lines[number - 1] = b"{" * number
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(DataError, match=r"a\.jsonl:103: not JSON \(Expecting property name"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "a", tokenizer_path, workers=processes, strict=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.parts"]  # what is done serves a lenient run
    done = preprocess([tmp_path / "a.jsonl"], tmp_path / "a", tokenizer_path, workers=processes, max_bad="4")
    assert [example.split(":")[1] for example in done.losses.examples] == ["103", "104", "250", "299"]


def test_an_output_that_would_replace_an_input_is_refused(tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "good"}\n')
    with pytest.raises(DataError, match="a.json is an input and would be replaced by the output; use another --output"):
        preprocess([tmp_path / "a.json"], tmp_path / "a", tokenizer_path)
    assert (tmp_path / "a.json").read_text() == '{"text": "good"}\n'


def test_nothing_to_write_is_an_error(tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("x\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "few.jsonl").write_text('{"text": "good"}\n' * 3)
    (tmp_path / "x.pdf").write_text("")
    (tmp_path / "folder").mkdir()
    for inputs, options, text in (
        (["bad.jsonl"], {}, "1 file cannot be read:\n  .*bad.jsonl: none of 1 record can be used: not JSON"),
        (["empty.jsonl"], {}, "no documents were found: the files hold no text"),
        (["few.jsonl"], {"split_valid": 0.01}, "out_valid would hold none of the 3 documents with split_valid=0.01"),
        (["few.jsonl"], {"split_valid": 1.5}, "split_valid=1.5 is not a share"),
        (["few.jsonl"], {"split_test": -0.1}, "split_test=-0.1 is not a share"),
        (["few.jsonl"], {"split_valid": 1e-7}, "split_valid=1e-07 is not a share; use 0, or from 0.000001 to below 1"),
        (["few.jsonl"], {"split_valid": 0.5, "split_test": 0.5}, "split_valid=0.5 and split_test=0.5 leave nothing"),
        (["few.jsonl"], {"workers": 0}, "workers=0; use 1 or more"),
        (["gone.jsonl"], {}, "gone.jsonl does not exist; give a file, a folder or a pattern"),
        (["*.zip"], {}, "zip does not exist; give a file, a folder or a pattern"),
        (["folder"], {}, "folder holds no text: JSON lines end in .jsonl"),
        (["x.pdf"], {}, "x.pdf is of an unknown kind '.pdf'; JSON lines end in .jsonl .json .ndjson"),
        ([], {}, "no input files were given"),
        ([""], {}, "an input is empty .an unset variable of the shell"),
    ):
        with pytest.raises(DataError, match=text):
            preprocess([tmp_path / i if i else i for i in inputs], tmp_path / "out", tokenizer_path, **options)
        assert [p for p in tmp_path.glob("out*") if p.name != "out.parts"] == []


def test_a_tokenizer_without_end_of_document_is_refused(jsonl: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match="t.json has no end-of-document token: it .* <eos>; name the one it has"):
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
    assert {p.name for p in tmp_path.iterdir()} <= {"a.jsonl", "a.parts"}
    assert set(multiprocessing.active_children()) <= before
