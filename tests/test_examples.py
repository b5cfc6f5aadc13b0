"""The examples are what the README says: every file loads, the numbers are the paper's, the scripts are sound."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megallama.config.errors import ConfigError
from megallama.config.load import load

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RANKS = {  # file -> ranks it is meant for
    "debug.toml": 1,
    "quickstart.toml": 4,
    "llama_7b.toml": 512,
    "llama_13b.toml": 1024,
    "llama_33b.toml": 2048,
    "llama_65b.toml": 2048,
    "llama_mixture.toml": 2048,
}
PAPER = {  # Touvron et al. 2023, table 2: parameters, learning rate, tokens
    "llama_7b.toml": (6_738_415_616, 3.0e-4, 1.0e12),
    "llama_13b.toml": (13_015_864_320, 3.0e-4, 1.0e12),
    "llama_33b.toml": (32_528_943_616, 1.5e-4, 1.4e12),
    "llama_65b.toml": (65_285_660_672, 1.5e-4, 1.4e12),
    "llama_mixture.toml": (65_285_660_672, 1.5e-4, 1.4e12),
}


def test_every_example_is_in_the_table() -> None:
    assert {path.name for path in EXAMPLES.glob("*.toml")} == set(RANKS)


@pytest.mark.parametrize("name", RANKS)
def test_example_loads(name: str) -> None:
    config = load(EXAMPLES / name, (), ranks=RANKS[name])
    assert config.run.folder == f"runs/{Path(name).stem}"
    assert config.data.synthetic == (name == "debug.toml")


@pytest.mark.parametrize("name", RANKS)
def test_example_refuses_another_layout(name: str) -> None:
    with pytest.raises(ConfigError, match="parallel.tp=3 does not divide model.num_heads"):
        load(EXAMPLES / name, ("parallel.tp=3",), ranks=RANKS[name])


@pytest.mark.parametrize("name", PAPER)
def test_example_is_the_paper(name: str) -> None:
    config, (parameters, lr, tokens) = load(EXAMPLES / name, (), ranks=RANKS[name]), PAPER[name]
    m, b, o, s = config.model, config.batch, config.optimizer, config.lr_schedule
    attention = 4 * m.hidden_size**2
    layer = attention + 3 * m.hidden_size * m.ffn_hidden_size + 2 * m.hidden_size
    assert 2 * m.vocab_size * m.hidden_size + m.num_layers * layer + m.hidden_size == parameters
    batch_tokens = b.global_batch_size * b.seq_length
    assert batch_tokens == 4 * 2**20
    assert tokens <= config.train.steps * batch_tokens < tokens + batch_tokens
    assert (o.lr, o.beta1, o.beta2, o.weight_decay, o.clip_grad) == (lr, 0.9, 0.95, 0.1, 1.0)
    assert (s.kind, s.warmup_steps, s.min_ratio, s.decay_steps) == ("cosine", 2000, 0.1, config.train.steps)


@pytest.mark.parametrize("script", ["slurm_pretrain.sbatch", "slurm_cpu_smoke.sh"])
def test_script_is_valid_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n", EXAMPLES / script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (EXAMPLES / script).read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize(("status", "requeued", "left"), [(0, False, 0), (75, True, 0), (1, False, 1), (3, False, 3)])
def test_sbatch_requeues_exactly_after_a_save(tmp_path: Path, status: int, requeued: bool, left: int) -> None:
    """With srun and scontrol replaced by scripts that record how they were called."""
    for name, body in (("srun", f'echo "$@" > srun.txt; exit {status}'), ("scontrol", 'echo "$@" > scontrol.txt')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "8", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = ["bash", str(EXAMPLES / "slurm_pretrain.sbatch"), "a.toml", "x.y=1"]
    done = subprocess.run(command, cwd=tmp_path, env=job, capture_output=True, text=True)
    assert done.returncode == left, done.stdout + done.stderr
    called = (tmp_path / "srun.txt").read_text()
    assert called.endswith(".venv/bin/python -u -m megallama.pretrain a.toml x.y=1\n")
    assert "--output=runs/slurm/7-0/rank-%4t.log" in called
    assert (tmp_path / "scontrol.txt").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"
