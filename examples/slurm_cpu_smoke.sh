#!/usr/bin/env bash
# Does training work under this Slurm, and does it go on after a requeue? Four CPU ranks (gloo), the `debug` preset and the
# text of this repository; a minute of work, and the pause that Slurm makes before a requeued job starts again (often two
# minutes):
#   sbatch examples/slurm_cpu_smoke.sh && tail -F megallama-smoke.out
# Submit from the repository. REQUEUE=no goes on inside the same job, for clusters that do not let users requeue. Options for
# the training program may follow: sbatch examples/slurm_cpu_smoke.sh parallel.tp=1
#SBATCH --job-name=megallama-smoke
#SBATCH --nodes=1
#SBATCH --ntasks=4
#SBATCH --overcommit
#SBATCH --time=15
#SBATCH --output=megallama-smoke.out
#SBATCH --open-mode=append
#SBATCH --requeue

set -euo pipefail
python=${PYTHON:-.venv/bin/python}
steps=200
run=runs/slurm-smoke-$SLURM_JOB_ID
data=$run/data
mkdir -p "$data"
# Job ids come back when a Slurm is set up anew: nothing of an earlier run may be taken for this one's.
[[ ${SLURM_RESTART_COUNT:-0} != 0 ]] || rm -rf "$run"/{stopped,metrics.jsonl,checkpoints,*-rank-*.log}
say() { echo "$(date +%T) $*"; }
say "start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $SLURM_NTASKS ranks; logs: $run/rank-*.log"

if [[ ! -e $data/text_valid.idx ]]; then
  for file in README.md docs/*.md megallama/*/*.py; do cp "$file" "$data/$(echo "$file" | tr / -).txt"; done
  "$python" tools/train_tokenizer.py "$data" --vocab-size 512 --output "$data/tokenizer.model" --threads 1 --quiet
  "$python" tools/preprocess_data.py "$data/*.txt" --tokenizer "$data/tokenizer.model" --output "$data/text" \
    --split-valid 0.1 --workers 1 --quiet
fi

train() {  # train LOGS OPTIONS...: all ranks; their exit status
  local logs=$1
  shift
  srun --overcommit --ntasks=4 --kill-on-bad-exit=0 --wait=60 --output="$run/$logs-rank-%t.log" "$python" -u \
    -m megallama.pretrain examples/debug.toml run.device=cpu run.folder="$run" data.synthetic=false \
    data.train="$data/text_train" data.valid="$data/text_valid" data.tokenizer="$data/tokenizer.model" \
    optimizer.lr=3e-3 train.steps=$steps eval.interval=100 parallel.tp=2 parallel.pp=2 "$@"
}

fail() {
  say "smoke test FAILED: $*"
  tail -n 20 "$run"/*rank-0.log
  exit 1
}

if [[ ! -e $run/stopped ]]; then
  # The first start is stopped on its way, as a preemption or the time limit would: Slurm signals the ranks, they save.
  (
    for _ in $(seq 300); do
      if grep -qs '"step": 40,' "$run/metrics.jsonl"; then scancel --signal=TERM "$SLURM_JOB_ID.0"; exit; fi
      sleep 0.2
    done
  ) &
  status=0
  train first train.stop_after_steps=150 || status=$?
  [[ $status == 75 ]] || fail "the first start ended with status $status; 75 (saved and left early) was expected"
  touch "$run/stopped"
  say "stopped as asked: $(grep -h -i 'signal\|saved' "$run/first-rank-0.log" | tail -n 1)"
  if [[ ${REQUEUE:-yes} != no ]] && scontrol requeue "$SLURM_JOB_ID"; then
    say "requeued; Slurm ends this start and makes another"
    sleep 60
    fail "Slurm did not end this start within a minute of the requeue"
  fi
  say "not requeued; going on in the same job"
fi

status=0
train second || status=$?
[[ $status == 0 ]] || fail "the second start ended with status $status"
grep -h -m 1 "resumed after step" "$run/second-rank-0.log" || fail "the second start began anew instead of resuming"
"$python" - "$run/metrics.jsonl" "$steps" <<'PYTHON' || fail "the numbers above are not those of one whole run"
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
done = [(row["step"], row["loss"]) for row in rows if "grad_norm" in row]
first, last = (sum(loss for _, loss in part) / 5 for part in (done[:5], done[-5:]))
print(f"steps {done[0][0]} to {done[-1][0]}, {len(done)} of them; loss {first:.3f} -> {last:.3f}")
sys.exit([step for step, _ in done] != list(range(1, int(sys.argv[2]) + 1)) or not last < first - 1)
PYTHON
say "smoke test passed"
