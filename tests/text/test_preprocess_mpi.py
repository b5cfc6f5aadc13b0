"""Preprocessing on MPI ranks: the bytes of one process, and no error leaves a rank waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megallama.commands.prepare import communicator
from megallama.text.preprocess import preprocess
from tests.text.test_resume import ROOT, digests, mpirun, run

PROGRAM = """
import json, sys
from mpi4py import MPI
from megallama.text import preprocess as module
from megallama.text import workers
module.TASK_BYTES, workers.REPORT_SECONDS = 5000, 0.0
workers.BLOCK_BYTES = 1000
seen = []
if MPI.COMM_WORLD.rank:
    workers.rank_main(MPI.COMM_WORLD)
else:
    module.preprocess(sys.argv[1:2], *sys.argv[2:4], progress=lambda *x: seen.append(x), comm=MPI.COMM_WORLD)
    print(json.dumps(seen))
"""


def start(ranks: int, *command: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    every = [*mpirun(ranks), sys.executable, *map(str, command)]
    return subprocess.run(every, env=env, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_bytes_are_those_of_one_process(jsonl: Path, tokenizer_path: Path, tmp_path: Path, ranks: int) -> None:
    corpus = tmp_path / "a.jsonl"
    corpus.write_bytes(jsonl.read_bytes() * 5 + b"bad\n" + jsonl.read_bytes())
    arguments = (corpus, "--tokenizer", tokenizer_path, "--split-valid", 0.1, "--split-test", 0.1)
    done = run(mpirun(ranks), 0, "end", 0, *arguments, "--output", tmp_path / "many")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("many_valid.bin: 180 documents") == 1  # only the first rank reports
    assert "skipped 1 bad record of 1,801 records (allowed are 0.1% in all and 10% of one file): 1 not" in done.stderr
    assert f"{corpus}:1501: not JSON" in done.stderr
    preprocess([corpus], tmp_path / "one", tokenizer_path, split_valid=0.1, split_test=0.1)
    assert digests(tmp_path / "many") == digests(tmp_path / "one") and len(digests(tmp_path / "one")) == 12


def test_progress_is_that_of_all_ranks(jsonl: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    done = start(2, "-c", PROGRAM, jsonl, tmp_path / "o", tokenizer_path)
    assert done.returncode == 0, done.stderr
    seen, total = json.loads(done.stdout), jsonl.stat().st_size
    assert seen[-1] == [total, total, json.loads((tmp_path / "o.json").read_text())["tokens"]]
    assert len(seen) > 2 * total // 5000 and all(0 < x[0] <= total and x[1] == total for x in seen)


@pytest.mark.parametrize("options, status, text", [
    (["gone.jsonl"], 2, "error: gone.jsonl does not exist; give a file"),
    (["--strict", "bad.jsonl"], 2, "bad.jsonl:1501: not JSON"),
    (["--max-bad", "0", "bad.jsonl"], 2, "1 of 1,501 records are bad, more than the 0 in all"),
    (["--workers", "2", "bad.jsonl"], 2, "--workers does not go with mpirun or srun"),
])  # fmt: skip
def test_an_error_ends_every_rank(
    jsonl: Path, tokenizer_path: Path, tmp_path: Path, options: list[str], status: int, text: str
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(jsonl.read_bytes() * 5 + b"bad\n")
    options = [str(tmp_path / x) if x == "bad.jsonl" else x for x in options]
    arguments = (*options, "--tokenizer", tokenizer_path, "--output", tmp_path / "o")
    done = run(mpirun(2), 0, "end", 0, *arguments)
    assert done.returncode == status and text in done.stderr, done.stderr
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".bin", ".idx", ".sums", ".json", ".tmp")]


def test_a_fault_in_another_rank_is_told_by_the_first(jsonl: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    program = PROGRAM.replace("if MPI", "if MPI.COMM_WORLD.rank: workers.dtype_for = lambda size: 1 / 0\nif MPI")
    program += "    raise SystemExit('not reached')\n"
    imports = "    from megallama.config.errors import DataError\n"
    program = program.replace("    module.pre", imports + "    try: module.pre")
    program = program.replace("    print(json.dumps(seen))", (
        "    except DataError as error: print('told:', error, flush=True); MPI.COMM_WORLD.Abort(3)"
    ))  # fmt: skip
    done = start(2, "-c", program, jsonl, tmp_path / "o", tokenizer_path)
    assert done.returncode == 3 and "told: a process failed:" in done.stdout, done.stdout + done.stderr
    assert "ZeroDivisionError" in done.stdout


def test_one_process_needs_no_mpi() -> None:
    assert communicator({}) is None
    assert communicator({"PMI_SIZE": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None


def test_ranks_that_do_not_see_one_another_are_refused(jsonl: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """srun without an MPI plugin: every task is alone."""
    mpirun(1)
    command = [sys.executable, "tools/preprocess_data.py", jsonl, "--tokenizer", tokenizer_path, "--output", tmp_path]
    env = {"PYTHONPATH": str(ROOT), "SLURM_STEP_NUM_TASKS": "2", "PATH": os.environ["PATH"]}
    done = subprocess.run([*map(str, command)], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode not in (0, 1)
    assert "2 processes were started but MPI connects 1 of them; use the mpirun of the MPI" in done.stderr
    assert "srun --mpi=pmi2 or --mpi=pmix" in done.stderr


def test_a_fault_of_the_program_in_the_first_rank_ends_all(jsonl: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """The other rank waits for work in MPI, and the first one's own exit would wait for it."""
    program = "import sys; from megallama.cli import command; from megallama.text import preprocess as module\n"
    program += "module._check_options = lambda *x: 1 / 0\nraise SystemExit(command('prepare')())"
    arguments = (jsonl, "--tokenizer", tokenizer_path, "--output", tmp_path / "o")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*mpirun(2), sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr
