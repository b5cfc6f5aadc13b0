"""Saving behind training, retention, the folder's lock, and saves that fail."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch

from megallama.checkpoint import folder as folders
from megallama.checkpoint import manager as manager_module
from megallama.checkpoint import manifest, writer
from megallama.checkpoint.disk import CheckpointError
from megallama.checkpoint.folder import FolderLock
from megallama.checkpoint.manager import _touching, pieces
from megallama.checkpoint.reader import verify_blocks
from megallama.checkpoint.writer import NotFiniteError
from megallama.comm.group import Group
from megallama.config.errors import MachineError
from megallama.plan.topology import Topology
from tests.checkpoint.states import (
    MODEL,
    assert_holds,
    boxes,
    empty_solo,
    make_config,
    make_manager,
    make_state,
    on_grid,
    solo_shards,
    take,
)

STATE = make_state()


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in folder.glob("step-*"))


# ---- asynchronous saves ----


def test_async_save_keeps_one_snapshot_and_the_next_save_waits(tmp_path, monkeypatch) -> None:
    gate, log, shards = threading.Event(), [], solo_shards(STATE)
    write = manager_module.write_checkpoint

    def slow(*args) -> None:
        assert gate.wait(30)
        write(*args)

    monkeypatch.setattr(manager_module, "write_checkpoint", slow)
    manager = make_manager(tmp_path, make_config(async_save=True), log=log.append)
    manager.prepare(shards)
    ((buffer, _),) = manager._pieces
    assert buffer.numel() == 3 * sum(s.box.numel for s in shards)
    manager.save(1, shards, {"step": 1})
    assert steps(tmp_path) == []  # it returned before the write
    for shard in shards:  # training goes on
        for tensor in shard.state.values():
            tensor.add_(1)
    thread = manager._thread
    join = thread.join
    monkeypatch.setattr(thread, "join", lambda: (gate.set(), join()))  # written only once the next save waits for it
    manager.save(2, shards, {"step": 2})
    assert (tmp_path / "step-00000001").is_dir()
    manager.finish()
    assert steps(tmp_path) == [1, 2] and manager._pieces[0][0] is buffer
    assert log[0] == "checkpoint of step 2 waits for the checkpoint of step 1, which is still being written"
    assert log[1].startswith(f"saved {tmp_path}/step-00000001 (")
    assert re.fullmatch(r"checkpoint of step 2 waited \d+\.\d s for the one before it", log[2])
    later = {kind: {n: t + 1 for n, t in tensors.items()} for kind, tensors in STATE.items()}
    for step, want in ((1, STATE), (2, later)):
        loaded = empty_solo()
        assert make_manager(tmp_path, make_config()).load(tmp_path / f"step-0000000{step}", loaded) == {"step": step}
        assert_holds(loaded, want)


def test_a_rank_with_one_shard_gets_its_buffer_too(tmp_path) -> None:
    manager = make_manager(tmp_path, make_config(async_save=True))
    shards = solo_shards(STATE)[:1]
    manager.prepare(shards)
    assert manager._pieces[0][0].numel() == 3 * shards[0].box.numel


def test_a_failed_background_save_is_raised_once_by_finish(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(writer, "fallocate", failing(OSError(errno.EIO, "Input/output error")))
    log: list[str] = []
    manager = make_manager(tmp_path, make_config(async_save=True), log=log.append)
    manager.save(1, solo_shards(STATE), {})
    with pytest.raises(MachineError, match="Input/output error"):
        manager.finish()
    warned = [line for line in log if line.startswith("warning: ")]
    assert warned[0].startswith("warning: checkpoint of step 1: saving") and list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    manager.save(2, solo_shards(STATE), {})
    manager.finish()
    assert steps(tmp_path) == [2]


def test_saves_may_fail_behind_training_until_too_many_have(tmp_path, monkeypatch) -> None:
    broken, log = failing(OSError(errno.EIO, "Input/output error")), []
    manager = make_manager(tmp_path, make_config(async_save=True, max_failures=1), log=log.append)
    monkeypatch.setattr(writer, "fallocate", broken)
    manager.save(1, solo_shards(STATE), {})
    manager.save(2, solo_shards(STATE), {})  # the first one failed: tolerated
    with pytest.raises(MachineError, match="step-00000002 failed, the checkpoints before it are untouched"):
        manager.save(3, solo_shards(STATE), {})
    messages = [line for line in log if line.startswith("warning: ")]
    assert messages[0].endswith("Input/output error; the run goes on and saves when the next is due")
    assert messages[1].endswith("Input/output error; the next save stops the run") and manager.saved_step is None
    monkeypatch.undo()
    manager.save(4, solo_shards(STATE), {})  # room again
    manager.finish()
    monkeypatch.setattr(writer, "fallocate", broken)
    manager.save(5, solo_shards(STATE), {})
    manager.save(6, solo_shards(STATE), {})  # a success between: counted anew
    with pytest.raises(MachineError):
        manager.finish()
    assert steps(tmp_path) == [4] and manager.saved_step == 4


def test_without_tolerance_the_next_save_raises_what_the_one_before_it_met(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(writer, "fallocate", failing(OSError(errno.EIO, "Input/output error")))
    manager = make_manager(tmp_path, make_config(async_save=True, max_failures=0))
    manager.save(1, solo_shards(STATE), {})
    with pytest.raises(MachineError, match="step-00000001 failed, the checkpoints before it are untouched"):
        manager.save(2, solo_shards(STATE), {})


def test_a_released_folder_stays_locked_until_the_save_under_way_has_ended(tmp_path, monkeypatch) -> None:
    """Else the next job could have the folder when the old save commits into it."""
    gate, write = threading.Event(), manager_module.write_checkpoint
    monkeypatch.setattr(manager_module, "write_checkpoint", lambda *args: gate.wait(30) and write(*args))
    manager = make_manager(tmp_path, make_config(async_save=True))
    manager.acquire()
    manager.save(1, solo_shards(STATE), {"step": 1})
    start = time.monotonic()
    manager.wait(0.2)
    assert 0.2 <= time.monotonic() - start < 10 and manager.saving
    manager.release()
    with pytest.raises(CheckpointError, match="is in use by"):
        make_manager(tmp_path, make_config()).acquire()
    gate.set()
    manager._thread.join(30)
    assert not manager.saving and sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_without_a_save_under_way_the_folder_is_released_at_once(tmp_path) -> None:
    manager = make_manager(tmp_path, make_config(async_save=True))
    manager.acquire()
    manager.save(1, solo_shards(STATE), {"step": 1})
    manager.wait(30)
    manager.release()
    assert not (tmp_path / "lock").exists()


# ---- a state that is not finite ----


@pytest.mark.parametrize("kind", ["master", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_state_that_is_not_finite_is_never_committed(tmp_path, kind: str, value: float) -> None:
    save_steps(tmp_path, [1])
    bad, grid = make_state(), Topology(dp=2, tp=2)
    bad[kind]["model.layers.2.self_attn.o_proj.weight"][20, 5] = value
    bad[kind]["lm_head.weight"][0, 0] = 3e38  # large is no reason

    def rank(group) -> str:
        manager = make_manager(tmp_path, make_config(), group)
        manager.resume(take(STATE, boxes(MODEL, grid, 1, group.rank, owned=True)))
        with pytest.raises(NotFiniteError) as error:
            manager.save(2, take(bad, boxes(MODEL, grid, 1, group.rank, owned=True)), {})
        assert error.value.status == 3
        return str(error.value)

    texts = on_grid(grid, rank)
    where = rf"rank \d on \S+: {value} in model.layers.2.self_attn.o_proj.weight\[20, 5\], for optimizer/{kind}-"
    assert len(set(texts)) == 1 and re.search(where, texts[0]) and "; resume from step 1 with" in texts[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_what_a_format_cannot_hold_is_not_finite(tmp_path) -> None:
    state = make_state()
    state["master"]["model.norm.weight"][3] = 70_000.0
    make_manager(tmp_path / "bf16", make_config()).save(1, solo_shards(state), {})
    with pytest.raises(NotFiniteError, match=r"inf in model.norm.weight\[3\], for model/model-.* on rank 0; there is"):
        make_manager(tmp_path / "fp16", make_config(dtype="fp16")).save(1, solo_shards(state), {})
    assert not steps(tmp_path / "fp16")


def test_a_save_behind_training_that_met_it_is_not_tolerated(tmp_path) -> None:
    state, log = make_state(), []
    state["exp_avg"]["model.norm.weight"][0] = float("nan")
    manager = make_manager(tmp_path, make_config(async_save=True, max_failures=9), log=log.append)
    manager.save(1, solo_shards(state), {})
    manager._thread.join(30)
    assert manager.not_finite and log == []
    with pytest.raises(NotFiniteError):
        manager.save(2, solo_shards(STATE), {})


def test_a_folder_taken_over_is_never_tolerated(tmp_path) -> None:
    manager = make_manager(tmp_path, make_config(async_save=True, max_failures=9))
    manager.acquire()
    lock = tmp_path / "lock"
    lock.write_bytes(lock.read_bytes().replace(b'"pid": ', b'"pid": 1'))
    manager.save(1, solo_shards(STATE), {})
    with pytest.raises(CheckpointError, match="is no longer ours"):
        manager.save(2, solo_shards(STATE), {})
    assert steps(tmp_path) == []


def test_every_shard_is_asked_for_once(tmp_path) -> None:
    """A converter reads a shard from its source whenever it is asked for it."""
    requested: list[int] = []
    real = solo_shards(STATE)

    class Lazy(Sequence):
        def __len__(self) -> int:
            return len(real)

        def __getitem__(self, index: int):
            found = real[index]
            requested.append(index)
            return found

    make_manager(tmp_path, make_config()).save(1, Lazy(), {})
    assert requested == [*range(len(real))]


def test_the_snapshot_is_few_large_copies(monkeypatch) -> None:
    flat = torch.arange(60.0)
    pieces = [flat[0:10], flat[10:25], flat[30:40], flat[40:60], torch.ones(5), flat[25:30]]
    found = list(_touching(pieces))
    assert [t.numel() for t in found] == [25, 30, 5, 5]
    assert torch.equal(torch.cat(found), torch.cat(pieces)) and found[0].data_ptr() == flat.data_ptr()


def test_the_digests_of_a_save_go_to_rank_0_alone(tmp_path, monkeypatch) -> None:
    grid, most = Topology(tp=1, pp=1, dp=4), []

    def rank(group) -> None:
        manager = make_manager(tmp_path, make_config(), group, block_bytes=256)
        exchange, sizes = group.gather_values, []

        def measured(value, summary=list):
            sizes.append(len(json.dumps(found := exchange(value, summary))))
            return found

        monkeypatch.setattr(group, "gather_values", measured)
        manager.save(1, take(STATE, boxes(MODEL, grid, 1, group.rank, owned=True)), {})
        manager.finish()
        most.append(max(sizes))

    on_grid(grid, rank)
    blocks = json.loads((tmp_path / "step-00000001" / manifest.NAME).read_bytes())["files"].values()
    count = sum(len(file["blocks"]) for file in blocks)
    assert count > 1000 and max(most) < 2 * count  # [bytes]: of each block a bit, not its digest


def test_ranks_save_in_the_background_together(tmp_path) -> None:
    grid = Topology(tp=2, dp=2)

    def rank(group):
        manager = make_manager(tmp_path, make_config(async_save=True), group)
        shards = take(STATE, boxes(MODEL, grid, 1, group.rank, owned=True))
        for step in (1, 2, 3):
            manager.save(step, shards, {})
        manager.finish()

    on_grid(grid, rank)
    assert steps(tmp_path) == [2, 3]
    shards = empty_solo()
    make_manager(tmp_path, make_config()).resume(shards)
    assert_holds(shards, STATE)


# ---- failing saves ----


def failing(error: OSError, at: int = 1):
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) >= at:
            raise error

    return call


def save_two(tmp_path, monkeypatch, name: str, replacement, kind: type[Exception] = MachineError) -> str:
    """Save step 1, break a system call, save step 2; the error's text. Step 1 stays, nothing else does."""
    manager = make_manager(tmp_path, make_config())
    manager.save(1, solo_shards(STATE), {"step": 1})
    monkeypatch.setattr(writer if name == "fallocate" else os, name, replacement)
    with pytest.raises(kind) as error:
        manager.save(2, solo_shards(STATE), {"step": 2})
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert make_manager(tmp_path, make_config()).resume(empty_solo()) == {"step": 1}
    manager.save(2, solo_shards(STATE), {"step": 2})
    assert steps(tmp_path) == [1, 2]
    return str(error.value)


