"""What an earlier version wrote is read for ever: its runs continue with the same bits, its tools' files open.

The bits of a step depend on the processor's instructions: on another one than `made_on.json` names, a continued run is
close, while everything that is only read or copied is still equal to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
V1 = Path(__file__).parent / "v1"
RUN = "tests.frozen.runs:run"
QUIET = ["log.tensorboard=false", "log.plot=false", "run.peak_tflops=1"]
STEP = "checkpoints/step-00000003"


def same_processor() -> bool:
    """Whether this is the kind of processor, and the torch, that wrote the files."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    made: list[str] = json.loads((V1 / "made_on.json").read_text())["processor"]
    return made == [model, torch.backends.cpu.get_cpu_capability(), torch.__version__]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy that runs may write into."""
    shutil.copytree(V1, tmp_path / "v1")
    return tmp_path / "v1"


def settings(folder: Path, dtype: str, *more: str) -> list[str]:
    """The overrides that make the paths of a frozen configuration absolute."""
    data = folder / "data"
    paths = {"run.folder": folder / dtype, "data.train": data / "text_train", "data.valid": data / "text_valid",
             "data.tokenizer": data / "tokenizer.json"}  # fmt: skip
    return [*(f'{name}="{path}"' for name, path in paths.items()), *QUIET, *more]


def tensors(manifest: Path) -> dict[str, Any]:
    """The blocks of a checkpoint's tensor files, digested as that version did: as said, or from what is written."""
    record = json.loads(manifest.read_text())
    files, size = {name for name in record["files"] if name.endswith(".safetensors")}, record["block_bytes"]
    if not (manifest.parent / "model").exists():
        return {name: record["files"][name]["blocks"] for name in files}
    raw = {name: (manifest.parent / name).read_bytes() for name in files}
    parts = {name: [data[i : i + size] for i in range(0, len(data), size)] for name, data in raw.items()}
    return {name: [hashlib.sha256(part).hexdigest()[:32] for part in found] for name, found in parts.items()}


def losses(file: Path) -> list[tuple[str, int, float]]:
    """Kind, step and loss of every line of metrics.jsonl."""
    return [(r["kind"], r["step"], r["loss"]) for r in map(json.loads, file.read_text().splitlines()) if "loss" in r]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("layout", ["tp2 pp2", "dp2"])
def test_a_run_continues(pool: Pool, folder: Path, dtype: str, layout: str) -> None:
    own = layout == "tp2 pp2"
    more = [] if own else ["parallel.tp=1", "parallel.pp=1"]
    toml = str(folder / f"{dtype}.toml")
    answers = pool.run(4 if own else 2, RUN, toml, settings(folder, dtype, *more))
    assert [a.get("status") for a in answers] == [0] * len(answers), answers
    run, expected = folder / dtype, folder / f"{dtype}.expected"
    got, want = losses(run / "metrics.jsonl"), losses(expected / "metrics.jsonl")
    assert sorted(line[:2] for line in got) == sorted(line[:2] for line in want)
    assert sorted(got)[:3] == sorted(want)[:3], "the lines before the resume stay as they were"
    if own and same_processor():
        assert sorted(got) == sorted(want)
        for step in (4, 6):
            saved = run / "checkpoints" / f"step-{step:08d}" / "manifest.json"
            assert tensors(saved) == tensors(expected / f"manifest-{step}.json")
    if dtype == "fp32":  # its file asks for the linear schedule of that version
        output = (run / "logs" / "rank-0000.log").read_text()
        assert "since then: lr_schedule" not in output and "since then: the learning-rate" not in output
    for ours, theirs in zip(sorted(got), sorted(want), strict=True):
        assert ours[2] == pytest.approx(theirs[2], rel=1e-3 if dtype == "bf16" else 1e-5)


def test_damaged_old_and_unfinished_folders_are_known(pool: Pool, folder: Path) -> None:
    log, checkpoints = folder / "fp32" / "run.log", folder / "fp32" / "checkpoints"
    damaged = {p.name: p.read_bytes() for p in (checkpoints / "step-00000004.damaged").rglob("*") if p.is_file()}
    overrides = settings(folder, "fp32", "train.steps=4", "train.eval_interval=0")
    answers = pool.run(4, RUN, str(folder / "fp32.toml"), overrides)
    assert [a.get("status") for a in answers] == [0] * 4, answers
    text = log.read_text()
    assert "restored step-00000002" in text and "removed step-00000005.tmp" in text and "resumed after step 3" in text
    names = sorted(p.name for p in checkpoints.glob("step-*"))
    assert names == ["step-00000002", "step-00000003", "step-00000004", "step-00000004.damaged"]
    assert damaged == {p.name: p.read_bytes() for p in (checkpoints / names[-1]).rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_step_folder_rewritten_has_the_same_bytes(folder: Path, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "again"
    tool("reshard_checkpoint.py", folder / dtype / STEP, out, "--to", "step")
    assert tensors(out / "step-00000003" / "manifest.json") == tensors(folder / dtype / STEP / "manifest.json")


def test_the_tools_read_them(folder: Path, tmp_path: Path) -> None:
    step, data = folder / "bf16" / STEP, folder / "data"
    assert "verified" in tool("inspect_checkpoint.py", step, "--verify")
    assert tool("generate.py", folder / "bf16", "--prompt", "the quick", "--max-tokens", "4", "--temperature", "0")
    assert "documents" in tool("inspect_data.py", data / "text_train")
    tool("merge_datasets.py", data / "text_train", data / "text_valid", "--output", tmp_path / "merged")
    facts = [json.loads(Path(f"{prefix}.json").read_text()) for prefix in (data / "text_train", tmp_path / "merged")]
    assert facts[0]["documents"] == 96 and facts[1]["documents"] == 120
    overrides = [text for text in settings(folder, "bf16") if not text.startswith("run.peak")]
    assert tool("explain_step.py", folder / "bf16.toml", "2", *overrides)
    weights = load_file(step / "model" / "model-00001-of-00001.safetensors")
    master = load_file(step / "optimizer" / "master-00001-of-00001.safetensors")
    assert {name: t.bfloat16().float().sum() for name, t in master.items()} == {
        name: t.float().sum() for name, t in weights.items()
    }


def test_a_preprocessing_killed_half_way_goes_on(folder: Path, tmp_path: Path) -> None:
    """The digest that names the folder of parts is of absolute names and times: it is made here as it was then."""
    text, half = folder / "data" / "text.jsonl", folder / "half"
    stat = text.stat()
    tokenizer = hashlib.sha256((folder / "data" / "tokenizer.json").read_bytes()).hexdigest()
    origin = {"layout": (1, 2000, 1 << 30, 20_000, 64), "files": [(str(text), stat.st_size, stat.st_mtime_ns)],
              "tokenizer": tokenizer, "key": "text", "limit": 16 << 20}  # fmt: skip
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
    parts = next((half / "text.parts").glob("*/"))
    parts.rename(parts.with_name(digest[:16]))
    code = (
        "import sys, hashlib; from megallama.text import preprocess, workers; preprocess.TASK_BYTES = 2000\n"
        "run, jobs = preprocess.WorkerPool.run, []\n"
        "note = lambda todo: jobs.extend(job.number for job in todo)\n"
        "preprocess.WorkerPool.run = lambda self, todo, *rest: note(todo) or run(self, todo, *rest)\n"
        "from megallama.cli import command; status = command('prepare')(); print('jobs', jobs)\n"
        "sys.exit(status)"
    )
    arguments = ["data/text.jsonl", "--tokenizer", "data/tokenizer.json", "--output", "half/text", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments, "--quiet"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "jobs [3, " in done.stdout, done.stdout
    whole = b"".join((folder / "data" / f"text_{part}.bin").read_bytes() for part in ("train", "valid"))
    joined = (half / "text.bin").read_bytes()
    assert sorted(joined[i : i + 2] for i in range(0, len(joined), 2)) == sorted(
        whole[i : i + 2] for i in range(0, len(whole), 2)
    )
    assert not (half / "text.parts").exists()


def tool(name: str, *arguments: object) -> str:
    """What a tool prints; it must succeed."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout
