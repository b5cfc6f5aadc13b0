"""Which files are read: every one below a folder, each once, or told why not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megallama.config.errors import DataError
from megallama.data.indexed import IndexedDataset
from megallama.text import inputs as module_of_inputs
from megallama.text import preprocess as module
from megallama.text.inputs import Found, earlier_files
from megallama.text.preprocess import preprocess
from megallama.text.train_tokenizer import train_tokenizer


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "one"}\n')
    return folder


def found(folder: Path, *inputs: Path | str) -> tuple[list[str], list[str]]:
    """Names below the folder that are read, and the lines about the others."""
    all_of_it = Found(inputs or [folder])
    lines = [line.replace(f"{folder}/", "").removeprefix("not read: ") for line in all_of_it.lines()]
    return [str(path.relative_to(folder)) for path in all_of_it.files], lines


def test_every_file_is_read_or_told(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "a.jsonl", "b.JSON", "c.txt.gz", "deep/er/d.parquet", "picture.png", "song.mp3",
                  "other.png", "README", ".hidden.txt", ".git/x.txt", ".git/deep/y.py", "__pycache__/z.py",
                  "old.bin", "old.idx", "old.json", "old.sums", "e.json")  # fmt: skip
    os.mkfifo(folder / "pipe.txt")
    (folder / "broken.txt").symlink_to("gone.txt")
    (folder / "self.txt").symlink_to("self.txt")
    (folder / "again.txt").symlink_to("e.json")
    assert found(folder) == (["a.jsonl", "b.JSON", "c.txt.gz", "deep/er/d.parquet", "e.json"], [
        "1 broken links, the first 'broken.txt'",
        "1 files that are read under another name, the first 'again.txt'",
        "4 hidden, the first '.git/deep/y.py'",
        "1 links that lead in a circle, the first 'self.txt'",
        "4 made by preprocessing, the first 'old.bin'",
        "1 not regular files, the first 'pipe.txt'",
        "1 of another kind (.mp3), the first 'song.mp3'",
        "2 of another kind (.png), the first 'other.png'",
        "1 of another kind (no suffix), the first 'README'",
    ])  # fmt: skip
    files = [p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()]
    messages = sum(int(line.split()[0]) for line in found(folder)[1])
    assert len(files) == messages + 5


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    outside = make(tmp_path / "outside", "x.jsonl", "sub/y.jsonl")
    folder = make(tmp_path / "in", "a/one.jsonl", "z.jsonl")
    (folder / "b").symlink_to(outside)
    (folder / "0-same").symlink_to("a")  # sorts before the folder, which keeps its own name
    (folder / "c").symlink_to(outside / "sub")
    (folder / "a" / "up").symlink_to("..")
    (outside / "loop").symlink_to(folder)
    (outside / "file.jsonl").symlink_to(folder / "z.jsonl")
    files, lines = found(folder)
    assert files == ["a/one.jsonl", "b/sub/y.jsonl", "b/x.jsonl", "z.jsonl"]
    assert lines == [
        "1 files that are read under another name, the first 'b/file.jsonl'",
        "4 folders (perhaps a loop of links) that are read under another name, the first '0-same'",
    ]


def test_without_links_the_order_is_what_it_always_was(tmp_path: Path) -> None:
    names = ("b.jsonl", "a/z.jsonl", "a.jsonl", "a-b/c.jsonl", "B.txt", "ab.txt", "a/b/c.txt", "é.md", "d.json")
    folder = make(tmp_path / "in", *names)
    every = sorted(p for p in folder.rglob("*") if p.is_file())
    make(folder, "made.json", "made.idx", ".hidden/e.txt")
    assert Found([folder]).files == earlier_files([folder]) == every
    assert earlier_files([folder / "d.json", f"{folder}/*.txt"]) == [folder / n for n in ("d.json", "B.txt", "ab.txt")]


def test_files_named_twice_are_read_once(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "a.jsonl", "b.jsonl", "sub/c.jsonl")
    files, lines = found(folder, folder / "b.jsonl", f"{folder}/*", folder)
    assert files == ["b.jsonl", "a.jsonl", "sub/c.jsonl"]
    assert lines == [
        "3 files that are read under another name, the first 'b.jsonl'",
        "1 folders (perhaps a loop of links) that are read under another name, the first 'sub'",
    ]


def test_a_folder_that_cannot_be_listed_ends_the_work(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "in", "a.jsonl", "secret/b.jsonl", ".secret/c.jsonl")
    pure = os.scandir

    def scandir(path: Any) -> Any:
        if "secret" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return pure(path)

    monkeypatch.setattr(os, "scandir", scandir)
    expected = rf"1 file cannot be read:\n  {folder}/secret: cannot be read .Permission denied.\n.*--skip-bad-files"
    with pytest.raises(DataError, match=expected):
        preprocess([folder], tmp_path / "o", tokenizer_path)
    with pytest.raises(DataError, match=expected):
        train_tokenizer([folder], tmp_path / "o.model", 300)
    summary = preprocess([folder], tmp_path / "o", tokenizer_path, skip_bad_files=True)
    assert summary.outputs[0].num_documents == 1
    assert f"left out what cannot be read of {folder}/secret: cannot" in "\n".join(summary.losses.lines())


@pytest.mark.parametrize("arguments, message", [
    ("", "an input is empty"), (" ", "an input is empty"), ("gone", "gone does not exist"),
    ("*.zip", r"\*.zip does not exist"), ("broken", "broken does not exist"), ("empty", "empty holds no text: JSON li"),
    ("only", r"(?s)only holds no text: .*not read: 1 of another kind \(.png\)"),
    ("a.pdf", "a.pdf is of an unknown kind '.pdf'"),
])  # fmt: skip
def test_names_that_mean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str) -> None:
    monkeypatch.chdir(make(tmp_path, "only/x.png", "a.pdf"))
    Path("empty").mkdir()
    Path("broken").symlink_to("nothing")
    with pytest.raises(DataError, match=message):
        Found([arguments])


@pytest.mark.parametrize("link", [False, True])
def test_a_start_of_an_earlier_version_goes_on_with_its_own_list(
    tmp_path: Path, jsonl: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, link: bool
) -> None:
    """It followed no links: the documents behind one are not of its list, and its jobs are as it cut them."""
    monkeypatch.setattr(module, "TASK_BYTES", 2000)
    folder, outside = tmp_path / "in", make(tmp_path / "outside", "more.jsonl")
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl.read_bytes())
    (folder / "same.jsonl").symlink_to("a.jsonl")
    if link:
        (folder / "linked").symlink_to(outside)
    with monkeypatch.context() as patch:  # the earlier version, up to its third part
        patch.setattr(module_of_inputs, "Found", Earlier)
        ends: list[int] = []
        end = module.WorkFolder.read

        def fatal(self: Any, part: Any, dtype: Any) -> Any:
            ends.append(part.job)
            if len(ends) > 3:
                raise KeyboardInterrupt
            return end(self, part, dtype)

        patch.setattr(module.WorkFolder, "read", fatal)
        with pytest.raises(KeyboardInterrupt):
            preprocess([folder], tmp_path / "o", tokenizer_path)
    for path in (tmp_path / "o.parts").glob("*/*.journal"):  # which wrote less about a part
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        new = ("counts", "changed", "faults")
        path.write_text("".join(json.dumps({k: v for k, v in x.items() if k not in new}) + "\n" for x in lines))
    output: list[str] = []
    preprocess([folder], tmp_path / "o", tokenizer_path, say=output.append)
    assert IndexedDataset(tmp_path / "o").num_documents == 600
    assert (
        f"goes on with the list of an earlier version, of 2 files; to begin again delete {tmp_path}/o.parts" in output
    )
    preprocess([folder], tmp_path / "o", tokenizer_path)
    assert IndexedDataset(tmp_path / "o").num_documents == 300 + link


class Earlier(Found):
    """Finds what earlier versions found."""

    def __init__(self, inputs: list[Path]) -> None:
        super().__init__(inputs)
        self.files = earlier_files(inputs)


def test_a_file_changed_while_it_is_read_is_an_error(
    tmp_path: Path, jsonl: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl.read_bytes())
    check = module_of_inputs.Losses.check

    def late(self: Any) -> None:
        with path.open("a") as file:
            file.write('{"text": "late"}\n')
        check(self)

    monkeypatch.setattr(module_of_inputs.Losses, "check", late)
    with pytest.raises(DataError, match="files of the input were changed while they were read; start again"):
        preprocess([path], tmp_path / "o", tokenizer_path)
    monkeypatch.undo()
    preprocess([path], tmp_path / "o", tokenizer_path)
    assert IndexedDataset(tmp_path / "o").num_documents == 301
