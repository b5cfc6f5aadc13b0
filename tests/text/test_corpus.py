"""The embedded corpus and the reader's own text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megallama.config.errors import DataError
from megallama.text.train_tokenizer import build_corpus, pieces
from tests.words import text_of


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_embedded_corpus_is_the_standard_library(tmp_path: Path) -> None:
    corpus = build_corpus(tmp_path / "a.jsonl", 2_000_000)
    documents = read(corpus.path)
    sources = [d["source"] for d in documents]
    assert corpus.documents == len(documents) > 60
    assert 1_500_000 < corpus.text_bytes == sum(len(d["text"].encode()) for d in documents) <= 2_000_000
    assert len({d["text"] for d in documents}) == len(documents)
    assert not [s for s in sources if "/test" in s or "site-packages" in s or "encodings" in s]
    everything = build_corpus(tmp_path / "b.jsonl", 100_000_000)
    whole = {d["source"] for d in read(everything.path)}
    assert everything.text_bytes < 100_000_000
    assert {"argparse.py", "json/decoder.py", "topic while"} <= whole
    assert build_corpus(tmp_path / "c.jsonl", 2_000_000).path.read_bytes() == corpus.path.read_bytes()


def test_unreadable_and_repeated_modules_are_left_out(tmp_path: Path) -> None:
    lib = tmp_path / "lib"
    (lib / "tests").mkdir(parents=True)
    files = {"a.py": b"a = 1\n", "b.py": b"a = 1\n", "c.py": b"# \xe9\n", "d.py": b"", "tests/e.py": b"e"}
    for name, raw in files.items():
        (lib / name).write_bytes(raw)
    corpus = build_corpus(tmp_path / "out.jsonl", 10_000_000, stdlib=lib)
    assert [d["text"] for d in read(corpus.path) if not d["source"].startswith("topic")] == ["a = 1\n"]
    assert corpus.skipped == ("c.py: not UTF-8",)


def test_a_missing_standard_library_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megallama.text.train_tokenizer._topics", lambda: iter(()))
    with pytest.raises(DataError, match=r"holds no Python sources .* give your own text with TEXT=path"):
        build_corpus(tmp_path / "out.jsonl", 1000, stdlib=tmp_path)


def test_one_book_becomes_many_documents(tmp_path: Path) -> None:
    book = "\n\n".join(text_of(i) for i in range(2000))
    (tmp_path / "book.txt").write_text(book)
    corpus = build_corpus(tmp_path / "out.jsonl", 10_000_000, tmp_path / "book.txt")
    documents = [d["text"] for d in read(corpus.path)]
    assert "".join(documents) == book and corpus.text_bytes == len(book.encode())
    assert 32 <= len(documents) <= 128 and max(map(len, documents)) <= 2 * len(book.encode()) // 64
    assert all(d.endswith("\n\n") for d in documents[:-1])


@pytest.mark.parametrize("text, size, expected", [
    ("abc", 4, ["abc"]),
    ("a\n\nb\n" * 4, 4, ["a\n\nb\na\n\n", "b\na\n\n", "b\na\n\nb\n"]),
    ("x" * 20, 4, ["x" * 8, "x" * 8, "xxxx"]),
    ("ab\n" * 4, 3, ["ab\nab\n", "ab\nab\n"]),
])  # fmt: skip
def test_pieces_end_where_paragraphs_do(text: str, size: int, expected: list[str]) -> None:
    assert list(pieces(text, size)) == expected and "".join(expected) == text


def test_jsonl_and_folders_and_unreadable_parts(tmp_path: Path, jsonl: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl.read_bytes() * 2 + b"broken\n")  # repeated documents count once
    (folder / "b.png").write_bytes(b"\xff\xfe")
    (folder / "c.md").write_text("".join(text_of(i) for i in range(1000, 1600)))
    corpus = build_corpus(tmp_path / "out.jsonl", 10_000_000, folder)
    texts = {d["text"] for d in read(corpus.path)}
    assert {text_of(i) for i in range(300)} <= texts
    assert corpus.skipped[0] == f"not read: 1 of another kind (.png), the first '{folder}/b.png'"
    assert corpus.skipped[1].startswith("skipped 1 bad record of 602 records (allowed are 0.1% in all")
    assert "a.jsonl:601: not JSON" in corpus.skipped[2] and len(corpus.skipped) == 3
    (folder / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"1 file cannot be read:\n  .*b.txt: none of 1 record can be used: it is"):
        build_corpus(tmp_path / "out.jsonl", 10_000_000, folder)


def test_text_that_cannot_be_trained_on(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "small.txt").write_text("few words")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50000)
    (tmp_path / "book.pdf").write_bytes(b"%PDF")
    for name, text in (
        ("gone.txt", "gone.txt does not exist; TEXT takes a text file, a .jsonl file or a folder of them"),
        ("empty.txt", "empty.txt is empty; give a file or folder with 100,000 bytes"),
        ("small.txt", "small.txt holds 9 bytes of usable text, too little to train on; give 100,000 bytes or more"),
        ("latin.txt", r"1 file cannot be read:\n  .*latin.txt: none of 1 record can be used: not UTF-8"),
        ("book.pdf", "book.pdf is of an unknown kind '.pdf'"),
    ):
        with pytest.raises(DataError, match=text):
            build_corpus(tmp_path / "out.jsonl", 10**9, tmp_path / name)
        assert not list(tmp_path.glob("out*"))
