"""What the log says, where, and that nothing it meets stops a run."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megallama.config.errors import ConfigError
from megallama.train.log import Logger, human_bytes, human_count, human_duration


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1.0k"),
        (12345, "12.3k"),
        (999_940, "999.9k"),
        (999_960, "1.0M"),
        (4_100_000, "4.1M"),
        (6_738_415_616, "6.7B"),
        (1.4e12, "1.4T"),
        (2e15, "2000.0T"),
    ],
)
def test_human_count(number: float, text: str) -> None:
    assert human_count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (512, "512 B"),
        (1500, "1.5 kB"),
        (38_400_000, "38.4 MB"),
        (999_960_000, "1.00 GB"),
        (1_234_000_000, "1.23 GB"),
        (4.2e12, "4.20 TB"),
    ],
)
def test_human_bytes(number: float, text: str) -> None:
    assert human_bytes(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (754, "0:12:34"), (86399, "23:59:59"), (183845, "2d 03:04:05")],
)
def test_human_duration(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text


def lines(path: Path) -> list[str]:
    """The lines of a log file, without their times (which are checked)."""
    found = []
    for line in path.read_text().splitlines():
        match = re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)", line)
        assert match, line
        found.append(match[1])
    return found


def test_every_rank_has_its_file_and_rank_0_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 3):
        log = Logger(rank, 4, tmp_path / "run")
        log.info("step 1/2 | loss 3.2145")
        log.note("only here")
        log.warn(f"from {rank}")
        log.warn_once("again")
        log.warn_once("again")
        log.warn_once("disk a", key="disk")
        log.warn_once("disk b", key="disk")
        log.close()
    logs = tmp_path / "run" / "logs"
    output = ["step 1/2 | loss 3.2145", "only here", "warning: from {}", "warning: again", "warning: disk a"]
    for rank in (0, 3):
        assert lines(logs / f"rank-000{rank}.log") == [line.format(rank) for line in output]
    # neither notes nor other ranks
    assert lines(tmp_path / "run" / "run.log") == [output[0], "warning: from 0", *output[3:]]
    shown = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in capsys.readouterr().out.splitlines()]
    assert shown[:2] == ["step 1/2 | loss 3.2145", "warning: from 0"]
    assert shown[4:] == ["[rank 3] warning: from 3", "[rank 3] warning: again", "[rank 3] warning: disk a"]


def test_a_second_start_appends(tmp_path: Path) -> None:
    for text in ("first", "second"):
        log = Logger(0, 1, tmp_path)
        log.info(text)
        log.close()
    assert lines(tmp_path / "run.log") == ["first", "second"]


def test_lines_are_on_disk_when_the_process_is_killed(tmp_path: Path) -> None:
    code = "import os, sys, pathlib; from megallama.train.log import Logger\n"
    code += "log = Logger(0, 1, pathlib.Path(sys.argv[1])); log.info('last words'); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.DEVNULL).returncode == -9
    assert lines(tmp_path / "run.log") == lines(tmp_path / "logs" / "rank-0000.log") == ["last words"]


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"run.folder={tmp_path}/file/run cannot be written: Not a directory; give"):
        Logger(0, 1, tmp_path / "file" / "run")


def test_a_full_disk_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Logger(0, 1, tmp_path)

    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    for i in range(3):
        log.info(f"step {i}")
    monkeypatch.undo()
    log.info("step 3")
    log.close()
    out = capsys.readouterr().out
    assert out.count("warning: log lines are lost: No space left on device; training goes on") == 1
    assert [f"step {i}" in out for i in range(4)] == [True] * 4
    assert lines(tmp_path / "run.log") == ["step 3"]


def test_a_closed_pipe_does_not_stop_the_run(tmp_path: Path) -> None:
    code = "import sys, pathlib; from megallama.train.log import Logger\n"
    code += "log = Logger(0, 1, pathlib.Path(sys.argv[1])); sys.stdin.read(1); [log.info(str(i)) for i in range(3)]"
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=write)
    os.close(read)
    os.close(write)
    process.communicate(b"x")
    assert lines(tmp_path / "run.log") == ["0", "1", "2"]


def test_an_error_goes_to_standard_error_and_into_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        log = Logger(rank, 2, tmp_path)
        log.error("model.hidden_size=3 is odd", aloud=rank == 0)
        log.close()
    assert capsys.readouterr() == ("", "error: model.hidden_size=3 is odd\n")
    for name in ("run.log", "logs/rank-0000.log", "logs/rank-0001.log"):
        assert lines(tmp_path / name) == ["error: model.hidden_size=3 is odd"]