def total_bytes(step: Path) -> int:
    return sum(r.size for r in manifest.read_manifest(step).files.values())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("name", ["fallocate", "pwrite"])
def test_a_full_disk_is_reported_with_numbers(tmp_path, monkeypatch, name: str, number: int) -> None:
    error = OSError(number, os.strerror(number))
    broken = failing(error, at=4) if name == "fallocate" else failing(error)
    text = save_two(tmp_path, monkeypatch, name, broken, CheckpointError)
    need = total_bytes(tmp_path / "step-00000002")
    assert re.search(rf"no space left in {tmp_path}: a checkpoint needs {need} bytes, \d+ are free; make room", text)


def test_a_disk_too_small_is_seen_before_the_first_byte(tmp_path, monkeypatch) -> None:
    class Space:
        f_blocks, f_bfree, f_bavail, f_frsize = 100, 20, 10, 4096

    def no_write(*args):
        raise AssertionError("written to a disk that is too small")

    monkeypatch.setattr(os, "pwrite", no_write)
    monkeypatch.setattr(os, "statvfs", lambda path: Space)
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes, 40960 are free"):
        make_manager(tmp_path, make_config()).save(1, solo_shards(STATE), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [1, 5])
def test_a_failed_fsync_is_never_committed(tmp_path, monkeypatch, at: int) -> None:
    text = save_two(tmp_path, monkeypatch, "fsync", failing(OSError(errno.EIO, "Input/output error"), at))
    assert "step-00000002 failed, the checkpoints before it are untouched: OSError: [Errno 5]" in text


