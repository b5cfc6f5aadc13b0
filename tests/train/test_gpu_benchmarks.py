"""The GPU benchmarks run from end to end on a CPU at a tiny size, and write no results there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def run(script: str, *options: str) -> tuple[list[dict[str, Any]], str]:
    """The JSON lines that a benchmark says, and its table."""
    before = {path.name: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {path.name: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before
    lines = done.stdout.splitlines()
    return [json.loads(x) for x in lines if x.startswith("{")], "\n".join(x for x in lines if x.startswith("|"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu.py", "gpu_rank.py", "gpu_nccl.py"])
def test_without_a_gpu_they_say_so_and_leave_old_results(script: str) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    command = [sys.executable, str(ROOT / "benchmarks" / script)]
    command += ["--models", "1.1b", "--seqs", "2048"] if script == "gpu.py" else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and f"error: torch {torch.__version__} finds no GPU; " in done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before


def test_one_gpu() -> None:
    systems = "ours,ours-torch,transformers,ours-fp8"
    output, shown = run("gpu.py", "--cpu-check", "--systems", systems, "--steps", "1")
    results = [x for x in output if x["kind"] == "result"]
    for row in ("tiny 32", "tiny 64"):
        ceiling = next(x for x in output if x["kind"] == "ceiling" and x["row"] == row)
        own = [x for x in results if x["row"] == row]
        names = [x["system"] for x in own]
        assert names == ["ours", "ours-torch", "transformers"] * 2  # in turns, two rounds
        for x in own:
            assert x["of_ceiling"] == pytest.approx(
                (ceiling["gemm"] + ceiling["attention"]) * x["tokens_per_second"] / 128, rel=1e-2
            )
            assert x["mfu_full"] > x["mfu_causal"] > 0 and 4.5 < x["loss"] < 5.2  # ln 128 = 4.85
        assert [len(x["rounds"]) for x in own] == [1] * 3 + [2] * 3
        (failed,) = {x["why"] for x in output if x["kind"] == "failed" and x["row"] == row}
        assert "precision.fp8" in failed  # wants a GPU: named, and the others go on


def test_one_rank_of_65b() -> None:
    output, shown = run("gpu_rank.py", "--cpu-check", "--steps", "1")
    assert [(x["position"], x["schedule"]) for x in output] == [(p, s) for p in (1, 3, 0) for s in ("zb-h1", "1f1b")]
    for x in output:
        backward = {"input gradient", "weight gradient"} if x["schedule"] == "zb-h1" else {"backward"}
        kinds = {"forward"} | backward
        assert set(x["times"]) == {*kinds, "pipeline"}
        assert all(x["times"][kind]["count"] == 4 and x["times"][kind]["device_ms"] > 0 for kind in kinds)
        assert x["planned_bytes"] > x["persistent_bytes"] > 0
    assert shown.count("tiny, stage") == 6


def test_ranks_over_one_device() -> None:
    output, shown = run("gpu_nccl.py", "--device", "cpu", "--rows", "2", "--dtypes", "bf16,fp64")
    assert len(output) == 2 and all(x["within limits"] == "yes" and int(x["ranks"]) > 1 for x in output)
    assert all(float(x["loss fp64"]) < 1e-10 and 0 < float(x["norm bf16"]) < 5e-2 for x in output)
    assert shown.count("| yes |") == 2
