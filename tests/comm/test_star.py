"""The star: values gathered on rank 0, news for all, and who has gone; ranks are threads, connections are real."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from megallama.comm.group import ContactLost
from megallama.comm.rendezvous import CRASHED, SAVED, Star, StarGroup


class Heard:
    """A listener that only remembers."""

    def __init__(self) -> None:
        self.tells: list[Callable[[str], None]] = []
        self.left: list[tuple[str, int]] = []

    def listen(self, tell: Callable[[str], None]) -> None:
        self.tells.append(tell)

    def leave(self, why: str, status: int) -> None:
        self.left.append((why, status))

    def before_leaving(self, act: Callable[[str, int], None]) -> None:
        """Nothing is done before."""


def stars(size: int, listeners: list[Any] | None = None) -> list[Star]:
    made = [Star(r, size, f"node{r}", listeners[r] if listeners else None) for r in range(size)]
    port = made[0].open(loopback=True)
    made[0].attend()
    for star in made[1:]:
        star.token = made[0].token
        star.connect("127.0.0.1", port, {"rank": star.rank, "host": f"node{star.rank}"}, 10)
        star.attend()
    while len(made[0].names) < size:
        time.sleep(0.01)
    return made


def close(made: list[Star]) -> None:
    for star in reversed(made):
        star.close()


def together(made: list[Star], work: Callable[[StarGroup], Any], seconds: float = 20.0) -> list[Any]:
    """`work` with every rank's group, at once; results or errors."""
    results: list[Any] = [None] * len(made)

    def body(rank: int) -> None:
        try:
            results[rank] = work(StarGroup(made[rank], "values", timedelta(seconds=seconds)))
        except Exception as error:  # noqa: BLE001 - looked at by the test
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(len(made))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_program_that_ends_without_closing_is_not_held_by_its_star() -> None:
    made = stars(2)
    held = [star._thread for star in made if not star._thread.daemon]  # for these Python would wait
    close(made)
    assert held == []


def test_values_are_gathered_in_rank_order_round_after_round() -> None:
    made = stars(4)

    def work(group: StarGroup) -> list[Any]:
        return [group.gather_values({"rank": group.rank, "round": i, "text": "x" * 100_000 * i}) for i in range(3)]

    want = [[{"rank": r, "round": i, "text": "x" * 100_000 * i} for r in range(4)] for i in range(3)]
    assert together(made, work) == [want] * 4
    close(made)


def test_what_rank_0_makes_of_the_values_is_all_that_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made, sent = stars(3), []
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda value: sent.append(dumps(value)) or dumps(value))
    digests = ["d" * 64] * 2000
    messages = together(made, lambda group: group.gather_values(digests, lambda values: sum(map(len, values))))
    assert messages == [6000] * 3
    assert {text for text in sent if text.startswith('["group values", 6000')} == {'["group values", 6000]'}
    close(made)


def test_a_rank_that_dies_is_named_to_all_who_wait() -> None:
    heard = [Heard() for _ in range(4)]
    made = stars(4, heard)
    link = next(iter(made[2]._links)).get_extra_info("socket")
    threading.Timer(0.3, lambda: link.shutdown(socket.SHUT_RDWR)).start()
    began = time.monotonic()
    messages = together([made[0], made[1], made[3]], lambda group: group.gather_values(1), seconds=60)
    assert time.monotonic() - began < 10
    text = "rank 2 (node2) has left without a word: killed, or ended outside Python"
    assert [(type(error), str(error)) for error in messages] == [(ContactLost, text)] * 3
    until(lambda: all(heard[rank].left for rank in (0, 1, 3)))
    assert heard[0].left == heard[1].left == heard[3].left == [(text, CRASHED)]
    close(made)


def test_without_rank_0_the_others_know_it_too() -> None:
    made = stars(3)
    made[0].expected = 0
    links = [*made[0]._links]  # cut at once: rank 0 must not tell one of the other
    made[0]._loop.call_soon_threadsafe(lambda: [link.transport.abort() for link in links])
    assert all(star.first(10) == ("rank 0 has left without a word: killed, or ended outside Python", 1)
               for star in made[1:])  # fmt: skip
    close(made)


def test_the_first_reason_reaches_all_and_who_leaves_by_itself_is_left_alone() -> None:
    heard = [Heard() for _ in range(3)]
    made = stars(3, heard)
    heard[1].tells[0]("SIGTERM")
    until(lambda: all(listener.left for listener in heard))
    made[2].end("another", CRASHED)
    assert [star.first(10) for star in made] == [("SIGTERM on rank 1 (node1)", SAVED)] * 3
    assert all(listener.left == [("SIGTERM on rank 1 (node1)", SAVED)] for listener in heard)
    close(made)
    heard = [Heard() for _ in range(2)]
    made = stars(2, heard)
    made[1].end("rank 1 (node1) failed first: disk full", 2, own=True)
    until(lambda: heard[0].left)
    assert made[1].first(10) == ("rank 1 (node1) failed first: disk full", 2) and heard[1].left == []
    close(made)


def test_who_leaves_has_not_died_and_who_does_not_answer_is_named() -> None:
    made = stars(3)
    late = together(made[:2], lambda group: group.gather_values(1), seconds=0.3)
    assert str(late[0]) == "timed out after 0.3 s waiting for rank 2 in group values"
    assert str(late[1]) == "timed out after 0.3 s waiting for rank 0 in group values"
    made.pop().close()
    until(lambda: made[0].left and made[1].left)
    assert made[0].first(0.1) is None
    assert "has left" in str(together(made, lambda group: group.gather_values(1))[1])
    close(made)


def test_who_leaves_is_not_told_that_the_other_end_closes() -> None:
    heard = [Heard() for _ in range(3)]
    made = stars(3, heard)
    for star in reversed(made):
        star.close()
    assert [listener.left for listener in heard] == [[], [], []] and made[0].left == [2, 1]


def test_strangers_are_not_admitted() -> None:
    made = stars(2)
    port = made[0]._door.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    wrong = b'["arrivals", {"rank": 1, "token": "no"}]\n'
    bad = (b"GET / HTTP/1.0\r\n\r\n", b'["arrivals", {}]\n', wrong, b"\0" * 99 + b"\n", b"")
    for words in bad:
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(10)
            assert stranger.recv(100) == b""
    assert together(made, lambda group: group.gather_values(group.rank)) == [[0, 1]] * 2
    close(made)


def test_rank_0_that_ends_before_others_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that is still open is given up without a traceback."""
    monkeypatch.setattr("megallama.comm.rendezvous._PATIENCE", 0.1)
    made = stars(2)
    made[0].close()
    made[1].close()
    assert [record.getMessage() for record in caplog.records] == []
