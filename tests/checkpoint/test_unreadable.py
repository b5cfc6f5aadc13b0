"""What cannot be read now is no damage: it is waited for, then named; nothing is renamed and no older step is taken."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megallama.checkpoint import disk, manifest, reader
from megallama.checkpoint import folder as folders
from megallama.checkpoint.disk import CheckpointError, UnreadableError
from megallama.cli import command
from megallama.inference.generate import find_model
from megallama.plan.topology import Topology
from tests.checkpoint.states import (
    MODEL,
    assert_holds,
    boxes,
    empty,
    empty_solo,
    make_config,
    make_manager,
    make_state,
    on_grid,
    save_on,
    solo_shards,
)

reshard = command("convert")
inspect = command("inspect")


OLD, NEW = make_state(seed=1), make_state(seed=2)
PASSING = ("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "ENOTCONN", "EREMOTEIO")
MANIFEST, MASTER, LISTING = "step-00000002/manifest.json", "step-00000002/optimizer/master-00002", "/checkpoints"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints, steps 1 and 2."""
    manager = make_manager(tmp_path / "checkpoints", make_config())
    manager.save(1, solo_shards(OLD), {"step": 1})
    manager.save(2, solo_shards(NEW), {"step": 2})
    return tmp_path / "checkpoints"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a second instead of thirty."""
    monkeypatch.setattr(disk, "PATIENCE_SECONDS", 0.1)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Make a call fail for paths that hold a text, the first `times` times; the paths for which it did."""

    def start(call: str, text: str, number: int, times: int = 1 << 30) -> list[str]:
        real, failed = getattr(os, call), []
        known: dict[int, str] = {}

        def fake(first: object, *args: object, **kwargs: object) -> object:
            path = known.get(first, "") if isinstance(first, int) else str(first)
            hit = path.endswith(text) if text == LISTING else text in path
            if hit and len(failed) < times:
                failed.append(path)
                raise OSError(number, os.strerror(number), path)
            return real(first, *args, **kwargs)

        opening = os.open

        def remember(path: object, *args: object, **kwargs: object) -> int:
            fd = (fake if call == "open" else opening)(path, *args, **kwargs)
            known[fd] = str(path)
            return fd

        monkeypatch.setattr(os, call, fake)
        monkeypatch.setattr(os, "open", remember)
        return failed

    return start


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def attempt(folder: Path, mode: str = "auto") -> tuple[dict | None, list[str]]:
    log: list[str] = []
    shards = empty_solo()
    counters = make_manager(folder, make_config(resume=mode), log=log.append).resume(shards)
    if counters is not None:
        assert_holds(shards, {1: OLD, 2: NEW}[counters["step"]])
    return counters, log


@pytest.mark.parametrize("number", PASSING)
@pytest.mark.parametrize(
    ("call", "where"), [("open", MANIFEST), ("open", MASTER), ("preadv", MASTER), ("stat", MANIFEST)]
)
def test_an_error_that_stays_ends_the_start_with_the_name(folder: Path, broken, call: str, where: str, number) -> None:
    before = names(folder)
    failed = broken(call, where, getattr(errno, number))
    with pytest.raises(UnreadableError, match=f"{where}.*cannot be read, tried for 0 s") as error:
        attempt(folder)
    assert len(failed) > 1 and os.strerror(getattr(errno, number)) in str(error.value)
    assert "no older step is taken" in str(error.value) and "checkpoint.resume=previous" in str(error.value)
    assert names(folder) == before


@pytest.mark.parametrize(
    ("call", "where"), [("open", MANIFEST), ("open", MASTER), ("preadv", MASTER), ("stat", MANIFEST)]
)
def test_an_error_that_passes_costs_nothing(folder: Path, broken, call: str, where: str) -> None:
    failed = broken(call, where, errno.EIO, times=1)
    assert attempt(folder) == ({"step": 2}, []) and len(failed) == 1


@pytest.mark.parametrize(("call", "where"), [("open", MANIFEST), ("open", MASTER), ("preadv", MASTER)])
def test_the_step_before_it_is_taken_only_when_asked(folder: Path, broken, call: str, where: str) -> None:
    before = names(folder)
    broken(call, where, errno.EIO)
    counters, log = attempt(folder, "previous")
    assert counters == {"step": 1} and names(folder) == before
    assert len(log) == 1 and log[0].startswith("warning: step-00000002: ") and where in log[0]
    assert log[0].endswith("; left out, as checkpoint.resume=previous asks")


