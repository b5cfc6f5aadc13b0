"""How deep a step is: the frames of ours from the program's entry to the attention kernel."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch.nn.functional as F

import megallama
from megallama.pretrain import main
from tests.faults.test_bad_input import GOOD
from tests.test_architecture import CEILINGS, MAX_ENGINE, PACKAGE, num_lines

OURS = str(Path(megallama.__file__).parent)


def test_the_log_of_a_rank_that_fails_says_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr("megallama.layers.linear.RowParallelLinear.__call__", broken)
    assert main([*GOOD, f"run.folder={tmp_path}"]) == 4
    assert "this rank stood in F0.0 of its pipeline" in (tmp_path / "logs" / "rank-0000.log").read_text()


def test_at_most_ten_frames_from_the_entry_to_the_attention_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, stacks = F.scaled_dot_product_attention, []

    def seen(*args: object, **named: object) -> object:
        stacks.append([frame.name for frame in traceback.extract_stack() if frame.filename.startswith(OURS)])
        return real(*args, **named)  # type: ignore[arg-type]

    arguments = [*GOOD, "precision.dtype=fp32", "log.tensorboard=false", "train.steps=1", f"run.folder={tmp_path}"]
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    assert main(arguments) == 0
    forward = [stack for stack in stacks if "_forward" in stack]  # the others are the check of the kernel
    assert forward and all(stack[0] == "main" and stack[-1] == "sdpa" for stack in forward)
    assert max(map(len, forward)) <= 10, forward[0]


LOADED = """
import os, pathlib, sys
from megallama.pretrain import main
status = main(sys.argv[2:])
ours = sorted(name for name in sys.modules if name.split(".")[0] == "megallama")
pathlib.Path(sys.argv[1], f"loaded.{os.environ['RANK']}").write_text(" ".join(ours))
sys.exit(status)
"""


def test_four_ranks_load_the_engine_and_nothing_beside_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = [*GOOD, "precision.dtype=fp32", "parallel.tp=2", "parallel.pp=2", "run.threads=1"]
    arguments += ["checkpoint.interval=1", "log.plot=true", f"run.folder={tmp_path / 'run'}"]
    ranks = []
    for rank in range(4):
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4, "MASTER_PORT": port}
        env = os.environ | {name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1"}
        ranks.append(subprocess.Popen([sys.executable, "-c", LOADED, str(tmp_path), *arguments], env=env))
    assert [rank.wait(120) for rank in ranks] == [0, 0, 0, 0]
    loaded = {name for rank in range(4) for name in (tmp_path / f"loaded.{rank}").read_text().split()}
    paths = [PACKAGE.joinpath(*name.split(".")[1:]) for name in loaded]
    files = [path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py" for path in paths]
    assert {name.split(".")[1] for name in loaded if "." in name} & set(CEILINGS) == set()
    assert num_lines(files) <= MAX_ENGINE
