"""The calls below a checkpoint: how long they are patient, and what they make of odd files."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megallama.checkpoint import disk, manager, writer
from megallama.checkpoint.disk import (
    HEAD,
    CheckpointError,
    DamagedError,
    MissingError,
    UnreadableError,
    exists,
    names,
    open_file,
    parse_object,
    patiently,
    read_at,
    read_file,
    read_head,
    write_at,
    write_head,
)
from megallama.checkpoint.manager import CheckpointManager


class Clock:
    """A clock that only sleeping moves; what was slept."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(disk.time, "monotonic", lambda: made.now)
    monkeypatch.setattr(disk.time, "sleep", made.sleep)
    return made


def failing(number: int, times: int = 1 << 30) -> Callable[[Path], str]:
    calls = [0]

    def work(path: Path) -> str:
        calls[0] += 1
        if calls[0] <= times:
            raise OSError(number, os.strerror(number))
        return "read"

    return work


def test_pauses_double_up_to_two_seconds_for_half_a_minute(clock: Clock) -> None:
    with pytest.raises(UnreadableError, match="^/a cannot be read, tried for 31 s: Input/output error$"):
        patiently(failing(errno.EIO), Path("/a"))
    first = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6]
    assert clock.slept == pytest.approx([*first, *[2.0] * 14]) and sum(clock.slept) - 2 < 30 <= sum(clock.slept)


def test_an_error_that_passes_is_waited_for(clock: Clock) -> None:
    assert patiently(failing(errno.EIO, 3), Path("/a")) == "read" and len(clock.slept) == 3


def test_what_will_not_pass_is_said_at_once(clock: Clock) -> None:
    with pytest.raises(UnreadableError, match=f"tried for 0 s: .* for user id {os.geteuid()}; use chmod or chown"):
        patiently(failing(errno.EACCES), Path("/a"))
    for number in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV):
        with pytest.raises(MissingError, match="^/a cannot be opened: "):
            patiently(failing(number), Path("/a"))
    assert clock.slept == []


def test_names_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("")
    (tmp_path / "a").symlink_to("nowhere")
    assert exists(tmp_path / "a") and not exists(tmp_path / "c") and names(tmp_path) == ["a", "b"]
    assert names(tmp_path / "c") == []


def test_a_file_of_another_size_is_looked_at_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, looks = tmp_path / "f", list[Path]()
    path.write_bytes(b"abc")
    plain = disk._open
    monkeypatch.setattr(disk, "_open", lambda p: (looks.append(p), plain(p))[1])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DamagedError, match="has 3 bytes instead of 4"):
        open_file(path, 4)
    assert len(looks) == 2 and len(os.listdir("/proc/self/fd")) == before
    for size in (None, 3):
        fd, found = open_file(path, size)
        os.close(fd)
        assert found == 3
    assert len(looks) == 4


def test_a_file_of_a_kind_has_a_largest_size(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 2000)
    assert read_file(path, 2000) == b"x" * 2000
    with pytest.raises(DamagedError, match="has 2,000 bytes; a file of this kind has at most 1,999"):
        read_file(path, 1999)


@pytest.mark.parametrize(("text", "why"), [(b"[1]", "no JSON object"), (b"[" * 200_000, "nested too deeply")])
def test_what_is_no_object(text: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_object(text)
    assert parse_object(b'{"a": 1}') == {"a": 1}


def test_calls_that_move_only_some_bytes_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_write, plain_read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: plain_write(fd, data[:3], at))
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: plain_read(fd, [parts[0][:4]], at))
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    write_at(fd, memoryview(b"0123456789"), 2)
    out = bytearray(20)
    assert read_at(fd, memoryview(out), 1) == 11 and out[:11] == b"\0" + b"0123456789"
    os.close(fd)


def test_the_head_of_a_copy_is_whole_or_nothing() -> None:
    memory = memoryview(bytearray(HEAD + 8))
    assert read_head(memory) == {}
    write_head(memory, {"step": 3})
    assert read_head(memory) == {"step": 3}
    text = {"a": "x" * (HEAD - 40 - len('{"a": ""}'))}
    write_head(memory, text)
    assert read_head(memory) == text and bytes(memory[HEAD:]) == bytes(8)
    write_head(memory, {"a": text["a"] + "y"})  # is too long and is not said
    assert read_head(memory) == text
    for at in (0, 8, 39, 40, HEAD - 1):
        memory[at] ^= 1
        assert read_head(memory) == {}, at
        memory[at] ^= 1
    assert read_head(memory) == text


def test_only_a_file_with_bytes_is_given_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked = [errno.EINTR, 0], list[tuple[Any, ...]]()

    def fallocate(fd: int, mode: int, at: ctypes.c_int64, size: ctypes.c_int64) -> int:
        asked.append((mode, at.value, size.value))
        number = answers.pop(0)
        ctypes.set_errno(number)
        return -1 if number else 0

    monkeypatch.setattr(writer, "fallocate", fallocate)
    with (tmp_path / "f").open("wb") as file:
        writer._allocate(file.fileno(), 0)
        assert asked == []
        writer._allocate(file.fileno(), 5)
        assert asked == [(0, 0, 5)] * 2 and os.fstat(file.fileno()).st_size == 0
        answers += [errno.EOPNOTSUPP]
        writer._allocate(file.fileno(), 5)
        assert os.fstat(file.fileno()).st_size == 5
        answers += [errno.EIO]
        with pytest.raises(OSError, match="Input/output error"):
            writer._allocate(file.fileno(), 5)


def test_what_is_written_is_flushed_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, gate = list[str](), threading.Event()

    def sync(path: Path) -> None:
        gate.wait(10)
        synced.append(path.name)

    monkeypatch.setattr(writer, "sync", sync)
    with writer.Flusher([tmp_path / "b", tmp_path / "a"]) as flusher:
        flusher.wrote(writer.FLUSH_BYTES - 1)
        assert flusher._flushes == []
        flusher.wrote(1)
        assert len(flusher._flushes) == 1
        flusher.wrote(writer.FLUSH_BYTES)
        assert len(flusher._flushes) == 1, "one after the other"
        gate.set()
        flusher.finish()
        assert synced == ["a", "b"]
        flusher.wrote(1)  # with those of before it is due
        assert len(flusher._flushes) == 2


def test_other_errors_than_want_of_room_pass(tmp_path: Path) -> None:
    content = writer.Content(tmp_path / "step-1", {}, {}, {}, 8)
    for number in (errno.EIO, errno.EACCES, errno.ENOSPC):
        with pytest.raises(CheckpointError if number == errno.ENOSPC else OSError), writer.explained(content):
            raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("left", [False, True])
def test_a_save_is_waited_for_and_hardly_where_ranks_have_left(monkeypatch: pytest.MonkeyPatch, left: bool) -> None:
    saver, end = CheckpointManager.__new__(CheckpointManager), threading.Event()
    saver._thread = threading.Thread(target=end.wait, args=(20,), daemon=True)
    saver._thread.start()
    monkeypatch.setattr(manager, "GRACE_SECONDS", 0.2)
    began = time.monotonic()
    saver.wait(0.8, lambda: not left)
    passed = time.monotonic() - began
    assert (0.15 < passed < 0.7) if left else (0.75 < passed < 5), passed
    end.set()
    began = time.monotonic()
    saver.wait(15)
    assert time.monotonic() - began < 5 and not saver._thread.is_alive()