def test_file_systems_without_allocation_still_work(tmp_path, monkeypatch) -> None:
    answers = [errno.EINTR, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL]

    def refuse(*_: object) -> int:
        ctypes.set_errno(answers.pop(0) if len(answers) > 1 else answers[0])
        return -1

    def emulated(*_: object) -> None:
        raise AssertionError("the C library writes a byte into every 4 KiB")

    monkeypatch.setattr(writer, "fallocate", refuse)
    monkeypatch.setattr(os, "posix_fallocate", emulated)
    make_manager(tmp_path, make_config()).save(1, solo_shards(STATE), {})
    assert answers == [errno.EINVAL]
    step = tmp_path / "step-00000001"
    saved = manifest.read_manifest(step)
    assert verify_blocks(step, saved, list(saved.blocks())) == []
    shards = empty_solo()
    make_manager(tmp_path, make_config()).resume(shards)
    assert_holds(shards, STATE)


def test_one_failing_rank_stops_the_save_on_all_and_is_named(tmp_path, monkeypatch) -> None:
    grid, write = Topology(dp=4), writer._write_shards

    def broken(content, shards, flusher):
        if shards[0].box == boxes(MODEL, grid, 1, 2, owned=True)[0]:
            raise OSError(errno.EIO, "Input/output error")
        return write(content, shards, flusher)

    monkeypatch.setattr(writer, "_write_shards", broken)

    def rank(group):
        manager = make_manager(tmp_path, make_config(), group)
        with pytest.raises(MachineError) as error:
            manager.save(1, take(STATE, boxes(MODEL, grid, 1, group.rank, owned=True)), {})
        return str(error.value)

    texts = on_grid(grid, rank)
    assert len(set(texts)) == 1 and re.search(r"rank 2 on \S+: OSError: \[Errno 5\] Input/output error", texts[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "below a file"])
def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path, place: str) -> None:
    (tmp_path / "taken").write_text("")
    folder = tmp_path / "taken" if place == "file" else tmp_path / "taken/inside"
    with pytest.raises(CheckpointError, match=f"cannot write to the checkpoint folder {folder}.* choose another"):
        make_manager(folder, make_config()).acquire()


# ---- retention and order ----


def save_steps(folder: Path, numbers: list[int], **settings) -> None:
    manager = make_manager(folder, make_config(**settings))
    for step in numbers:
        manager.save(step, solo_shards(STATE), {"step": step})


def test_retention(tmp_path) -> None:
    save_steps(tmp_path / "a", [1, 2, 3, 4, 5, 6, 7], keep_last=2)
    assert steps(tmp_path / "a") == [6, 7]
    save_steps(tmp_path / "b", [1, 2, 3, 4, 5, 6, 7], keep_last=1, keep_every=3)
    assert steps(tmp_path / "b") == [3, 6, 7]
    assert (tmp_path / "b/latest").read_text() == "step-00000007\n"


def test_nothing_is_deleted_while_it_is_not_known_which_is_good(tmp_path) -> None:
    manager = make_manager(tmp_path, make_config(keep_last=1))
    for step in (1, 2, 3):
        manager.keep_all = step > 1
        manager.save(step, solo_shards(STATE), {})
    assert steps(tmp_path) == [1, 2, 3] and (tmp_path / "latest").read_text() == "step-00000003\n"
    assert [manager.newest_step(most) for most in (0, 1, 2, 9)] == [None, 1, 2, 3]
    manager.keep_all = False
    manager.save(4, solo_shards(STATE), {})
    assert steps(tmp_path) == [4]


