"""Two commands do not write the same output at the same time, and leave nothing beside it."""

from __future__ import annotations

import fcntl
from pathlib import Path

import numpy as np
import pytest

from megallama.cli import main
from megallama.config.errors import DataError
from megallama.data.writer import IndexedWriter, alone

FROZEN = Path(__file__).parents[1] / "frozen" / "v1" / "fp32"
COMMANDS = {
    "merge": ["a", "--output", "new/out.bin", "--quiet"],
    "average": [str(FROZEN), "--output", "new/out"],
    "convert": [str(FROZEN), "new/out", "--to", "hf"],
    "tokenizer": ["a.txt", "--output", "new/out", "--vocab-size", "300", "--quiet"],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pair and a text, which is the current one."""
    monkeypatch.chdir(tmp_path)
    with IndexedWriter(tmp_path / "a", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(9))
    (tmp_path / "a.txt").write_text("A text of words.")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_the_second_is_refused(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone(Path("new/out")):
        assert main([command, *COMMANDS[command]]) == 2
        assert capsys.readouterr().err.startswith("error: another process is writing new/out now; wait for it")
        assert [path.name for path in Path("new").iterdir()] == [".out.lock"]
    assert not (here / "new").exists()


def test_what_is_made_stays_and_the_lock_goes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for said in ("", "note: new/out.bin was there, and is replaced\n"):
        assert main(["merge", *COMMANDS["merge"]]) == 0
        assert capsys.readouterr().err == said
        assert sorted(path.name for path in (here / "new").iterdir()) == ["out.bin", "out.idx", "out.sums"]


def test_a_failure_leaves_no_folder(here: Path) -> None:
    assert main(["average", str(here / "nothing"), "--output", str(here / "new/deep/out")]) == 2
    assert not (here / "new").exists()


def test_a_file_system_without_locks_is_no_obstacle(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(file: object, kind: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuses)
    with alone(here / "out"), alone(here / "out"):
        pass


def test_one_after_the_other(here: Path) -> None:
    with alone(here / "out"):
        pass
    with alone(here / "out"), pytest.raises(DataError, match="another process"), alone(here / "out"):
        pass


@pytest.mark.parametrize("name", ["data/", "data/.", ".", ".."])
def test_a_folder_is_no_name_of_a_pair(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "a", "--output", name]) == 2
    assert f"error: {name!r} is a folder and no name of a pair; write for example" in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == ["a.bin", "a.idx", "a.sums", "a.txt"]


@pytest.mark.parametrize("name", ["/", ".", "", ".."])
def test_names_that_are_folders_already(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(FROZEN), name, "--to", "hf"]) == 2
    assert capsys.readouterr().err == f"error: {Path(name)} exists; give a new folder, or delete it first\n"
    assert sorted(path.name for path in here.iterdir()) == ["a.bin", "a.idx", "a.sums", "a.txt"]
