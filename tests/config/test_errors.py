"""What a command leaves with: its exit status and what is on the screen."""

from __future__ import annotations

import pytest

from megallama.config.errors import MegallamaError, exit_status


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
