"""What one rank meets, as the others see it: deaths, signals, mistakes and bugs before training, storms after it."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.ranks import Ranks

HOST = socket.gethostname()


@pytest.mark.parametrize("fault", ["dies_before_the_groups", "dies_between_the_groups"])
def test_a_rank_that_dies_while_setting_up_is_named_within_seconds(tmp_path: Path, fault: str) -> None:
    began = time.monotonic()
    ranks = Ranks(3, ["batch.global_batch_size=6"], tmp_path, fault, victim=1)
    assert ranks.wait() == [1, 9, 1]
    assert time.monotonic() - began < 30  # of the 1,800 s that setting up may last
    assert f"error: rank 1 ({HOST}) has left without a word: killed" in ranks.said(0)
    assert "Traceback" not in ranks.said(0) + ranks.said(2)


@pytest.mark.parametrize(
    ("size", "fault", "name"),
    [
        (1, "asked_before_anything", "SIGUSR2"),
        (1, "asked_while_data_are_opened", "SIGHUP"),
        (2, "asked_before_anything", "SIGUSR2"),
        (2, "asked_before_the_groups", "SIGTERM"),
        (2, "asked_while_data_are_opened", "SIGHUP"),
    ],
)
def test_a_signal_to_one_rank_before_training_ends_all_with_75(
    tmp_path: Path, size: int, fault: str, name: str
) -> None:
    began = time.monotonic()
    ranks = Ranks(size, [], tmp_path, fault, victim=size - 1)
    assert ranks.wait() == [75] * size
    assert time.monotonic() - began < 30
    assert f"stopped before training began: {name}" in ranks.said(0) and "Traceback" not in ranks.said(0)
    assert not list((tmp_path / "run").rglob("step-*")) and not list((tmp_path / "run").rglob("lock"))


def test_a_second_run_at_the_address_of_a_first_is_refused_and_does_not_end_it(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    first = Ranks(2, ["train.steps=1000000"], folders[0])
    first.until("step 3/")
    second = Ranks(2, ["run.init_timeout_seconds=20"], folders[1], env={"MASTER_PORT": first.port})
    assert second.wait() == [2, 2]
    assert f"port {first.port} of 127.0.0.1 is taken" in second.said(0)
    assert f"error: rank 1 ({HOST}) came to 127.0.0.1, where all 2 ranks of a run have arrived" in second.said(1)
    os.kill(first.processes[0].pid or 0, signal.SIGUSR1)
    assert first.wait() == [75, 75]


def test_a_storm_of_signals_during_and_after_the_save_still_ends_with_75(tmp_path: Path) -> None:
    ranks = Ranks(2, ["train.steps=1000000"], tmp_path)
    ranks.until("step 3/")
    for _ in range(60):
        for process in ranks.processes:
            with suppress(ProcessLookupError):  # it may leave at any moment
                if process.is_alive():
                    os.kill(process.pid or 0, signal.SIGTERM)
        time.sleep(0.01)
    assert ranks.wait() == [75, 75]
    assert "saved at step" in ranks.said(0)


def test_a_mistake_of_one_rank_is_said_there_and_named_by_rank_0(tmp_path: Path) -> None:
    ranks = Ranks(2, [], tmp_path, "has_no_file", victim=1)
    assert ranks.wait() == [2, 2]
    text = "cannot read the configuration /nope/my.toml: No such file or directory"
    assert ranks.said(1).startswith(f"error: {text}") and ranks.said(0).startswith(f"error: rank 1 ({HOST}): {text}")


def test_a_mistake_of_all_ranks_is_said_once(tmp_path: Path) -> None:
    ranks = Ranks(2, ["optimizer.lr=-1"], tmp_path)
    assert ranks.wait() == [2, 2]
    assert ranks.said(0).startswith("error: command line: optimizer.lr=-1 must be") and ranks.said(1) == ""


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("has_a_bug", "KeyError: 'no such key'"),
        ("has_a_bad_disk", "OSError: [Errno 5] Input/output error: '/data/web.bin'"),
    ],
)
def test_what_is_no_mistake_has_status_1_and_its_traceback_in_the_log_of_its_rank(
    tmp_path: Path, fault: str, text: str
) -> None:
    ranks = Ranks(2, ["parallel.tp=2"], tmp_path, fault, victim=1)
    assert ranks.wait() == [1, 1]
    logs = tmp_path / "run" / "logs"
    own, other = ((logs / f"rank-000{rank}.log").read_text() for rank in (1, 0))
    assert "Traceback" in own and text in own and "Traceback" not in other
    last = (tmp_path / "run" / "run.log").read_text().splitlines()[-1]
    assert "error: " in last and text in last and f"rank 1 on {HOST}" in last
    assert text in ranks.said(0) and "Traceback" not in ranks.said(0)


def on_a_terminal(folder: Path, steps: int, *, controlling: bool) -> int | None:
    """The status of a run whose terminal goes away after its first steps."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    arguments = [f"train.steps={steps}", "run.peak_tflops=1"]
    ranks = Ranks(1, arguments, folder, terminal=os.ttyname(theirs), controlling=controlling)
    log, deadline = folder / "run" / "run.log", time.monotonic() + 60
    while not (log.exists() and "step 3/" in log.read_text()):
        with suppress(BlockingIOError):
            os.read(ours, 1 << 16)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.close(theirs)
    os.close(ours)
    return ranks.wait()[0]


def test_a_terminal_that_is_gone_does_not_end_a_run(tmp_path: Path) -> None:
    """Its output has nowhere to go; the run finishes, with its status, and its files are whole."""
    assert on_a_terminal(tmp_path, 300, controlling=False) == 0
    text = (tmp_path / "run" / "run.log").read_text()
    assert "step 300/300" in text and "finished: 300 steps" in text


def test_a_terminal_that_is_closed_saves_the_run(tmp_path: Path) -> None:
    assert on_a_terminal(tmp_path, 1_000_000, controlling=True) == 75
    assert "stopped: SIGHUP on 1 rank; saved at step" in (tmp_path / "run" / "run.log").read_text()
