"""Who keeps the copies of ranks: the files, what is gone on from, and the way to a buddy and back."""

from __future__ import annotations

import fcntl
import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megallama.checkpoint.disk import HEAD, read_head, write_head
from megallama.comm.flight_record import ASKED, BUDDY, COPIED
from megallama.recovery import copy_files
from megallama.recovery.copy_files import CopyFiles, is_over, name_of, tidy, why_not
from megallama.recovery.flight_reader import FlightReader
from megallama.recovery.keeper import Keeper, buddy_of

SIZE = 2 * (HEAD + (5 << 20))  # two copies, each of which goes in two pieces


class One:
    """A rank on a host of its own: its keeper, and what its trainer does."""

    def __init__(self, rank: int, folder: Path, ranks: int = 2, token: str = "secret") -> None:
        self.rank, self.folder, self.shm = rank, folder, folder / f"shm{rank}"
        self.shm.mkdir(exist_ok=True)
        self.record, self.said = FlightReader(), list[str]()
        self.keeper = Keeper(self.record, self.said.append, CopyFiles(self.shm))
        hosts = [*range(ranks)]
        self.about: dict[str, Any] = {"rank": rank, "host_of": hosts, "hosts": [f"host{h}" for h in hosts]}
        self.about |= {"address": "127.0.0.1", "seats": hosts, "token": token}
        self.key = {"folder": str(folder), "ranks": ranks, "rank": rank, "config": "c"}
        self.question = {"do": "meet", "rate": 1e3, "chain": "x", "newest": None, "resume": "auto", "ends": []}

    def ask(self, **question: Any) -> dict[str, Any]:
        self.record.tell("asked", question)
        self.record.words[ASKED] += 1
        self.keeper.look(self.about)
        until(lambda: self.record.words[ASKED] == self.record.words[ASKED + 1])
        answer: dict[str, Any] = self.record.told("answer")
        return answer

    def open(self, size: int = SIZE, listens: bool = True) -> dict[str, Any]:
        return self.ask(do="open", key=self.key, size=size, listens=listens)

    def meet(self, **other: Any) -> dict[str, Any]:
        return self.ask(**(self.question | other))

    def file(self, name: str = "") -> Path:
        return self.shm / name_of(str(self.folder), name or str(self.rank))

    def slots(self) -> list[memoryview]:
        return self.keeper._own()

    def copy(self, step: int, chain: str = "x", after: tuple[int | None, ...] = (None,), slot: int = -1) -> bytes:
        """Make a copy as a trainer does; its data."""
        data = random.Random(step).randbytes(SIZE // 2 - HEAD)
        place = self.slots()[step % 2 if slot < 0 else slot]
        place[:8] = bytes(8)
        place[HEAD:] = data
        write_head(place, {"key": self.key, "chain": chain, "step": step, "after": after})
        self.record.words[COPIED] = step + 1
        return data

    def sent(self) -> None:
        until(lambda: self.record.words[BUDDY] == self.record.words[COPIED])


def until(done: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[One, One]]:
    """Two ranks on two hosts that have met."""
    ranks = One(0, tmp_path), One(1, tmp_path)
    ends = [one.open()["end"] for one in ranks]
    for one in ranks:
        one.question["ends"] = ends
        who = f"rank {1 - one.rank} (host{1 - one.rank}, 127.0.0.1:{ends[1 - one.rank][1]})"
        assert one.meet()["notes"] == [f"copies in memory go to {who}, at most 1000 GB/s; it keeps as much"]
    yield ranks
    for one in ranks:
        one.keeper.leave(0)
        assert [*one.shm.iterdir()] == []


def test_the_newest_copy_is_with_the_buddy_and_comes_back(pair: tuple[One, One]) -> None:
    first, second = pair
    for step in (1, 2, 3):
        data = first.copy(step)
        first.sent()
    theirs = second.file("0-buddy")
    assert theirs.stat().st_mode & 0o777 == 0o600
    halves = [theirs.read_bytes()[at : at + SIZE // 2] for at in (0, SIZE // 2)]
    assert sorted(read_head(memoryview(half))["step"] for half in halves) == [2, 3]
    assert data in theirs.read_bytes()
    for slot in first.slots():
        slot[:] = bytes(len(slot))
    first.keeper._notes.clear()
    met = first.meet()
    assert met["own"] == [[3, 0], [2, 1]]
    where = f"taken from rank 1 (host1, 127.0.0.1:{first.question['ends'][1][1]})"
    assert met["notes"][1:] == [f"the copy of step {step} in memory is not here: {where}" for step in (3, 2)]
    assert bytes(first.slots()[0][HEAD:]) == data and read_head(first.slots()[0])["step"] == 3
    first.slots()[0][HEAD + 100] ^= 4  # one block alone
    found = first.ask(do="fetch", step=3, slot=0, spans=[(HEAD + 64, 64)])
    assert found == {"problem": "", "from": where}
    assert bytes(first.slots()[0][HEAD:]) == data
    assert first.ask(do="fetch", step=9, slot=1, spans=[])["problem"] == "nobody else has it"
    first.slots()[1][:8] = bytes(8)
    assert first.meet()["own"] == [[3, 0], [2, 1]]  # one that is missing


def test_what_is_sent_never_replaces_the_only_whole_copy(pair: tuple[One, One]) -> None:
    """A connection that is lost in the middle: the copy before is there; and it is met again, and told."""
    first, second = pair
    for step in (1, 2):
        first.copy(step)
        first.sent()
    first.keeper._meeting["rate"] = 0.01
    data = first.copy(3)
    far = second.keeper._files.opened[second.file("0-buddy").name][1]
    until(lambda: data[:8] in (far[HEAD : HEAD + 8], far[SIZE // 2 + HEAD : SIZE // 2 + HEAD + 8]))
    second.keeper._door._peers["0"].shutdown(socket.SHUT_RDWR)
    until(lambda: first.record.words[BUDDY] == -1)  # nobody waits for it
    steps = [read_head(memoryview(far)[at : at + SIZE // 2]).get("step") for at in (0, SIZE // 2)]
    assert {*steps} == {2, None} and first.said == []
    first.keeper._meeting["rate"], first.keeper._next = 1e3, 0.0
    first.sent()
    assert len(first.said) == 1 and "go to rank 1 (host1, 127.0.0.1:" in first.said[0] and "again" in first.said[0]
    steps = [read_head(memoryview(far)[at : at + SIZE // 2]).get("step") for at in (0, SIZE // 2)]
    assert {*steps} == {2, 3}


def test_no_faster_than_the_rate(pair: tuple[One, One]) -> None:
    first, _ = pair
    first.meet(rate=0.05)
    began = time.monotonic()
    first.copy(1)
    first.sent()
    assert time.monotonic() - began > SIZE / 2 / 0.05e9


def test_a_buddy_that_is_not_there_is_said_and_nobody_waits(tmp_path: Path) -> None:
    one = One(0, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    one.open()
    met = one.meet(ends=[None, ["127.0.0.1", port]])
    assert met["problem"] == "" and one.record.words[BUDDY] == -1
    assert met["notes"][1].startswith("warning: copies in memory are here alone: rank 1 (host1, 127.0.0.1:")
    assert one.ask(do="fetch", step=1, slot=0, spans=[])["problem"] == "nobody else has it"
    one.copy(1)
    one.keeper._next = 0.0
    until(lambda: one.said)
    assert "is not reached" in one.said[0]
    one.keeper.leave(0)


def test_a_stranger_gets_nothing(pair: tuple[One, One]) -> None:
    first, second = pair
    for hello in ({"token": "wrong", "who": 0, "size": 10}, {"who": 0}, []):
        with socket.create_connection(tuple(first.question["ends"][1])) as peer:
            peer.sendall(json.dumps(hello).encode() + b"\n[0, 0, 8]\n")
            with_nothing = b""
            try:
                with_nothing = peer.recv(100)
            except ConnectionResetError:
                pass
            assert with_nothing == b""
    with socket.create_connection(tuple(first.question["ends"][1])) as peer, peer.makefile("rwb") as stream:
        stream.write(json.dumps({"token": "secret", "who": 7, "size": SIZE}).encode() + b"\n")
        stream.flush()
        assert stream.readline() == b'""\n'
        stream.write(json.dumps([SIZE + 4090, 0, 100]).encode() + b"\n")  # beyond its end
        stream.flush()
        assert stream.read() == b""
    del second


def test_why_a_copy_is_not_gone_on_from(tmp_path: Path) -> None:
    one = One(0, tmp_path)
    one.open(listens=False)
    one.copy(7, after=(None, 5))
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "it was made after the checkpoint of step 5, and the newest is of step None"),
        ({"newest": 5}, ""),
        ({"newest": 4}, "it was made after the checkpoint of step 5, and the newest is of step 4"),
        ({"newest": 7}, "the checkpoint of step 7 is as new"),
        ({"newest": 9}, "the checkpoint of step 9 is as new"),
        ({"newest": 5, "resume": "fresh"}, "checkpoint.resume=fresh"),
        ({"newest": 5, "chain": "y"}, "the run has gone on from somewhere else since"),
        ({"newest": 5, "chain": ""}, "the run has gone on from somewhere else since"),
    ]
    cases[0] = ({}, "")  # `after` has None: there was no checkpoint yet
    for how, why in cases:
        one.keeper._notes.clear()
        met = one.meet(**how)
        assert met["own"] == ([] if why else [[7, 1]]), how
        assert met["notes"] == ([f"the copy of step 7 in memory is not used: {why}"] if why else []), how
    said = read_head(one.slots()[1])
    for name, value in {"ranks": 4, "config": "d", "folder": "/else"}.items():
        why = why_not(said, one.key | {name: value}, one.question | {"newest": 5})
        assert why == f"its {name} was {one.key[name]} and is {value}"
    one.keeper.leave(0)


def test_files_outlive_their_process_unless_all_is_done(tmp_path: Path) -> None:
    one = One(0, tmp_path)
    one.open(listens=False)
    data = one.copy(3)
    one.keeper.leave(4)
    assert one.file().exists() and one.file().stat().st_mode & 0o777 == 0o600
    os.close(one.keeper._files.opened.pop(one.file().name)[0])  # the process has gone
    again = One(0, tmp_path)
    again.open(listens=False)
    assert again.meet()["own"] == [[3, 1]] and bytes(again.slots()[1][HEAD:]) == data
    again.keeper.leave(75)  # before a step
    assert again.file().exists()
    again.keeper.leave(0)
    assert not again.file().exists()
    assert [is_over({"status": status, "step": step}) for status in (0, 75, 4, -9) for step in (0, 3)] == [
        True, True, False, True, False, False, False, False,
    ]  # fmt: skip


def test_two_processes_never_share_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_files, "_BUSY", 0.1)
    one, other = One(0, tmp_path), One(0, tmp_path)
    one.open(listens=False)
    one.copy(3)
    other.open(listens=False)
    assert other.keeper._notes == [
        f"warning: copies in memory have no name, and do not outlive their supervisor: {one.file()}: another process "
        "has it"
    ]
    assert other.meet()["own"] == [] and one.meet()["own"] == [[3, 1]]
    other.keeper.leave(0)
    assert one.file().exists()
    one.keeper.leave(0)


def test_a_file_that_others_may_open_is_not_taken(tmp_path: Path) -> None:
    one = One(0, tmp_path)
    one.file().write_bytes(bytes(100))
    one.file().chmod(0o666)
    one.open(listens=False)
    assert "it is not this user's alone" in one.keeper._notes[0]
    assert one.file().stat().st_size == 100
    one.file().unlink()
    (one.folder / "target").write_bytes(b"precious")
    one.file().symlink_to(one.folder / "target")
    other = One(0, tmp_path)
    other.open(listens=False)
    assert "have no name" in other.keeper._notes[0]
    assert (one.folder / "target").read_bytes() == b"precious"


def test_where_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In /dev/shm: a file without a name. In memory: none, and nothing is left behind."""
    real = os.statvfs

    class Full:
        f_bavail, f_frsize = 1000, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full())
    one = One(0, tmp_path)
    text = f"{one.file()}: 4,096,000 bytes are free of {SIZE + 4096:,} needed"
    one.open(listens=False)
    assert text in one.keeper._notes[0] and not one.file().exists()
    one.copy(3)
    assert one.meet()["own"] == [[3, 1]]
    monkeypatch.setattr(os, "statvfs", real)
    monkeypatch.setattr(copy_files, "free_memory", lambda: 4096)
    other = One(1, tmp_path)
    assert f"{SIZE + 4096:,} bytes are needed, and 4,096 are free" in other.open(listens=False)["problem"]
    assert [*other.shm.iterdir()] == []


def test_a_start_removes_what_is_over_and_nothing_else(tmp_path: Path) -> None:
    shm = tmp_path / "shm"
    shm.mkdir()
    endings: dict[str, Any] = {
        "done": {"status": 0, "step": 9}, "saved": {"status": 75, "step": 9}, "early": {"status": 75, "step": 0},
        "failed": {"status": 4, "step": 9}, "lives": None, "gone": None, "held": {"status": 0, "step": 9},
    }  # fmt: skip
    for name, ending in endings.items():
        folder = tmp_path / name
        path = shm / name_of(str(folder), "0")
        path.write_bytes(bytes(8192) + str(folder).encode().ljust(4096, b"\0"))
        if name != "gone":
            folder.mkdir()
        if ending:
            (folder / "exit.json").write_text(json.dumps(ending))
    (shm / "other").write_bytes(b"")
    with open(shm / name_of(str(tmp_path / "held"), "0"), "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        said = tidy(shm)
    left = {name for name in endings if (shm / name_of(str(tmp_path / name), "0")).exists()}
    assert left == {"early", "failed", "lives", "held"} and (shm / "other").exists()
    assert sorted(line.partition(": ")[2] for line in said) == sorted(
        [f"the run in {tmp_path / name} is over" for name in ("done", "saved")]
        + [f"the run in {tmp_path / 'gone'} is gone"]
    )


def test_the_buddy_has_the_same_place_on_the_next_host() -> None:
    assert [buddy_of(rank, [0, 0, 1, 1, 2, 2]) for rank in range(6)] == [2, 3, 4, 5, 0, 1]
    assert [buddy_of(rank, [0, 1, 0, 1]) for rank in range(4)] == [1, 0, 3, 2]
    assert [buddy_of(rank, [0, 0, 2, 2]) for rank in range(4)] == [2, 3, 0, 1]  # host 1 is lost
    assert [buddy_of(rank, [0, 0, 0, 1, 1]) for rank in range(5)] == [3, 4, 3, 0, 1]
