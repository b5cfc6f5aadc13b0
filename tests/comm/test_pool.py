"""The pool of worker processes: results, failures, and no worker left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.pool import Pool, WorkerError

ROOT = Path(__file__).parents[2]


def test_workers_stay_and_return_values_and_tensors(pool: Pool) -> None:
    first = pool.run(2, "tests.comm.operations:identity")
    second = pool.run(3, "tests.comm.operations:identity")
    assert [r["rank"] for r in second] == [0, 1, 2] and {r["size"] for r in second} == {3}
    assert [r["pid"] for r in second][:2] == [r["pid"] for r in first]
    tensors = pool.run(2, "tests.comm.operations:echo_tensor", torch.zeros(3, dtype=torch.bfloat16))
    assert [t.tolist() for t in tensors] == [[0.0] * 3, [1.0] * 3] and tensors[0].dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [0, 1])
def test_failures_name_the_rank_and_the_pool_goes_on(pool: Pool, bad: int) -> None:
    with pytest.raises(WorkerError, match=rf"rank {bad} of 3 failed:[\s\S]*ValueError: this rank is bad"):
        pool.run(3, "tests.comm.operations:fail_on", bad)
    with pytest.raises(WorkerError, match=rf"rank {bad} of 2 died with status 9"):
        pool.run(2, "tests.comm.operations:die_on", bad)
    assert len(pool.run(2, "tests.comm.operations:identity")) == 2


def test_silent_ranks_are_named(pool: Pool) -> None:
    with pytest.raises(WorkerError, match=r"ranks \[0, 1\] of 2 did not answer within 0.5 s"):
        pool.run(2, "tests.comm.operations:waits_for_nobody", timeout=0.5)


def test_no_worker_survives_the_session() -> None:
    program = (
        "import sys\nfrom tests.pool import Pool\n"
        "if __name__ == '__main__':\n"
        "    pool = Pool()\n"
        "    print([r['pid'] for r in pool.run(2, 'tests.comm.operations:identity')], flush=True)\n"
        "    sys.stdin.read()\n"
    )
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    session = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert session.stdout is not None
    pids = [int(pid) for pid in session.stdout.readline().decode().strip(" []\n").split(",")]
    assert len(pids) == 2
    session.kill()
    session.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
