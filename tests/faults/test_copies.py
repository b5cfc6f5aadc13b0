"""Copies in memory and the next start on the same host: what it goes on from, and what it does not."""

from __future__ import annotations

import os
import random
import re
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megallama import pretrain
from megallama.checkpoint.disk import HEAD
from megallama.comm.flight_record import BUDDY, COPIED, SUPERVISOR, WORDS, FlightRecord
from megallama.recovery.copy_files import CopyFiles
from megallama.recovery.flight_reader import FlightReader
from megallama.recovery.keeper import Keeper
from megallama.train.loop import TrainingLoop
from tests.faults.ranks import QUIET
from tests.faults.test_replacement import RUN, kept, result
from tests.small import small_config


class Crash(Exception):
    """Planted."""


def start(folder: Path, *arguments: str, crash: int = 0) -> str:
    """A run of one rank in this process, with a keeper as a supervisor has it; its log. `crash`: in this step."""
    record = FlightRecord(FlightRecord.create(), os.memfd_create("stacks"))
    record.words[SUPERVISOR] = os.getpid()
    keeper, done = Keeper(FlightReader(os.dup(record.file)), lambda text: None, CopyFiles()), threading.Event()
    about = {"rank": 0, "host_of": [0], "hosts": ["here"], "token": "", "address": "127.0.0.1", "seats": [0]}

    def look() -> None:
        while not done.wait(0.005):
            keeper.look(about)

    looking = threading.Thread(target=look)
    looking.start()
    file, real = folder / "run" / "run.log", TrainingLoop._one_step
    before = len(file.read_text()) if file.exists() else 0

    def step(loop: TrainingLoop, loader: Any) -> Any:
        if loop.progress.step + 1 == crash:
            raise Crash
        return real(loop, loader)

    TrainingLoop._one_step = step  # type: ignore[method-assign]
    try:
        status = pretrain.main([*QUIET, *RUN, f"run.folder={folder / 'run'}", "train.steps=8", *arguments], record)
    finally:
        TrainingLoop._one_step = real  # type: ignore[method-assign]
        done.set()
        looking.join()
    assert status == (4 if crash else 0 if not any("stop_after" in word for word in arguments) else 75)
    keeper.leave(status)
    for number, _ in keeper._files.opened.values():
        os.close(number)
    keeper._files.opened.clear()
    return file.read_text()[before:]


COPY = "checkpoint.memory_interval=1"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    start(folder := tmp_path_factory.mktemp("undisturbed"))
    return result(folder, 8)


def test_a_start_goes_on_from_memory_and_no_bit_differs(tmp_path: Path, undisturbed: Any) -> None:
    start(tmp_path, COPY, crash=4)
    assert re.search("resumed after step 3, .* from memory", start(tmp_path, COPY, crash=7))
    assert re.search("resumed after step 6, .* from memory", start(tmp_path, COPY))
    assert result(tmp_path, 8) == undisturbed
    assert kept(tmp_path) == []


def test_a_start_from_memory_knows_the_checkpoint_that_it_came_after(tmp_path: Path) -> None:
    arguments = [COPY, "checkpoint.interval=3", "checkpoint.async_save=false"]
    start(tmp_path, *arguments, crash=5)
    for step in (4, 5):
        assert re.search(f"resumed after step {step}, .* from memory", start(tmp_path, *arguments, crash=6))


def test_a_copy_is_written_over_when_all_buddies_have_the_one_after_it() -> None:
    """A loop at step 7 whose copy of step 6 is on its way; with no buddy it does not wait, nor for long."""
    words, done, said = [0] * WORDS, threading.Event(), list[str]()

    def agree(late: bool) -> list[bool]:
        said.append("agreed")
        return [late, False]

    def keep(step: int, counters: dict[str, Any], after: list[int | None]) -> None:
        said.append(f"{step} {counters} {after}")

    loop = SimpleNamespace(
        setup=SimpleNamespace(copies=SimpleNamespace(ends=[("a", 1)] * 2, keep=keep)),
        _config=small_config(checkpoint={"memory_interval": 1}),
        _world=SimpleNamespace(record=SimpleNamespace(words=words), group=SimpleNamespace(gather_values=agree)),
        _log=SimpleNamespace(info=said.append),
        progress=SimpleNamespace(step=7, guard=SimpleNamespace(in_a_row=0)),
        _timers=SimpleNamespace(phase=nullcontext),
        _counters=dict,
        _manager=SimpleNamespace(lineage="x", saved_step=None, begun=4),
    )

    report: Any = SimpleNamespace(catch_up=lambda seconds: said.append("records"))

    def copy() -> None:
        TrainingLoop._copy_if_due(loop, report)  # type: ignore[arg-type]
        done.set()

    for there, waits in ((6, True), (9, True), (7, False), (-1, False)):  # 9: of a step that was undone
        words[COPIED], words[BUDDY] = 7, there
        said.clear()
        done.clear()
        threading.Thread(target=copy).start()
        assert done.wait(0.1 if waits else 5) is not waits
        words[BUDDY] = 7
        assert done.wait(5)
        assert said == ["agreed", "records", "7 {'lineage': 'x'} [None, 4]"] and words[COPIED] == 8
    loop._config = small_config(checkpoint={"memory_interval": 1}, run={"timeout_seconds": 0.2})
    words[COPIED], words[BUDDY] = 7, 6
    said.clear()
    copy()
    assert said == ["agreed", "step 7 is not copied: the copy before it is not there yet"] and words[COPIED] == 7


