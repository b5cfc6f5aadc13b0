"""The bar on a terminal, lines in a log file, nothing where it is to be quiet."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from megallama.text import progress
from megallama.text.progress import ByteProgress


class Screen(io.StringIO):
    """Standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time, which a test sets; it begins at 100 s."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_log_file_gets_a_line_every_ten_seconds(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with ByteProgress("tokenizing", then="training") as bar:
        updates = ((100, 0, 0), (109.9, 49, 20), (110, 50, 20), (119.9, 80, 40), (121, 84, 0), (130, 90, 9))
        for clock.now, done, tokens in updates:
            bar.update(done * 1_000_000, 200_000_000, tokens * 1_000_000)
        clock.now = 140.0
        bar.update(0, 0)
    assert capsys.readouterr().err.splitlines() == [
        "tokenizing: 25 %, 5.0 MB/s, 2.00 M tokens/s, 30 s left",
        "tokenizing: 42 %, 4.0 MB/s, 29 s left",
        "tokenizing: 0 %, 0.0 MB/s, 0 s left",
    ]


def test_a_terminal_gets_a_bar(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Screen())
    with ByteProgress("reading", then="training") as bar:
        shown = bar._bar
        assert shown is not None and shown.live.is_started
        (task,) = shown.tasks
        assert (task.description, task.total) == ("reading", None)
        clock.now = 104.0
        bar.update(8_000_000, 20_000_000, 6_000_000)
        assert (task.completed, task.total) == (8_000_000, 20_000_000)
        assert task.fields == {"rate": "2.0 MB/s, 1.50 M tokens/s"}
        bar.update(20_000_000, 20_000_000)  # what comes now takes a time that nobody knows
        assert (task.description, task.total, task.fields) == ("training", None, {"rate": ""})
    assert not shown.live.is_started
    with ByteProgress("merging") as bar:
        bar.update(7, 7)
        assert bar._bar is not None and bar._bar.tasks[0].completed == bar._bar.tasks[0].total == 7


def test_quiet_says_nothing(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for screen in (sys.stderr, Screen()):
        monkeypatch.setattr(sys, "stderr", screen)
        with ByteProgress("tokenizing", quiet=True) as bar:
            clock.now += 60
            bar.update(1, 2)
        assert bar._bar is None
    assert screen.getvalue() == capsys.readouterr().err == ""  # type: ignore[union-attr]