def test_going_back_replaces_the_steps_done_again(tmp_path) -> None:
    save_steps(tmp_path, [10, 20, 30], keep_last=9)
    manager = make_manager(tmp_path, make_config(keep_last=9))
    manager.load(tmp_path / "step-00000010", empty_solo())
    again = make_state(seed=5)
    manager.save(20, solo_shards(again), {"step": 20})
    assert manager.newest()[0] == tmp_path / "step-00000020"  # the last saved, not the highest
    shards = empty_solo()
    assert manager.resume(shards) == {"step": 20}
    assert_holds(shards, again)
    assert steps(tmp_path) == [10, 20, 30]


def test_a_fresh_start_does_not_delete_the_checkpoints_of_the_run_before(tmp_path) -> None:
    save_steps(tmp_path, [100, 200])
    save_steps(tmp_path, [1, 2, 3])  # another manager that loaded nothing: another line
    assert steps(tmp_path) == [2, 3, 100, 200]
    assert make_manager(tmp_path, make_config()).newest()[0] == tmp_path / "step-00000003"
    manager = make_manager(tmp_path, make_config())
    manager.resume(empty_solo())
    manager.save(4, solo_shards(STATE), {})
    assert steps(tmp_path) == [3, 4, 100, 200]


def test_damaged_and_unfinished_folders_are_not_counted(tmp_path) -> None:
    (tmp_path / "step-00000009.damaged").mkdir(parents=True)
    (tmp_path / "step-00000008").mkdir()  # no manifest
    save_steps(tmp_path, [1, 2, 3])
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [
        "step-00000002",
        "step-00000003",
        "step-00000008",
        "step-00000009.damaged",
    ]


def test_crash_leftovers_are_cleaned_at_the_start(tmp_path) -> None:
    save_steps(tmp_path, [1, 2])
    (tmp_path / "step-00000003.tmp/model").mkdir(parents=True)
    (tmp_path / "latest.tmp").write_text("step-0000")
    (tmp_path / "step-00000004.megallama-unfinished").mkdir()
    os.rename(tmp_path / "step-00000002", tmp_path / "step-00000002.old")  # killed between two renames
    (tmp_path / "notes.tmp").write_text("not ours")
    log: list[str] = []
    manager = make_manager(tmp_path, make_config(), log=log.append)
    assert manager.newest()[0] == tmp_path / "step-00000001"
    manager.acquire()
    assert sorted(log) == [
        "checkpoints: removed latest.tmp, which was not finished",
        "checkpoints: removed step-00000003.tmp, which was not finished",
        "checkpoints: removed step-00000004.megallama-unfinished, which was not finished",
        "checkpoints: restored step-00000002, whose replacement was not finished",
    ]
    assert manager.resume(empty_solo()) == {"step": 2}
    manager.release()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "notes.tmp", "step-00000001", "step-00000002"]


