"""Everything that a few minutes on a GPU would run, from end to end on a CPU at a tiny size."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "drivers")]

import gpu_session  # noqa: E402
import gpu_state  # noqa: E402
import report  # noqa: E402

NVIDIA_SMI = """#!/bin/sh
echo "$@" >> $0.log
echo "1980, 3201, 640.5, 61"
case "$*" in *-lms*) sleep 0.05; echo "1755, 3201, 700.1, 64"; echo "[N/A], 3201, 1, 1"; exec sleep 60;; esac
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the whole session put its results; nothing else was written, and everything went well."""
    out, bin_ = tmp_path_factory.mktemp("session"), tmp_path_factory.mktemp("bin")
    (bin_ / "nvidia-smi").write_text(NVIDIA_SMI)
    (bin_ / "nvidia-smi").chmod(0o755)
    before = {path.name: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_session.py")]
    command += ["--device", "cpu", "--seconds", "900", "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{bin_}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, env=env)
    logs = "".join(path.read_text()[-1500:] for path in sorted(out.glob("*.log")))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:] + logs
    assert {path.name: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before
    return out


def read(file: Path) -> Any:
    return json.loads(file.read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu.py", "gpu_rank.py", "gpu_nccl.py"])
def test_without_a_gpu_they_say_so_and_leave_old_results(script: str) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    command = [sys.executable, str(ROOT / "benchmarks" / script)]
    command += ["--models", "1.1b", "--seqs", "2048"] if script == "gpu.py" else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and f"error: torch {torch.__version__} finds no GPU; " in done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before


def test_the_session_says_what_ran_when(session: Path) -> None:
    """Correctness first; every command has its log."""
    found = read(session / "session.json")
    names = [one["command"] for one in found["stages"]]
    assert names == ["tests", "gpu", "gpu_rank", "gpu_nccl"] == [x for x in names if (session / f"{x}.log").exists()]
    assert {one["status"] for one in found["stages"]} == {0} and found["commit"] != "unknown"
    (tests,) = (one for one in found["stages"] if one["command"] == "tests")
    assert " skipped, " in tests["last"]
    ends = [one["until"] for one in found["stages"]]
    assert all(one["from"] >= end for one, end in zip(found["stages"][1:], ends[:-1], strict=True))


def test_one_gpu(session: Path) -> None:
    output = read(session / "gpu.json")["said"]
    results = [x for x in output if x["kind"] == "result"]
    row = "tiny 32"
    ceiling = next(x for x in output if x["kind"] == "ceiling" and x["row"] == row)
    own = [x for x in results if x["row"] == row]
    assert [x["system"] for x in own] == ["ours", "transformers"] * 2  # in turns, two rounds
    for x in own:
        assert x["of_ceiling"] == pytest.approx(
            (ceiling["gemm"] + ceiling["attention"]) * x["tokens_per_second"] / 128, rel=1e-2
        )
        assert x["mfu_full"] > x["mfu_causal"] > 0 and 4.5 < x["loss"] < 5.2  # ln 128 = 4.85
        assert [len(one) for one in x["every_step"]] == [4] * len(x["rounds"])
        assert x["seconds"] == pytest.approx(sum(x["every_step"][-1]) / 4, rel=1e-2)
        assert x["waits"]["kernels"] > 50 and 0 <= x["waits"]["idle_share"] < 1
        assert all(one["celsius"] >= 61 and one["sm_mhz_least"] in (1755, 1980) for one in x["devices"])
        assert len(x["devices"]) == len(x["rounds"])
    assert [len(x["rounds"]) for x in own] == [1] * 2 + [2] * 2
    (failed,) = {x["why"] for x in output if x["kind"] == "failed" and x["row"] == row}
    assert "precision.fp8" in failed  # wants a GPU: named, and the others go on
    order = [(x["kind"], x["system"]) for x in output if "system" in x and x["row"] == row]
    assert order[-2:] == [("failed", "ours-fp8"), ("left out", "ours-torch")], "after the most telling ones"
    (left,) = (x for x in output if x["kind"] == "left out" and x["row"] == row)
    assert (left["system"], left["why"]) == ("ours-torch", "here it would be ours again")
    table = (session / "gpu.md").read_text()
    assert table.count("- tiny 32, ours: ") == 1 and "| 1980 (1980), 640, 61" in table.replace("640.5", "640")


def test_one_rank_of_65b(session: Path) -> None:
    output = read(session / "gpu_rank.json")["runs"]
    assert [(x["position"], x["schedule"]) for x in output] == [(p, s) for p in (1, 3, 0) for s in ("zb-h1", "1f1b")]
    for x in output:
        backward = {"input gradient", "weight gradient"} if x["schedule"] == "zb-h1" else {"backward"}
        kinds = {"forward"} | backward
        assert set(x["times"]) == {*kinds, "pipeline"}
        assert all(x["times"][kind]["count"] == 4 and x["times"][kind]["device_ms"] > 0 for kind in kinds)
        assert x["planned_bytes"] > x["persistent_bytes"] > 0
        assert len(x["every_step"]) == 4 and x["gpu"]["watts"] > 600
    assert (session / "gpu_rank.md").read_text().count("tiny, stage") == 6


def test_ranks_over_one_device(session: Path) -> None:
    (row,) = read(session / "gpu_nccl.json")["rows"]
    assert row["within limits"] == "yes" and int(row["ranks"]) > 1 and 0 < float(row["norm bf16"]) < 5e-2
    assert (session / "gpu_nccl.md").read_text().count("| yes |") == 1


SLEEPS = "import sys, time; print('begun', *sys.argv[1:], flush=True); time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPS}"


def sessions(monkeypatch: pytest.MonkeyPatch, out: Path, seconds: float, *stages: Any) -> gpu_session.Session:
    monkeypatch.setattr(gpu_session, "STAGES", stages)
    monkeypatch.setattr(gpu_session, "GRACE", 0.3)
    return gpu_session.Session(argparse.Namespace(device="cpu", out=out, seconds=seconds))


def test_a_stage_ends_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that does not listen; the next has its own time, and what was known is written before it."""
    first = {"deaf": ("-c", STUBBORN), "slow": ("-c", SLEEPS, "{left}")}
    second = {"quick": ("-c", "print('done')"), "bad": ("-c", "raise SystemExit(3)")}
    session = sessions(monkeypatch, tmp_path, 4.0, ("a", 0.5, first), ("b", 1.0, second), ("c", 1.0, second))
    assert not session.run()
    found = {one["command"]: one for one in session.done}
    assert (found["slow"]["status"], found["deaf"]["status"]) == (-signal.SIGTERM, -signal.SIGKILL)
    assert found["slow"]["last"] == "begun 1" and 2.0 <= found["slow"]["until"] < 2.3
    assert found["deaf"]["until"] < 3.0
    assert read(tmp_path / "session.json")["stages"] == session.done
    assert [found[name]["status"] for name in ("quick", "bad")] == [0, 3] and found["quick"]["last"] == "done"


def test_what_a_stage_leaves_the_next_one_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"quick": ("-c", "import sys; print(sys.argv[1])", "{left}")}
    late = {"late": ("-c", "import sys; print(sys.argv[1])", "{left}")}
    session = sessions(monkeypatch, tmp_path, 100.0, ("a", 0.1, quick), ("b", 0.9, late), ("c", 0.0, late))
    assert not session.run()
    assert [one.get("last") for one in session.done[:2]] == ["9", "89"]
    assert session.done[2]["status"] == "not begun, the time was over"


def test_a_session_that_is_told_to_end_leaves_what_it_had_and_nothing_running(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu_session
gpu_session.STAGES = (("a", 0.5, {{"quick": ("-c", "print(1)")}}), ("b", 1.0, {{"slow": ("-c", {SLEEPS!r})}}))
sys.argv = ["gpu_session.py", "--device", "cpu", "--seconds", "100", "--out", {str(tmp_path)!r}]
sys.exit(gpu_session.main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not ((tmp_path / "slow.log").exists() and (tmp_path / "slow.log").read_text()):
            assert time.monotonic() < end
            time.sleep(0.05)
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
    assert [one["command"] for one in read(tmp_path / "session.json")["stages"]] == ["quick"]
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _readable(path)]
    assert not any(SLEEPS.encode() in line and b"gpu_session" not in line for line in running)


def _readable(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


BARE = """
import sys
sys.path[:0] = [{benchmarks!r}, {drivers!r}, {root!r}]

class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {absent!r} else find(name, *rest)
sys.meta_path.insert(0, Bare())
import gpu, gpu_rank, gpu_nccl
gpu.Measurement(gpu.Row("tiny", 32, ("ours",), 1, 1, 64, (), "cpu")).run()
sys.argv = ["gpu_rank.py", "--device", "cpu", "--steps", "1", "--schedules", "1f1b"]
sys.exit(gpu_rank.main())
"""


def test_a_bare_machine_needs_torch_numpy_and_what_is_carried(tmp_path: Path) -> None:
    """Nothing else that this package is installed with; and a session says what is missing of that."""
    absent = ("rich", "sentencepiece", "google", "tokenizers", "safetensors", "regex", "tensorboard", "transformers")
    folders = {"benchmarks": ROOT / "benchmarks", "drivers": ROOT / "benchmarks" / "drivers", "root": ROOT}
    code = BARE.format(absent=absent, **{name: str(path) for name, path in folders.items()})
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert '"kind": "result"' in done.stdout


def test_what_is_missing_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch", "numpy", "pydantic", "pytest"}
    monkeypatch.setattr(gpu_session.importlib.util, "find_spec", lambda name: name if name in there else None)
    assert gpu_session.missing() == "transformers is missing: nothing to compare with"
    there.remove("pydantic")
    with pytest.raises(SystemExit, match="error: pydantic cannot be imported; run 'make gpu-carry' where"):
        gpu_session.missing()


def test_the_commit_is_known_without_git(tmp_path: Path) -> None:
    (tmp_path / "megallama").mkdir()
    (tmp_path / "megallama" / "a.py").write_text("a = 1\n")
    before = report.commit(tmp_path)
    assert before.startswith("unknown (without git; sources ")
    (tmp_path / ".carry").mkdir()
    (tmp_path / ".carry" / "COMMIT").write_text("0123456789ab-dirty\n")
    assert report.commit(tmp_path) == before.replace("unknown", "0123456789ab-dirty")
    (tmp_path / "megallama" / "a.py").write_text("a = 2\n")
    assert report.commit(tmp_path).startswith("0123456789ab-dirty (without git")
    assert report.commit(tmp_path)[-13:] != before[-13:], "other sources"
    if (ROOT / ".git").exists():
        assert " (without git" not in report.commit()


def test_the_time_between_kernels() -> None:
    """Overlapping ones count once; the time before the first and after the last does not count."""
    found = gpu_state.waits([(100.0, 150.0), (110.0, 130.0), (150.0, 160.0), (180.0, 200.0), (190.0, 300.0)])
    assert found == {"kernels": 5, "span_ms": 0.2, "idle_share": 0.1, "longest_gap_us": 20.0}
    assert gpu_state.waits([]) == {"kernels": 0, "span_ms": 0.0, "idle_share": 0.0, "longest_gap_us": 0.0}
