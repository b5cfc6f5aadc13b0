"""examples/curate/curate.sbatch, with srun replaced by a script that records how it was called."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.curate.recipes import EXAMPLES, ROOT

SCRIPT = EXAMPLES / "curate.sbatch"


def submit(folder: Path, status: int) -> tuple[int, str]:
    """Exit status of the script, and the arguments of srun."""
    (folder / "srun").write_text(f'#!/bin/sh\necho "$@" > {folder}/call\nexit {status}\n')
    (folder / "srun").chmod(0o755)
    env = {"PATH": f"{folder}:/usr/bin:/bin", "RECIPE": "r.toml", "OUT": "/data/out", "SLURM_CPUS_PER_TASK": "16"}
    env |= {"SLURM_ARRAY_TASK_ID": "3"}
    done = subprocess.run(["bash", str(SCRIPT), "--quiet"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "task 3, 16 processes on" in done.stdout
    return done.returncode, (folder / "call").read_text()


def test_a_task_is_the_command_itself(tmp_path: Path) -> None:
    assert SCRIPT.read_text().startswith("#!/usr/bin/env bash\n") and "#SBATCH --requeue\n" in SCRIPT.read_text()
    words = "-u -m megallama curate r.toml --output /data/out --workers 16 --quiet\n"
    words = f"--kill-on-bad-exit=1 .venv/bin/python {words}"
    assert submit(tmp_path, 0) == (0, words)
    assert submit(tmp_path, 3) == (3, words)