def test_what_people_name_themselves_is_left_and_named(tmp_path) -> None:
    save_steps(tmp_path, [1, 2])
    one = tmp_path / "step-00000001"
    for name in ("step-00000001.old", "step-00000001.tmp", "step-00000007.tmp"):
        shutil.copytree(one, tmp_path / name)
    shutil.copytree(one / "model", tmp_path / "step-00000008.tmp/model")  # weights to give away
    (tmp_path / "step-00000002.tmp").write_text("a note")
    shutil.copytree(one / "model", tmp_path / "step-00000009.old")
    (tmp_path / "latest.tmp").write_text("x" * 20)  # a hint is the name of a step
    (tmp_path / "step-00000002-good").mkdir()
    before, log = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")), []
    manager = make_manager(tmp_path, make_config(), log=log.append)
    for _ in range(2):
        manager.acquire()
        manager.release()
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    messages = [line for line in log if "alone: it is not what a crash leaves" in line]
    assert len(messages) == len(log) == 2 * 7
    assert {line.split()[2] for line in messages} == {str(p) for p in before if p.suffix in (".old", ".tmp")}


def test_what_an_earlier_version_left_is_cleaned_up_as_it_did(tmp_path) -> None:
    save_steps(tmp_path, [1, 2])
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000003.tmp")
    (tmp_path / "step-00000003.tmp/manifest.json").unlink()  # it is written last
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000002.old")
    (tmp_path / "step-00000002.old/optimizer").rename(tmp_path / "kept")  # not looked at: the manifest is
    log: list[str] = []
    make_manager(tmp_path, make_config(), log=log.append).acquire()
    assert log == [
        "checkpoints: restored step-00000002, whose replacement was not finished",
        "checkpoints: removed step-00000003.tmp, which was not finished",
    ]


def test_a_step_done_again_replaces_the_one_before_and_says_so(tmp_path) -> None:
    save_steps(tmp_path, [1])
    log: list[str] = []
    manager = make_manager(tmp_path, make_config(), log=log.append)
    manager.save(1, solo_shards(make_state(seed=5)), {"again": True})
    assert "step-00000001 took the place of the one saved earlier" in log
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert manager.load(tmp_path / "step-00000001", empty_solo()) == {"again": True}
    for name in ("step-00000001.megallama-replaced", "step-00000002.megallama-replaced"):  # killed meanwhile
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    log.clear()
    manager.acquire()
    assert log == [
        "checkpoints: removed step-00000001.megallama-replaced, in whose place step-00000001 is",
        "checkpoints: restored step-00000002, whose replacement was not finished",
    ]
    manager.release()


