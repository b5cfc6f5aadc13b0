"""However often trainers are replaced: who stays, and the next ones, hold no more than after the second time.

python -m tests.faults.test_leaks 20      so often, instead of the four times of the test
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.faults.ranks import Ranks
from tests.faults.test_replacement import REPLACE, maker, run, trainer

MAKER_DIES = 3  # the generation that a dead maker ends


def held(pid: int) -> dict[str, Any]:
    """What a process holds: open files by their kind, threads, children, mapped places and kB."""
    links = list[str]()
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # a supervisor writes its status now and then
            links.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    told, maps = (Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "maps"))
    return {
        "files": Counter(re.sub(r"[\d\[\]]+", "", link) for link in links),
        "children": len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()),
        "maps": len(maps.splitlines()),
        "names in /dev/shm": {*re.findall(r"/dev/shm/\S+", " ".join([maps, *links]))},
        **{name: int(re.findall(rf"^{name}:\s+(\d+)", told, re.M)[0]) for name in ("Threads", "VmSize")},
    }


def held_by_all(ranks: Ranks) -> dict[tuple[str, int], dict[str, Any]]:
    """Of every supervisor, maker and trainer, by what it is and its rank."""
    found = {}
    for rank, process in enumerate(ranks.processes):
        pids = {"supervisor": process.pid or 0, "maker": maker(ranks, rank), "trainer": trainer(ranks, rank)}
        found |= {(name, rank): held(pid) for name, pid in pids.items()}
    return found


def makes_steps(ranks: Ranks, count: int) -> None:
    began, seen = time.monotonic(), len(re.findall(r"step \d+/", ranks.said(0)))
    while len(re.findall(r"step \d+/", ranks.said(0))) < seen + count:
        assert time.monotonic() < began + 60, ranks.said(0)
        time.sleep(0.02)


def replaced(folder: Path, times: int) -> dict[int, dict[tuple[str, int], dict[str, Any]]]:
    """What everybody holds after the second replacement and after each later one."""
    ranks = run(folder, "parallel.tp=2", *REPLACE, f"run.max_replacements={times}", "checkpoint.memory_interval=1",
                "train.steps=100000")  # fmt: skip
    found = {}
    makes_steps(ranks, 2)
    for generation in range(1, times + 1):
        victim = generation % 2
        os.kill((maker if generation == MAKER_DIES else trainer)(ranks, victim), signal.SIGKILL)
        ranks.until(f"(replacement {generation} of {times})")
        makes_steps(ranks, 2)
        if generation >= 2:
            found[generation] = held_by_all(ranks)
    os.kill(ranks.processes[0].pid or 0, signal.SIGTERM)
    assert ranks.wait() == [75, 75]
    return found


def test_later_generations_hold_no_more(tmp_path: Path) -> None:
    found = replaced(tmp_path, 4)
    first, last, new = found[2], found[4], MAKER_DIES % 2
    first |= {(name, new): found[MAKER_DIES][name, new] for name in ("maker", "trainer")}  # of a new program
    for who, before in first.items():
        grown = {n: last[who][n] - before[n] for n in ("maps", "VmSize")}  # its own memory may take another arena
        assert last[who] | grown == before | grown and grown["maps"] <= 2 and grown["VmSize"] <= 2048, who
    assert last["maker", 0]["Threads"] == 1 and last["supervisor", 1]["children"] == 2  # the spare
    assert last["supervisor", 1]["files"].total() > 5 and last["trainer", 0]["maps"] > 100
    names = {name for what in last.values() for name in what["names in /dev/shm"]}
    assert len(names) <= 2 and all("/megallama-copies-" in name for name in names), names  # of the state, one per rank


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = replaced(Path(folder) / "run", int(sys.argv[1]))
    for generation, holds in found.items():
        for (name, rank), what in holds.items():
            numbers = ", ".join(f"{n} {v.total() if n == 'files' else v}" for n, v in what.items())
            sys.stdout.write(f"generation {generation}, {name} {rank}: {numbers}\n")