def unused(log: str) -> list[str]:
    """Why copies were not gone on from."""
    return sorted(re.findall(r"the copy of step (\d+ in memory is not used: .*)", log))


def test_what_voids_copies(tmp_path: Path, undisturbed: Any) -> None:
    """A start without copies that saves an earlier step; a start from the beginning; another configuration."""
    since = "in memory is not used: the run has gone on from somewhere else since"
    start(tmp_path, COPY, crash=6)
    start(tmp_path, "train.stop_after_steps=2")  # it starts anew
    log = start(tmp_path, COPY, crash=4)
    assert unused(log) == [f"4 {since}", f"5 {since}"] and re.search("resumed after step 2, .* from .*/step-", log)
    log = start(tmp_path, COPY, "checkpoint.resume=fresh", crash=3)
    assert unused(log) == ["3 in memory is not used: checkpoint.resume=fresh"] and "starting from random weights" in log
    (*_, why) = unused(start(tmp_path, COPY, "optimizer.lr=0.5", crash=4))
    assert re.fullmatch(r"2 in memory is not used: its config was \w{12} and is \w{12}", why)


def test_a_deleted_checkpoint_and_a_later_save_void_copies(tmp_path: Path, undisturbed: Any) -> None:
    start(tmp_path, COPY, "checkpoint.interval=2", "checkpoint.async_save=false", crash=6)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    log = start(tmp_path, COPY, "checkpoint.interval=2", "checkpoint.async_save=false", crash=5)
    why = "5 in memory is not used: it was made after the checkpoint of step 4, and the newest is of step 2"
    assert why in unused(log) and re.search("resumed after step 2, .* from .*/step-", log)
    log = start(tmp_path, COPY, "checkpoint.interval=2")
    assert "4 in memory is not used: the checkpoint of step 4 is as new" in unused(log)
    assert re.search("resumed after step 4, .* from .*/step-", log)
    assert result(tmp_path, 8) == undisturbed


def test_a_run_whose_folder_was_removed_begins_anew(tmp_path: Path) -> None:
    start(tmp_path, COPY, crash=4)
    shutil.rmtree(tmp_path / "run")
    log = start(tmp_path, COPY)
    assert len(unused(log)) == 2 and "starting from random weights" in log


def test_of_two_hundred_flipped_bits_none_gets_into_a_run(tmp_path: Path, undisturbed: Any) -> None:
    """Five starts, each after forty flips in both copies: from the checkpoint, and no bit of the result differs."""
    draw = random.Random(3)
    start(tmp_path, COPY, "checkpoint.interval=2", "checkpoint.async_save=false", crash=4)
    (path,) = kept(tmp_path)
    for _ in range(5):
        half = (path.stat().st_size - 4096) // 2
        with open(path, "r+b") as file:
            for at in [draw.randrange(HEAD, half) + half * draw.randrange(2) for _ in range(40)]:
                file.seek(at)
                bits = file.read(1)[0]
                file.seek(at)
                file.write(bytes([bits ^ 1 << draw.randrange(8)]))
        log = start(tmp_path, COPY, "checkpoint.interval=2", "checkpoint.async_save=false", crash=4)
        assert re.search(r"the copy of step 3 in memory is damaged and not used \(.*\): nobody", log)
        assert re.search("resumed after step 2, .* from .*/step-", log)
    start(tmp_path, COPY)
    assert result(tmp_path, 8) == undisturbed
