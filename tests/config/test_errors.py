"""What a command leaves with: its exit status and what is on the screen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megallama.commands.exit import exit_status
from megallama.config.errors import MegallamaError, counted

ROOT = Path(__file__).parents[2]


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> int:
        def run() -> None:
            raise error

        return exit_status(run)

    assert fails(MegallamaError("no such thing; write this")) == 2
    assert fails(FileNotFoundError(2, "No such file or directory", "a.toml")) == 2
    assert fails(OSError("odd")) == 2
    assert fails(KeyboardInterrupt()) == 130
    assert [fails(SystemExit(code)) for code in (None, 0, 5)] == [0, 0, 5] and fails(SystemExit("why")) == 1
    assert capsys.readouterr().err == (
        "error: no such thing; write this\nerror: a.toml: No such file or directory\nerror: odd\n\nstopped\nwhy\n"
    )
    assert exit_status(lambda: 0) == 0


def test_a_pipe_that_breaks_in_the_middle_of_a_command() -> None:
    """Not an error to tell: whoever read the output has enough."""
    code = "from megallama.commands.exit import exit_status\ndef run(): raise BrokenPipeError\nexit(exit_status(run))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "step", "0 steps"), (1, "step", "1 step"), (2, "step", "2 steps"), (2_000, "document", "2000 documents"),
        (3, "micro-batch", "3 micro-batches"), (2, "epoch", "2 epochs"), (4, "process", "4 processes"),
        ("4.1M", "token", "4.1M tokens"), ("1", "token", "1 token"), ("1.0k", "token", "1.0k tokens"),
    ],
)  # fmt: skip
def test_counted(number: int | str, noun: str, text: str) -> None:
    assert counted(number, noun) == text


def test_counted_in_a_form() -> None:
    assert [counted(n, "token", ",") for n in (1, 2_000)] == ["1 token", "2,000 tokens"]
