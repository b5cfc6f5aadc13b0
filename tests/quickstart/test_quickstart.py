"""The quickstart's parts with small stand-ins for the trainer; `test_main_job.py` runs the real thing."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megallama.config.load import load
from tools import quickstart
from tools.quickstart import ROOT, Machine, Ranks, StepFailed, claim, layout, unigram_loss, vocabulary_for

SAVES_ON_TERM = "import signal, sys, time; signal.signal(15, lambda *a: sys.exit(75)); print('up'); time.sleep(60)"


def ranks_of(code: str, count: int, folder: Path) -> Ranks:
    return Ranks([sys.executable, "-u", "-c", code], count, folder / "logs", 1)


def wait_for(text: str, ranks: Ranks) -> None:
    end = time.monotonic() + 60
    while not all(text in log.read_text() for log in ranks.logs):
        assert time.monotonic() < end, ranks.report()
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


LAYOUTS = [(0, (4, 2, 2)), (1, (1, 1, 1)), (2, (2, 2, 1)), (3, (2, 2, 1)), (4, (4, 2, 2)), (16, (8, 2, 2))]


@pytest.mark.parametrize(("gpus", "expected"), LAYOUTS)
def test_layout(gpus: int, expected: tuple[int, int, int]) -> None:
    assert layout(gpus) == expected
    ranks, tp, pp = expected
    load(ROOT / quickstart.CONFIG, (f"parallel.tp={tp}", f"parallel.pp={pp}"), ranks=ranks)


def test_the_layout_is_told() -> None:
    assert Machine(8, 2, 2, 9, "bf16").describe().startswith("8 of 9 GPUs found: one rank on each: tp=2 with sequence")
    assert "no GPU found: 4 ranks on " in Machine(4, 2, 2, 0, "fp32").describe()


@pytest.mark.parametrize(("size", "expected"), [(100_000, 512), (200_000, 768), (1_024_000, 4096), (10**8, 4096)])
def test_vocabulary_follows_the_text(size: int, expected: int) -> None:
    assert vocabulary_for(size) == expected


def test_unigram_baseline() -> None:
    train, valid = np.array([0, 0, 0, 1], np.uint16), np.array([0, 1, 2], np.uint16)
    # counts plus one: 4, 2, 1, 1 of 8
    expected = -(math.log(4 / 8) + math.log(2 / 8) + math.log(1 / 8)) / 3
    assert unigram_loss(train, valid, 4) == pytest.approx(expected, rel=1e-14)


def test_claim_empties_only_its_own_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    claim(folder).close()
    (folder / "old").mkdir()
    (folder / "old" / "file").touch()
    (folder / "metrics.jsonl").touch()
    (folder / "link").symlink_to(tmp_path)
    claim(folder).close()
    assert [p.name for p in folder.iterdir()] == [quickstart.MARKER]
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    with pytest.raises(StepFailed, match="mine holds something that is not a quickstart's; move it away, or use --f"):
        claim(foreign)
    assert (foreign / "thesis.txt").exists()


def test_claim_refuses_a_folder_in_use(tmp_path: Path) -> None:
    with claim(tmp_path / "run"), pytest.raises(StepFailed, match="another quickstart is using .*run; wait for it"):
        claim(tmp_path / "run")


def test_ranks_get_torchruns_environment(tmp_path: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR".split()
    with ranks_of(f"import os; print(*[os.environ[n] for n in {names}])", 3, tmp_path) as ranks:
        assert ranks.wait(60) == [0, 0, 0]
        assert not ranks.running()
    assert [log.read_text() for log in ranks.logs] == [f"{rank} {rank} 3 3 127.0.0.1\n" for rank in range(3)]


def test_a_signal_reaches_every_rank_and_a_save_is_no_failure(tmp_path: Path) -> None:
    with ranks_of(SAVES_ON_TERM, 2, tmp_path) as ranks:
        wait_for("up", ranks)
        assert ranks.running()
        ranks.signal(signal.SIGTERM)
        assert ranks.wait(60) == [75, 75]
        assert not ranks.running()


def test_the_rank_that_failed_is_named(tmp_path: Path) -> None:
    code = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('error: no such corpus')\ntime.sleep(60)"
    with ranks_of(code, 2, tmp_path) as ranks:
        while ranks.failed is None:
            ranks.statuses()
        text = ranks.report()
    assert "rank 1 left first; exit statuses: runs, 1; the end of " in text
    assert "start-1-rank-1.log:\n    error: no such corpus" in text
    assert not any(alive(process.pid) for process in ranks.processes)


def test_no_rank_outlives_the_quickstart(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from tools.quickstart import Ranks
ranks = Ranks([sys.executable, "-c", "import time; time.sleep(60)"], 2, Path({str(tmp_path)!r}), 1)
print(*[p.pid for p in ranks.processes], flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(driver.pid, signal.SIGKILL)
    end = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.txt", "The start failed: {0}/nothing.txt does not exist; TEXT takes a text file, a .jsonl file or a"),
        ("run/corpus.txt", "The start failed: {0}/run/corpus.txt lies in {0}/run, which is emptied first; move it"),
        ("short.txt", "Step 1 failed: {0}/short.txt holds 6 bytes of usable text, too little to train on; give 100,"),
    ],
)
def test_bad_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str) -> None:
    folder = tmp_path / "run"
    claim(folder).close()
    (folder / "corpus.txt").write_text("text " * 30_000)
    (tmp_path / "short.txt").write_text("short\n")
    assert quickstart.main(["--text", str(tmp_path / name), "--folder", str(folder)]) == 1
    out = capsys.readouterr().out
    assert message.format(tmp_path) in out
    assert "Traceback" not in out
    assert (folder / "corpus.txt").exists() == (name != "short.txt")  # emptied after a look at the text
