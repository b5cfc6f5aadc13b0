"""Several NCCL ranks on one GPU, each with a host id of its own: the layouts of the parity matrix, in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.small import deviation

PROGRAM = """
import json, sys
from megallama.comm.launch import detect_launch, start
from megallama.config.schema import RunConfig
from megallama.kernels.choose import choose_kernels
from megallama.plan.plan import make_plan
from megallama.train.assemble import DTYPES, assemble, initialize
from tests.small import curve, small_config, tokens, train

config = small_config(**json.loads(sys.argv[1]))
with start(detect_launch(), RunConfig(device="cuda")) as world:
    plan = make_plan(config, world.world_size)
    groups = world.groups(plan.topology, config.model.num_kv_heads)
    rank = assemble(plan, groups, world.device, choose_kernels(world.device, DTYPES[config.precision.dtype]))
    initialize(rank, 7)
    print("curve", json.dumps(curve(train(rank, tokens(config, 5).to(world.device)))), flush=True)
"""


def run(ranks: int, settings: dict[str, object], port: int) -> list[list[float]]:
    """The curves of all ranks."""
    root = Path(__file__).parents[2]
    processes = []
    for rank in range(ranks):
        env = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "NCCL_HOSTID": f"rank-{rank}",
            "NCCL_SOCKET_IFNAME": "lo",
            "PYTHONPATH": str(root),
        }
        command = [sys.executable, "-c", PROGRAM, json.dumps(settings)]
        processes.append(subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, text=True))
    curves = []
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        line = next(line for line in out.splitlines() if line.startswith("curve "))
        curves.append(json.loads(line.removeprefix("curve ")))
    return curves


@pytest.mark.parametrize(("dtype", "limit"), [("fp64", 1e-10), ("fp32", 1e-3), ("bf16", 3e-2)])
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, {"tp": 2}), (2, {}), (2, {"pp": 2}), (4, {"tp": 2, "pp": 2}), (4, {"pp": 2, "chunks": 2})],
    ids=str,
)
def test_nccl_ranks_give_one_ranks_numbers(
    cuda: torch.device, ranks: int, parallel: dict[str, object], dtype: str, limit: float
) -> None:
    settings: dict[str, object] = {"precision": {"dtype": dtype}, "model": {"hidden_size": 64}}
    (want,) = run(1, settings, 29600)
    for mine in run(ranks, {**settings, "parallel": parallel}, 29601):
        assert deviation(mine, want) <= limit
