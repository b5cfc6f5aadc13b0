"""Kill a process at every system call of a save, and see what the next start finds. Run by test_crashes.py.

    python -m tests.checkpoint.crashes FOLDER RANKS RESAVE STRIDE [VICTIM]     prints one JSON object

For every K a forked child takes over the folder and saves step 2 beside step 1 (with RESAVE=1, step 2
exists and is saved again with other contents), and SIGKILLs itself at its K-th call; every other kill
of a write happens after half of the bytes.  Then this process takes the folder over and resumes.
The ranks are threads of the child, which die together; with VICTIM they are gloo processes, of which
that rank alone is killed.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megallama.checkpoint import writer
from megallama.comm.c10d import C10d
from megallama.comm.group import Group
from megallama.config.schema import ModelConfig
from megallama.plan.topology import Topology
from tests.checkpoint.states import (
    boxes,
    empty,
    empty_solo,
    make_config,
    make_manager,
    make_state,
    on_grid,
    solo_shards,
    take,
)

MODEL = ModelConfig(hidden_size=8, num_layers=1, num_heads=2, ffn_hidden_size=12, vocab_size=24)
CALLS = ("open", "mkdir", "pwrite", "fsync", "rename", "unlink", "rmdir", "link", "close")
GRIDS = {1: Topology(), 2: Topology(tp=2), 3: Topology(dp=3), 4: Topology(tp=2, dp=2)}


def die_at(number: int) -> None:
    """From now on the process is killed at its `number`-th system call of a kind that changes files."""
    count = itertools.count(1)

    def killing(real: Any, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(count) == number:
                if name == "pwrite" and number % 2:
                    fd, data, offset = args
                    real(fd, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, killing(getattr(os, name), name))
    writer.fallocate = killing(writer.fallocate, "fallocate")


def save(folder: Path, group: Group, number: int) -> None:
    """One rank: takes the folder over and saves step 2; with a `number`, dies at that call."""
    config, state = make_config(MODEL, keep_last=1), make_state(MODEL, seed=2)
    manager = make_manager(folder, config, group, shard_bytes=1 << 20, lease_seconds=60.0)
    shards = take(state, boxes(MODEL, GRIDS[group.size], 1, group.rank, owned=True))
    manager.resume(empty([s.box for s in shards]))  # so that the checkpoint before it is ours to delete
    if number:
        die_at(number)
    group.barrier()
    manager.acquire()
    manager.save(2, shards, {"step": 2, "new": True})
    manager.release()


def save_in_threads(folder: Path, ranks: int, number: int) -> None:
    """All ranks in this process."""
    on_grid(GRIDS[ranks], lambda group: save(folder, group, 0 if group.rank else number))


def save_in_processes(folder: Path, ranks: int, number: int, victim: int) -> int:
    """Every rank a process of its own; the exit status of the victim."""

    def rank(index: int) -> None:
        store, everybody = dist.FileStore(str(folder) + ".store", ranks), tuple(range(ranks))
        dist.init_process_group("gloo", store=store, rank=index, world_size=ranks, timeout=timedelta(seconds=60))
        group = C10d(dist.group.WORLD, "checkpoint", everybody, index, torch.device("cpu"))
        save(folder, group, number if index == victim else 0)

    Path(str(folder) + ".store").unlink(missing_ok=True)
    children = [forked(lambda index=index: rank(index), quiet=index != victim) for index in range(ranks)]
    return [ended(child) for child in children][victim]


def forked(work: Callable[[], None], quiet: bool) -> int:
    """Do `work` in a child process; its pid."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # torch renews its pool at the first call after a fork: not in two threads
            work()
            os._exit(0)
        except BaseException:
            if not quiet:
                traceback.print_exc()
        finally:
            os._exit(1)
    return child


def ended(child: int) -> int:
    """Wait for a child; its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def resumed(folder: Path) -> tuple[str, list[str]]:
    """("old" or "new", what is left in the folder); "MIXED" if the state is neither."""
    shards = empty_solo(MODEL)
    manager = make_manager(folder, make_config(MODEL, resume="must"), lease_seconds=60.0)
    manager.acquire()
    counters = manager.resume(shards)
    manager.release()
    assert counters is not None
    kind = "new" if counters.get("new") else "old"
    want = solo_shards(make_state(MODEL, seed=2 if kind == "new" else 1))
    same = all(torch.equal(a.state[k], b.state[k]) for a, b in zip(shards, want, strict=True) for k in a.state)
    return kind if same else "MIXED", sorted(p.name for p in folder.iterdir())


def main(folder: Path, ranks: int, resave: bool, stride: int, victim: int | None) -> dict[str, Any]:
    """Kill at call 1, 1 + stride, ... until a child survives."""
    found: dict[str, Any] = {"old": 0, "new": 0, "MIXED": 0, "left": [], "killed": 0}
    for number in itertools.count(1, stride):
        shutil.rmtree(folder, ignore_errors=True)
        old = make_manager(folder, make_config(MODEL))
        old.save(2 if resave else 1, solo_shards(make_state(MODEL, seed=1)), {"step": 1})
        if victim is None:
            status = ended(forked(lambda n=number: save_in_threads(folder, ranks, n), quiet=False))
        else:
            status = save_in_processes(folder, ranks, number, victim)
        kind, names = resumed(folder)
        found[kind] += 1
        found["left"] += [n for n in names if n not in ("latest", "step-00000001", "step-00000002")]
        if status == 0:
            found["survived"] = kind
            return found
        assert status == -signal.SIGKILL, status
        found["killed"] += 1
    raise AssertionError


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, *numbers = sys.argv[1:]
    ranks, resave, stride, *victim = map(int, numbers)
    print(json.dumps(main(Path(where), ranks, bool(resave), stride, victim[0] if victim else None)))
