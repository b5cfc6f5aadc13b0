"""Sockets of supervisors: who is heard, who is a stranger, what a lost link costs."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import pytest

from megallama.recovery.link import Links


def pair() -> tuple[Links, Links]:
    root, other = Links(), Links()
    root.token = other.token = "secret"
    port = root.listen("127.0.0.1")
    assert port > 0
    other.connect("127.0.0.1", port, {"host": 1})
    return root, other


def until(done: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_messages_both_ways() -> None:
    root, other = pair()
    heard: list[object] = []
    other.poll()
    until(lambda: heard.extend(root.poll()) or heard)
    assert heard == [(1, {"host": 1, "token": "secret"})] and 1 in root.heard
    root.send({"verdict": "x" * 300_000})
    other.send({"died": [1, "why"]})
    answers: list[object] = []
    until(lambda: answers.extend(other.poll()) or root.poll() and answers or answers)
    assert answers[0] == (0, {"verdict": "x" * 300_000})


def test_a_stranger_is_not_heard_and_harms_nobody() -> None:
    root, other = pair()
    port = root._door.getsockname()[1] if root._door else 0
    wrong = b'{"token": "wrong", "host": 1, "died": [0, "me"]}\n'
    for text in (wrong, b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"[1]\n"):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(text)
            deadline = time.monotonic() + 0.3
            while time.monotonic() < deadline:
                assert root.poll() == []
                time.sleep(0.01)
    other.poll()
    heard: list[object] = []
    until(lambda: heard.extend(root.poll()) or heard)


def test_who_connects_and_says_nothing_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """And who has said the token may be silent."""
    root, other = pair()
    port = root._door.getsockname()[1] if root._door else 0
    monkeypatch.setattr("megallama.recovery.link._STRANGE", 0.3)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.setblocking(False)
        other.poll()
        heard: list[object] = []
        until(lambda: heard.extend(root.poll()) or heard)
        with pytest.raises(BlockingIOError):
            stranger.recv(1)
        until(lambda: root.poll() or len(root.sockets()) == 2)
        assert stranger.recv(1) == b""
    root.send({"still": "there"})
    answers: list[object] = []
    until(lambda: answers.extend(other.poll()) or answers)
    assert answers == [(0, {"still": "there"})]


def test_without_a_token_nobody_is_known() -> None:
    root, other = pair()
    root.token = other.token = ""
    other.poll()
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        assert root.poll() == []
        time.sleep(0.01)


def test_a_link_that_is_lost_is_made_again() -> None:
    root, other = pair()
    other.poll()
    heard: list[object] = []
    until(lambda: heard.extend(root.poll()) or heard)
    root._links[0].close()
    root.poll()
    heard.clear()
    until(lambda: (other.poll(), heard.extend(root.poll()), heard)[-1])
    assert heard[0] == (1, {"host": 1, "token": "secret"})


def test_an_address_that_does_not_answer_costs_nothing() -> None:
    other = Links()
    other.connect("127.0.0.1", 1, {"host": 1})
    assert other.poll() == [] and other.sockets() == []
    other.send({"x": 1})
    assert Links().listen("no-such-host.invalid") == 0
