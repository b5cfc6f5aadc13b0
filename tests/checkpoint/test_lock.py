"""The lock of a folder when it is not as a job leaves it: empty, odd, unreadable, removed, made twice."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from megallama.checkpoint import disk
from megallama.checkpoint import folder as folders
from megallama.checkpoint.disk import CheckpointError
from megallama.checkpoint.folder import FolderLock
from tests.checkpoint.states import make_config, make_manager, make_state, solo_shards

ODD = {
    "empty": b"",
    "binary": b"\x00\xff\x00" * 20,
    "a list": b"[1]",
    "a number": b"7",
    "nested": b"[" * 50_000,
    "no pid": json.dumps({"machine": folders._machine(), "process": "1"}).encode(),
    "a pid in words": json.dumps({"machine": folders._machine(), "process": "1", "pid": "seven"}).encode(),
    "a process that is a list": json.dumps({"machine": folders._machine(), "process": [1], "pid": 7}).encode(),
    "huge": b"x" * 3_000_000,
}


def selected(folder: Path, lease: float = 0.2) -> tuple[float, list[str]]:
    """Take the lock: (seconds, log)."""
    log: list[str] = []
    since, held = time.monotonic(), FolderLock(folder, log.append, lease)
    held.acquire()
    seconds = time.monotonic() - since
    held.check()
    held.release()
    assert not any(p.name.startswith("lock") for p in folder.iterdir() if p.is_file())
    return seconds, log


@pytest.mark.parametrize("what", ODD)
def test_what_names_no_job_is_watched_for_a_lease_and_then_taken_over(tmp_path: Path, what: str) -> None:
    (tmp_path / "lock").write_bytes(ODD[what])
    busy = time.process_time()
    seconds, log = selected(tmp_path)
    assert 0.2 <= seconds and time.process_time() - busy < 0.5
    assert len(log) == 2 and log[0].startswith("waiting up to 0.2 s to see whether ")
    assert log[1].startswith(f"took over the checkpoint folder from an unknown job of user id {os.getuid()} (the lock ")


@pytest.mark.parametrize("what", ["empty", "binary"])
def test_what_names_no_job_but_is_touched_is_respected(tmp_path: Path, what: str) -> None:
    path, stop = tmp_path / "lock", threading.Event()
    path.write_bytes(ODD[what])

    def touch() -> None:
        while not stop.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(CheckpointError, match=r"is in use by an unknown job of user id \d+ .*delete .*/lock"):
            FolderLock(tmp_path, lambda text: None, lease_seconds=30).acquire()
    finally:
        stop.set()
        thread.join()
    assert path.read_bytes() == ODD[what]


def test_one_that_cannot_be_opened_is_watched_for_three_leases(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "lock").write_bytes(b"{}")
    os.chown(tmp_path / "lock", 1234, -1) if os.getuid() == 0 else None
    real = os.open

    def denied(path: object, flags: int, *args: object, **kwargs: object) -> int:
        if str(path).startswith(str(tmp_path / "lock")) and not flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *args, **kwargs)

    log: list[str] = []
    since = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", denied)
        FolderLock(tmp_path, log.append, 0.1).acquire()
    assert time.monotonic() - since >= 0.3 and log[0].startswith("waiting up to 0.3 s")
    assert f"user id {1234 if os.getuid() == 0 else os.getuid()} (the lock cannot be opened)" in log[1]


def test_a_folder_in_its_place_is_moved_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock/notes.txt").write_text("mine")
    _, log = selected(tmp_path, 0.1)
    assert log[0].startswith("waiting up to 0.3 s") and log[2].startswith("what was in the lock's place is now ")
    assert (Path(log[2].split()[-1]) / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("what", ["pipe", "a link to nothing", "a link to itself"])
def test_a_pipe_or_a_link_in_its_place_does_not_hang(tmp_path: Path, what: str) -> None:
    if what == "pipe":
        os.mkfifo(tmp_path / "lock")
    else:
        (tmp_path / "lock").symlink_to("nowhere" if "nothing" in what else "lock")
    seconds, log = selected(tmp_path, 0.1)
    assert 0.3 <= seconds < 20 and "(the lock cannot be opened)" in log[1]


def test_it_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    held = FolderLock(tmp_path, print)
    held.acquire()
    held.release()
    assert calls == ["fsync", "link"]


def test_a_link_whose_answer_was_lost_is_ours(tmp_path: Path, monkeypatch) -> None:
    real = os.link

    def twice(source: object, target: object) -> None:
        real(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", twice)
    log: list[str] = []
    held = FolderLock(tmp_path, log.append, 30.0)
    held.acquire()
    held.check()
    assert log == []
    held.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["lock", "folder"])
def test_what_is_removed_while_a_run_holds_it_is_made_again(tmp_path: Path, what: str) -> None:
    log: list[str] = []
    manager = make_manager(tmp_path / "c", make_config(), log=log.append)
    manager.acquire()
    (tmp_path / "c/lock").unlink() if what == "lock" else shutil.rmtree(tmp_path / "c")
    for step in (1, 2):
        manager.save(step, solo_shards(make_state()), {"step": step})
    assert [line for line in log if "was removed while this run holds the folder; it is made again" in line] == log[:1]
    with pytest.raises(CheckpointError, match="in use by job on host"):
        make_manager(tmp_path / "c", make_config()).acquire()
    manager.release()
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["latest", "step-00000001", "step-00000002"]


def test_a_lock_that_cannot_be_read_for_a_while_is_not_lost(tmp_path: Path, monkeypatch) -> None:
    """One save fails, as many as checkpoint.max_failures allows; the folder is not given up."""
    monkeypatch.setattr(disk, "PATIENCE_SECONDS", 0.1)
    log: list[str] = []
    manager = make_manager(tmp_path, make_config(async_save=True, max_failures=1), log=log.append)
    manager.acquire()
    real = os.open

    def broken(path: object, *args: object, **kwargs: object) -> int:
        if str(path).endswith("/lock"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", broken)
        manager.save(1, solo_shards(make_state()), {})
        manager._thread.join()
    manager.save(2, solo_shards(make_state()), {})
    manager.finish()
    assert any("lock cannot be read" in line and "the run goes on" in line for line in log)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000002"]
    manager.release()
