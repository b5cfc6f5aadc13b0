"""The count of starts that end before a step is finished: what counts, what ends it, and a file that is no good."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from megallama.checkpoint.disk import CheckpointError
from megallama.checkpoint.folder import FolderLock
from megallama.checkpoint.starts import Starts
from megallama.config.schema import Config
from megallama.plan.topology import Topology
from tests.checkpoint.states import make_config, make_state, save_on
from tests.small import small_config

HOST = re.escape(socket.gethostname())
KILLED = "killed, or its machine died: it left no word"


class Run:
    """One run that is started again and again in a folder."""

    def __init__(self, folder: Path, ranks: int = 2, **sections: Any) -> None:
        self.folder, self.log, self._ranks = folder, list[str](), ranks
        self.config: Config = small_config(**sections)

    def start(self, *ends: tuple[str, int]) -> Starts:
        """One more, which ends so; without `ends` it is killed."""
        lock = FolderLock(self.folder, self.log.append)
        lock.acquire()
        try:
            starts = Starts(lock, self.config, self._ranks)
            starts.begin()
            for why, status in ends:
                starts.over(why, status)
            return starts
        finally:
            lock.release()

    def ends(self) -> list[str]:
        path = self.folder / "starts.json"
        return [start["end"] for start in json.loads(path.read_text())["starts"]] if path.exists() else []


def test_after_three_that_were_killed_none_begins_and_nothing_changes(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for _ in range(3):
        run.start()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError) as refused:
        run.start()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and list(before) == ["starts.json"]
    first, *rest = str(refused.value).splitlines()
    assert first == (
        "3 starts in a row ended before a step was finished (run.max_failed_starts=3; 0 starts without limit); mend "
        f"the cause, then delete {tmp_path}/starts.json; another configuration or number of ranks is counted anew:"
    )
    for line, end in zip(rest, [KILLED, KILLED, KILLED], strict=True):
        assert re.fullmatch(rf"  \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d on {HOST}, after step 0: {end}", line)
    assert refused.value.status == 2
    assert [line.partition(", the last at")[0] for line in run.log] == [
        "warning: 1 start in a row ended before a step was finished",
        "warning: 2 starts in a row ended before a step was finished",
    ]
    (tmp_path / "starts.json").unlink()
    run.start()
    assert run.ends() == ["running"]


@pytest.mark.parametrize(("most", "starts"), [(0, 120), (1, 1), (5, 5)])
def test_the_limit_is_a_setting_and_0_is_none(tmp_path: Path, most: int, starts: int) -> None:
    run = Run(tmp_path, run={"max_failed_starts": most})
    for _ in range(starts):
        run.start()
    if most:
        with pytest.raises(CheckpointError, match=f"run.max_failed_starts={most}"):
            run.start()
    assert run.ends() == [KILLED] * (min(starts, 100) - 1) + ["running"]


def test_the_limit_itself_does_not_begin_a_new_count(tmp_path: Path) -> None:
    for _ in range(3):
        Run(tmp_path).start()
    more = Run(tmp_path, run={"max_failed_starts": 4})
    more.start()
    with pytest.raises(CheckpointError, match="4 starts in a row"):
        more.start()


@pytest.mark.parametrize("status", [2, 75])
def test_a_start_that_stops_as_asked_or_refuses_does_not_count(tmp_path: Path, status: int) -> None:
    run = Run(tmp_path)
    for _ in range(5):
        run.start(("SIGTERM", status))
        assert not (tmp_path / "starts.json").exists()
    run.start(("RuntimeError: a GPU is lost\nand more", 1))
    for _ in range(5):
        run.start(("SIGTERM", status))
    assert run.ends() == ["RuntimeError: a GPU is lost"]
    run.start(("rank 3 (node7) failed first: ValueError: no\n", 4))
    run.start()
    with pytest.raises(CheckpointError) as refused:
        run.start()
    ends = ["RuntimeError: a GPU is lost", "rank 3 (node7) failed first: ValueError: no", KILLED]
    assert [line.partition("after step 0: ")[2] for line in str(refused.value).splitlines()[1:]] == ends


def test_one_that_was_asked_to_stop_and_then_killed_does_not_count_but_one_that_then_fails_does(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for _ in range(4):
        run.start(("SIGTERM", 75))
    run.start(("SIGTERM", 75), ("", 75))  # asked, and then it ended so
    run.start(("SIGTERM", 75), ("RuntimeError: no", 1))
    assert run.ends() == ["RuntimeError: no"] and run.log == []


def test_a_finished_step_empties_the_count_and_what_comes_after_is_not_told(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start()
    run.start(("RuntimeError: no", 1))
    starts = run.start()
    starts.over()
    assert [*tmp_path.iterdir()] == []
    starts.over()
    starts.over("RuntimeError: later", 4)
    assert [*tmp_path.iterdir()] == []
    for _ in range(3):
        run.start()
    assert run.ends() == [KILLED, KILLED, "running"]


def test_a_run_that_has_all_its_steps_empties_the_count_too(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start(("RuntimeError: no", 1))
    run.start(("", 0))
    assert [*tmp_path.iterdir()] == []


def test_a_start_that_ends_before_it_has_the_lock_is_counted_too(tmp_path: Path) -> None:
    """Its status stays, but that of one too many, which refuses; one that stops as asked or refuses is not counted."""
    run = Run(tmp_path / "checkpoints")

    def early(why: str, status: int) -> int:
        return Starts(FolderLock(run.folder, run.log.append), run.config, 2).ended_early(why, status)

    assert [early("x", status) for status in (0, 2, 75)] == [0, 2, 75] and not run.folder.exists()
    assert [early(f"OSError: {number}\nand more", status) for number, status in enumerate((1, 3, 4))] == [1, 3, 4]
    assert run.ends() == ["OSError: 0", "OSError: 1", "OSError: 2"] and [*run.folder.iterdir()] == [
        run.folder / "starts.json"
    ]
    assert early("OSError: 3", 1) == 2 and run.ends()[-1] == "OSError: 2"
    assert run.log[-1].startswith(f"warning: this start is not counted in {run.folder}/starts.json: 3 starts in a row")
    (run.folder / "starts.json").unlink()
    starts = run.start(("RuntimeError: later", 4))
    assert starts.ended_early("twice", 4) == 4 and run.ends() == ["RuntimeError: later"]
    lock = FolderLock(run.folder, print)
    lock.acquire()
    assert early("OSError: 4", 1) == 1 and run.ends() == ["RuntimeError: later"], "another job may be about to train"
    assert run.log[-1].startswith("warning: this start is not counted")
    lock.release()


def test_without_a_beginning_nothing_is_written(tmp_path: Path) -> None:
    starts = Starts(FolderLock(tmp_path, print), small_config(), 2)
    starts.over("RuntimeError: no", 1)
    starts.over()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(("resume", "step"), [("auto", "7"), ("fresh", "0")])
def test_the_step_that_a_start_goes_on_from_is_said(tmp_path: Path, resume: str, step: str) -> None:
    state = make_state()
    for number in (9, 7):  # the last that was saved is the newest
        save_on(tmp_path, make_config(keep_last=9), state, Topology(), step=number)
    run = Run(tmp_path, checkpoint={"resume": resume}, run={"max_failed_starts": 1})
    run.start()
    with pytest.raises(CheckpointError, match=f", after step {step}: killed"):
        run.start()


OTHER: list[dict[str, Any]] = [{"optimizer": {"lr": 2e-3}}, {"run": {"timeout_seconds": 700}}, {"ranks": 4}]
SAME: list[dict[str, Any]] = [
    {"log": {"interval": 3}}, {"run": {"folder": "elsewhere"}}, {"checkpoint": {"folder": "x"}},
    {"train": {"stop_after_steps": 7, "stop_after_minutes": 3.0}},
]  # fmt: skip


@pytest.mark.parametrize("change", [*OTHER, *SAME], ids=str)
def test_another_configuration_is_counted_anew_but_for_what_is_no_cure(tmp_path: Path, change: dict[str, Any]) -> None:
    for _ in range(3):
        Run(tmp_path).start()
    run = Run(tmp_path, **change)
    if change in OTHER:
        run.start()
        assert run.log == [f"{tmp_path}/starts.json: 3 starts of another configuration, no longer counted"]
        assert run.ends() == ["running"]
    else:
        with pytest.raises(CheckpointError, match="3 starts in a row"):
            run.start()


BAD = {
    "empty": b"", "cut": b'{"starts": [{"time":', "a list": b"[]", "no starts": b"{}", "zeros": b"\0" * 200,
    "starts of nothing": b'{"starts": 3}', "a start of nothing": b'{"starts": [7]}', "no text": b"\xff\xfe\xff",
    "a start cut short": b'{"starts": [{"time": "t"}]}', "deep": b'{"starts": ' + b"[" * 100_000,
    "long": b" " * (1 << 20) + b"{}",
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_is_no_good_never_stops_a_run(tmp_path: Path, what: str) -> None:
    (tmp_path / "starts.json").write_bytes(BAD[what])
    run = Run(tmp_path, run={"max_failed_starts": 1})
    run.start()
    (line,) = run.log
    assert line.startswith(f"warning: {tmp_path}/starts.json is ignored: ") and run.ends() == ["running"]


@pytest.mark.parametrize("what", ["folder", "pipe", "link to itself"])
def test_something_else_in_its_place_never_stops_a_run(tmp_path: Path, what: str) -> None:
    path = tmp_path / "starts.json"
    make: dict[str, Any] = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}
    make.get(what, lambda: path.symlink_to(path.name))()
    run = Run(tmp_path, run={"max_failed_starts": 1})
    run.start().over()
    assert any(line.startswith(f"warning: {path} is ignored: ") for line in run.log) == (what != "link to itself")
    told = [line for line in run.log if line.startswith(f"warning: {path} cannot be written, so this start may be ")]
    assert len(told) == (2 if what == "folder" else 0) and path.is_dir() == (what == "folder")


@pytest.mark.parametrize("call", ["fsync", "rename", "pwrite"])
def test_a_full_disk_never_stops_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    run = Run(tmp_path)
    run.start()
    real = getattr(os, call)

    def full(*args: Any) -> Any:
        named = args[0] if isinstance(args[0], (str, Path)) else os.readlink(f"/proc/self/fd/{args[0]}")
        if "starts.json" in str(named):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        run.start()
    assert run.log[-1] == (
        f"warning: {tmp_path}/starts.json cannot be written, so this start may be counted wrongly: "
        "[Errno 28] No space left on device"
    )
    assert run.ends() == ["running"], "what was there before is whole"
    run.start()
    assert run.ends() == [KILLED, "running"]


def test_it_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    lock = FolderLock(tmp_path, print)
    lock.acquire()
    for name in ("fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    Starts(lock, small_config(), 1).begin()
    lock.release()
    assert calls == ["fsync", "rename", "fsync"]


def test_a_job_that_has_lost_the_folder_does_not_write(tmp_path: Path) -> None:
    run = Run(tmp_path)
    lock = FolderLock(tmp_path, run.log.append)
    lock.acquire()
    starts = Starts(lock, run.config, 2)
    starts.begin()
    (tmp_path / "lock").unlink()
    other = FolderLock(tmp_path, print)
    other.acquire()
    starts.over("RuntimeError: no", 1)
    assert run.ends() == ["running"] and "is no longer ours" in run.log[-1]
    other.release()
    lock.release()