def test_a_call_that_is_stuck_is_named_by_its_rank_with_the_file_and_since_when(tmp_path, monkeypatch) -> None:
    gate: SimpleQueue[None] = SimpleQueue()
    monkeypatch.setattr(os, "fsync", gate.get)  # without a frame of its own, as the real one
    clock, reminders = [100.0], []  # of the two ranks, which tell when this test says so
    monkeypatch.setattr(manager_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(folders, "every", lambda seconds, tell: (reminders.append(tell), threading.Event())[1])
    logs: list[list[str]] = [[], []]
    config, grid = make_config(async_save=False), Topology(tp=2)

    def rank(group: Group) -> None:
        manager = make_manager(tmp_path, config, group, log=logs[group.rank].append)
        manager.save(3, take(STATE, boxes(MODEL, grid, 1, group.rank, owned=True)), {})

    def look_and_let_go() -> None:
        deadline = time.monotonic() + 100
        while sum(call.startswith("sync ") for call in folders.under_way().values()) < 2:
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        for passed in (0.25, 1.25, 3.25):
            clock[0] = 100.0 + passed
            for tell in [*reminders]:
                tell()
        for _ in range(1000):
            gate.put(None)

    opener = threading.Thread(target=look_and_let_go)
    opener.start()
    on_grid(grid, rank)
    opener.join()
    for number, lines in enumerate(logs):
        told = [line for line in lines if " is still being written, " in line]
        for line, (passed, since) in zip(told, ((0, 0), (1, 1), (3, 3)), strict=True):
            assert line.startswith(
                f"the checkpoint of step 3 is still being written, for {passed} s now, rank {number} in "
            )
            stuck = re.findall(rf", rank {number} in sync (\S+) for {since} s or more", line)
            assert len(stuck) == 2 and {str(Path(file).parent.parent) for file in stuck} == {
                f"{tmp_path}/step-00000003.megallama-unfinished"
            }, line
    assert steps(tmp_path) == [3]


def test_manifests_are_read_once(tmp_path, monkeypatch) -> None:
    """At 65B one has 9 MB, and rank 0 read all of them twice per save."""
    save_steps(tmp_path, [1, 2, 3], keep_last=9)
    real, read = manifest.read_manifest, []
    monkeypatch.setattr(manifest, "read_manifest", lambda folder: (read.append(folder.name), real(folder))[1])
    manager = make_manager(tmp_path, make_config(keep_last=9))
    for step in (4, 5, 6):
        manager.save(step, solo_shards(STATE), {})
    assert sorted(read) == ["step-00000004", "step-00000005", "step-00000006"]
    body = manifest.read_manifest(tmp_path / "step-00000001").body
    changed = manifest.render({k: v for k, v in body.items() if k != "digest"} | {"sequence": 77})
    (tmp_path / "step-00000001/manifest.json").write_bytes(changed)
    assert manager.newest()[0] == tmp_path / "step-00000001"  # the file has changed: it is read again


# ---- saves that last ----


@pytest.mark.parametrize("behind", [True, False])
def test_a_save_that_lasts_is_told_every_minute(tmp_path, monkeypatch, behind: bool) -> None:
    monkeypatch.setattr(manager_module, "TELL_SECONDS", 0.05)
    write, log, gate = manager_module.write_checkpoint, [], threading.Event()

    def slow(*args) -> None:
        assert gate.wait(30)
        write(*args)

    def open_when_told() -> None:
        while sum("is still being written" in line for line in [*log]) < 3:
            time.sleep(0.01)
        gate.set()

    monkeypatch.setattr(manager_module, "write_checkpoint", slow)
    manager = make_manager(tmp_path, make_config(async_save=True), log=log.append)
    opener = threading.Thread(target=open_when_told)
    opener.start()
    manager.save(7, solo_shards(STATE), {}, behind=behind)
    manager.finish()
    opener.join()
    messages = [line for line in log if line.startswith("the checkpoint of step 7 is still being written, for ")]
    assert len(messages) >= 2 and messages[0].endswith(" s now") and steps(tmp_path) == [7]
    if behind:
        assert log[0] == "the run waits for the checkpoint of step 7, which is still being written"
        assert re.fullmatch(r"the run waited \d+\.\d s for the one before it", log[-1])
    count = len(log)
    time.sleep(0.15)
    assert len(log) == count  # and no longer when it is done


def test_manifest_says_what_it_is(tmp_path) -> None:
    counters = {"step": 7, "samples": 1 << 40, "sources": [{"path": "a", "samples": 3}], "loss_scale": 65536.0}
    make_manager(tmp_path, make_config()).save(7, solo_shards(STATE), counters)
    body = manifest.read_manifest(tmp_path / "step-00000007").body
    assert (body["step"], body["sequence"], body["counters"]) == (7, 1, counters)
    assert body["config"]["model"]["hidden_size"] == 32 and body["versions"]["torch"] == torch.__version__
    record = body["files"]["model/config.json"]
    assert record["size"] == len((tmp_path / "step-00000007/model/config.json").read_bytes())


# ---- the lock ----


def test_a_second_job_is_refused_naming_the_first(tmp_path) -> None:
    first, second = make_manager(tmp_path, make_config()), make_manager(tmp_path, make_config())
    first.acquire()
    with pytest.raises(CheckpointError, match=rf"by job on host \S+, pid {os.getpid()}, started 20\d\d-") as error:
        second.acquire()
    assert f"delete {tmp_path}/lock" in str(error.value)
    first.release()
    second.acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_all_ranks_are_refused_together(tmp_path) -> None:
    first = make_manager(tmp_path, make_config())
    first.acquire()

    def rank(group):
        with pytest.raises(CheckpointError, match="rank 0 on .* is in use by"):
            make_manager(tmp_path, make_config(), group).acquire()

    on_grid(Topology(dp=3), rank)
    first.release()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path) -> None:
    code = "import os, pathlib, sys; from megallama.checkpoint.folder import FolderLock\n"
    code += "FolderLock(pathlib.Path(sys.argv[1]), print).acquire(); os.kill(os.getpid(), 9)"
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=False)
    assert done.returncode == -9 and (tmp_path / "lock").exists()
    log: list[str] = []
    lock = FolderLock(tmp_path, log.append)
    lock.acquire()
    assert len(log) == 1 and re.search(r"took over .* host \S+, pid \d+, .*, which has ended", log[0])
    lock.release()
    assert list(tmp_path.iterdir()) == []