def test_what_is_saved_after_an_unreadable_step_counts_as_newer_than_it(folder: Path, broken, monkeypatch) -> None:
    broken("open", MANIFEST, errno.EACCES)
    folders._brief.cache_clear()  # as in another process
    shards = empty_solo()
    manager = make_manager(folder, make_config(resume="previous", keep_last=9))
    assert manager.resume(shards) == {"step": 1}
    manager.save(3, shards, {"step": 3})
    monkeypatch.undo()
    assert make_manager(folder, make_config()).newest()[0].name == "step-00000003"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_without_the_right_to_read_it_ends_at_once(folder: Path, broken, monkeypatch, number: int) -> None:
    monkeypatch.setattr(disk, "PATIENCE_SECONDS", 30.0)
    before, since = names(folder), time.monotonic()
    broken("open", MASTER, number)
    with pytest.raises(UnreadableError, match=f"{MASTER}.*for user id {os.geteuid()}; use chmod or chown"):
        attempt(folder)
    assert time.monotonic() - since < 10 and names(folder) == before


@pytest.mark.parametrize("mode", ["auto", "must", "previous"])
def test_a_folder_that_cannot_be_listed_never_means_random_weights(folder: Path, broken, mode: str) -> None:
    broken("listdir", LISTING, errno.EIO)
    with pytest.raises(UnreadableError, match=f"{folder} cannot be read"):
        attempt(folder, mode)


def test_a_misread_block_is_read_again(folder: Path, monkeypatch) -> None:
    """A digest counts when a freshly opened file shows it twice; one flipped bit on the way from the disk does not."""
    real, hurt = os.preadv, []

    def flipping(fd: int, buffers: list, offset: int) -> int:
        count = real(fd, buffers, offset)
        if count > 100 and not hurt:
            hurt.append(fd)
            buffers[0][50] ^= 4
        return count

    monkeypatch.setattr(os, "preadv", flipping)
    saved = manifest.read_manifest(folder / "step-00000002")
    hurt.clear()
    name = next(name for name in saved.files if "exp_avg-" in name)
    assert reader.verify_blocks(folder / "step-00000002", saved, [(name, 0)]) == [] and len(hurt) == 1


def test_a_size_that_is_wrong_for_a_moment_is_looked_at_again(folder: Path, monkeypatch) -> None:
    real, lied = os.fstat, []

    def stale(fd: int) -> os.stat_result:
        found = real(fd)
        if MASTER in os.readlink(f"/proc/self/fd/{fd}") and not lied:
            lied.append(fd)
            return os.stat_result([*found[:6], 0, *found[7:]])
        return found

    monkeypatch.setattr(os, "fstat", stale)
    assert attempt(folder) == ({"step": 2}, []) and len(lied) == 1


def test_weights_that_cannot_be_read_are_named_and_do_not_end_the_start(folder: Path, broken) -> None:
    broken("open", "step-00000002/model/model-00002", errno.EIO)
    counters, log = attempt(folder)
    assert counters == {"step": 2} and len(log) == 1
    assert "model/model-00002" in log[0] and "The training state is whole" in log[0]


def test_one_rank_that_cannot_read_ends_the_start_of_all(tmp_path: Path, broken) -> None:
    grid, config, folder = Topology(tp=2, dp=2), make_config(), tmp_path / "checkpoints"
    for step, state in ((1, OLD), (2, NEW)):
        save_on(folder, config, state, grid, step=step)
    broken("preadv", sorted((folder / "step-00000002/optimizer").glob("exp_avg_sq-*"))[-1].name, errno.ESTALE)

    def rank(group) -> str:
        with pytest.raises(UnreadableError) as error:
            make_manager(folder, config, group).resume(empty(boxes(MODEL, grid, 1, group.rank, owned=True)))
        assert error.value.shared
        return str(error.value)

    texts = on_grid(grid, rank)
    assert len(set(texts)) == 1 and "exp_avg_sq-" in texts[0] and "rank " in texts[0]
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000001", "step-00000002"]


def test_starting_weights_that_cannot_be_read_are_named(folder: Path, tmp_path: Path, broken) -> None:
    broken("open", MASTER, errno.EIO)
    with pytest.raises(CheckpointError, match=f"cannot load weights from .*{MASTER}.*cannot be read"):
        make_manager(tmp_path / "other", make_config()).load_weights(folder / "step-00000002", empty_solo())


def test_tools_name_what_they_cannot_read_and_take_nothing_older(folder: Path, tmp_path: Path, broken, capsys) -> None:
    broken("open", MANIFEST, errno.EIO)
    folders._brief.cache_clear()
    with pytest.raises(UnreadableError, match=MANIFEST):
        find_model(folder)
    for tool, arguments in ((inspect, ["--verify"]), (reshard, [str(tmp_path / "out"), "--to", "hf"])):
        assert tool([str(folder), *arguments]) == 2
        output = capsys.readouterr()
        assert f"{MANIFEST} cannot be read" in output.err and output.out == ""
    assert not (tmp_path / "out").exists()


def test_a_damaged_newest_checkpoint_is_left_out_by_tools_with_a_line(folder: Path, capsys) -> None:
    (folder / "step-00000002/manifest.json").write_text("{}")
    assert inspect([str(folder)]) == 0
    output = capsys.readouterr()
    assert (
        "step-00000001: step 1" in output.out and "note: " in output.err and "step-00000002 is left out" in output.err
    )
