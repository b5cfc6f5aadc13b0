"""examples/slurm_preprocess.sbatch, with srun replaced by a script that records how it was called, or by mpirun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megallama.data.indexed import IndexedDataset
from tests.text.test_resume import ROOT, mpirun

SCRIPT = ROOT / "examples" / "slurm_preprocess.sbatch"
SEVEN = ["commoncrawl", "c4", "github", "wikipedia", "books", "arxiv", "stackexchange"]
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "64"}


def submit(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    every = {"PATH": f"{folder}:/usr/bin:/bin", "TEXT": str(folder / "in"), "OUT": str(folder / "out"), **JOB, **env}
    return subprocess.run(["bash", str(SCRIPT), "--quiet"], cwd=ROOT, env=every, capture_output=True, text=True)


def recorder(folder: Path, status: int) -> Path:
    """An `srun` that notes its arguments."""
    (folder / "srun").write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\nexit {status}\n')
    (folder / "srun").chmod(0o755)
    return folder / "calls"


def test_script_is_valid_bash() -> None:
    done = subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert SCRIPT.read_text().startswith("#!/usr/bin/env bash\n") and "#SBATCH --requeue\n" in SCRIPT.read_text()


def test_every_source_is_one_step(tmp_path: Path) -> None:
    calls = recorder(tmp_path, 0)
    assert submit(tmp_path, MPI="pmix").returncode == 0
    lines = calls.read_text().splitlines()
    assert lines == [
        f"--mpi=pmix --kill-on-bad-exit=1 .venv/bin/python -u tools/preprocess_data.py {tmp_path}/in/{name} "
        f"--output {tmp_path}/out/{name} --tokenizer tokenizer.model --json-key text --quiet"
        for name in SEVEN
    ]
    calls.unlink()
    assert submit(tmp_path, SLURM_ARRAY_TASK_ID="3").returncode == 0
    assert calls.read_text().count("\n") == 1 and f"{tmp_path}/out/wikipedia " in calls.read_text()


def test_a_failure_ends_the_job(tmp_path: Path) -> None:
    calls = recorder(tmp_path, 3)
    assert submit(tmp_path).returncode == 3
    assert calls.read_text().count("\n") == 1


def test_two_ranks_do_the_sources_and_a_second_start_does_nothing(
    jsonl: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    for name in ("books", "arxiv"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.jsonl").write_bytes(jsonl.read_bytes())
    arguments = {"SOURCES": "books arxiv", "TOKENIZER": str(tokenizer_path), "MPIRUN": " ".join(mpirun(2)),
             "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}  # fmt: skip
    done = submit(tmp_path, **arguments)
    assert done.returncode == 0 and "done: books arxiv" in done.stdout, done.stdout + done.stderr
    assert IndexedDataset(tmp_path / "out" / "books").num_documents == 300
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = submit(tmp_path, **arguments)
    assert again.returncode == 0 and "books is finished" in again.stdout and "arxiv is finished" in again.stdout
    (tmp_path / "out" / "books.parts").mkdir()  # as if killed before the end
    assert "books: start 0" in submit(tmp_path, **arguments).stdout
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    changed = {p.name for p in before if before[p] != after.get(p)}
    assert changed == {f"books{suffix}" for suffix in (".bin", ".idx", ".json", ".sums")}
