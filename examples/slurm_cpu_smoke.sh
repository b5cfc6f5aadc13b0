#!/usr/bin/env bash
# Does training work under this Slurm? Four CPU ranks, a toy model, random tokens, half a minute:
#   sbatch examples/slurm_cpu_smoke.sh && tail -F megallama-smoke.out
#SBATCH --job-name=megallama-smoke
#SBATCH --nodes=1
#SBATCH --ntasks=4
#SBATCH --overcommit
#SBATCH --time=10
#SBATCH --output=megallama-smoke.out

set -euo pipefail
python=${PYTHON:-.venv/bin/python}
srun --overcommit --ntasks=4 --kill-on-bad-exit=0 --wait=60 "$python" -u -m megallama.pretrain examples/debug.toml \
  run.device=cpu run.folder="runs/slurm-smoke-$SLURM_JOB_ID" parallel.tp=2 parallel.pp=2 "$@"
echo "smoke test passed"