def foreign_lock(folder: Path, **changes) -> None:
    lock = FolderLock(folder, print)
    lock.acquire()
    content = json.loads((folder / "lock").read_bytes())
    lock.release()
    (folder / "lock").write_text(json.dumps(content | changes))


def test_a_reused_pid_is_not_the_old_job(tmp_path) -> None:
    foreign_lock(tmp_path, process="1")
    lock = FolderLock(tmp_path, lambda text: None)
    lock.acquire()
    lock.check()
    lock.release()


def test_a_lock_of_another_machine_is_taken_over_when_nobody_touches_it(tmp_path) -> None:
    foreign_lock(tmp_path, machine="elsewhere", host="node7")
    log: list[str] = []
    lock = FolderLock(tmp_path, log.append, lease_seconds=0.3)
    lock.acquire()
    lock.release()
    assert log[0].startswith("waiting up to 0.3 s to see whether the job on host node7, pid")
    assert log[1].startswith("took over the checkpoint folder from the job on host node7")


def test_a_lock_of_another_machine_that_is_touched_is_respected(tmp_path) -> None:
    foreign_lock(tmp_path, machine="elsewhere", host="node7")
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(0.05):
            os.utime(tmp_path / "lock")

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(CheckpointError, match="in use by job on host node7"):
            FolderLock(tmp_path, lambda text: None, lease_seconds=30).acquire()
    finally:
        stop.set()
        thread.join()


def test_the_holder_touches_its_lock(tmp_path) -> None:
    lock = FolderLock(tmp_path, print, lease_seconds=3)
    lock.acquire()
    os.utime(tmp_path / "lock", (1, 1))
    deadline = time.monotonic() + 3
    while os.stat(tmp_path / "lock").st_mtime < 2:
        assert time.monotonic() < deadline  # another job would take it over
        time.sleep(0.01)
    lock.release()


def test_a_job_whose_folder_was_taken_over_does_not_write(tmp_path) -> None:
    manager = make_manager(tmp_path, make_config())
    manager.acquire()
    (tmp_path / "lock").write_text(json.dumps({"host": "node9", "pid": 3, "since": "now"}))
    with pytest.raises(CheckpointError, match="no longer ours: the job on host node9, pid 3, started now took"):
        manager.save(1, solo_shards(STATE), {})
    manager.release()
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


PIECES: list[tuple[list[int], list[tuple[int, int]]]] = [
    ([], []),
    ([64], [(64, 1)]),
    ([65], [(128, 1)]),
    ([33, 31, 2], [(128, 3)]),
    ([1] * 9, [(8, 8), (1, 1)]),
    ([8, *[5] * 20], [(64, 12), (64, 9)]),
]


@pytest.mark.parametrize(("sizes", "want"), PIECES, ids=str)
def test_pieces_of_page_locked_memory_are_powers_of_two(sizes: list[int], want: list[tuple[int, int]]) -> None:
    assert [*pieces(sizes)] == want
