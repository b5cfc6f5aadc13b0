"""Runs of two ranks that fail again and again before their first step: counted by rank 0, refused together."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from tests.pool import Pool

RUN = "tests.train.starting:run"
CRASH = "rank 1 (localhost) failed first: RuntimeError: the last rank is broken"


def ends(folder: Path) -> list[str]:
    path = folder / "checkpoints/starts.json"
    return [start["end"] for start in json.loads(path.read_text())["starts"]] if path.exists() else []


def start(pool: Pool, folder: Path, end: str) -> list[list[Any]]:
    return pool.run(2, RUN, str(folder), end)


def test_a_loop_of_restarts_ends_with_one_message(pool: Pool, tmp_path: Path) -> None:
    for count in range(2):
        start(pool, tmp_path, "crash")
        assert ends(tmp_path) == [CRASH] * (count + 1)
    assert [status for status, *_ in start(pool, tmp_path, "bad request")] == [2, 2]
    start(pool, tmp_path, "killed")
    killed = "killed, or its machine died: it left no word"
    assert ends(tmp_path) == [CRASH, CRASH, "running"]
    before = (tmp_path / "checkpoints/starts.json").read_bytes()
    first, other = start(pool, tmp_path, "good")
    assert first[:2] == other[:2] and first[0] == 2
    head, *lines = first[1].splitlines()
    assert head.startswith(
        f"checkpoint folder: rank 0 on {socket.gethostname()}: 3 starts in a row ended before a step was finished"
    )
    assert [line.partition(", after step 0: ")[2] for line in lines] == [CRASH, CRASH, killed]
    assert (tmp_path / "checkpoints/starts.json").read_bytes() == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["starts.json"]
    assert not [line for line in other[2] if "starts" in line], "rank 0 alone has the file"


def test_a_finished_step_empties_the_count(pool: Pool, tmp_path: Path) -> None:
    for _ in range(2):
        start(pool, tmp_path, "crash")
    assert [status for status, *_ in start(pool, tmp_path, "good")] == [0, 0]
    assert ends(tmp_path) == []
    start(pool, tmp_path, "crash")  # all steps are done: none is begun
    assert ends(tmp_path) == []


def test_a_step_that_is_skipped_is_not_a_finished_one(pool: Pool, tmp_path: Path) -> None:
    start(pool, tmp_path, "crash")
    assert [status for status, *_ in start(pool, tmp_path, "bad steps")] == [0, 0]
    assert ends(tmp_path) == [CRASH]


def test_who_is_killed_after_a_request_to_stop_is_not_counted_unless_another_rank_has_gone(
    pool: Pool, tmp_path: Path
) -> None:
    start(pool, tmp_path, "asked")
    assert ends(tmp_path) == []
    start(pool, tmp_path, "asked after a loss")
    assert ends(tmp_path) == ["running"]
