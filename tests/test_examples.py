"""The examples are what the README says: every file loads, the numbers are the paper's, the scripts are sound."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megallama.config.errors import ConfigError
from megallama.config.load import load
from megallama.forecast.forecast import forecast, search
from megallama.forecast.hardware import load_hardware
from megallama.plan.exchange import exchange
from megallama.plan.plan import make_plan

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RANKS = {  # file -> ranks it is meant for
    "debug.toml": 1,
    "quickstart.toml": 4,
    "long_context.toml": 1,
    "llama_7b.toml": 512,
    "llama_13b.toml": 1024,
    "llama_33b.toml": 2048,
    "llama_65b.toml": 2048,
    "llama_mixture.toml": 2048,
    "llama3_8b_8k.toml": 128,
    "llama3_8b_128k.toml": 128,
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


@pytest.mark.parametrize("name", [n for n in PAPER if RANKS[n] > 8])
def test_example_can_be_planned(name: str) -> None:
    """tools/plan.py takes it at its number of ranks, and the worst rank fits into 80 GB with a tenth to spare."""
    command = [sys.executable, "tools/plan.py", f"examples/{name}", f"ranks={RANKS[name]}"]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    p = load(EXAMPLES / name, (), ranks=RANKS[name]).parallel
    dp = RANKS[name] // (p.tp * p.pp)
    assert f"tp={p.tp} x pp={p.pp} x dp={dp} = {RANKS[name]} ranks" in done.stdout
    assert "2048 sequences x 2048 = 4,194,304 tokens per step" in done.stdout
    assert 8 % p.tp == 0, "tensor parallelism stays inside a node of 8"
    plan = make_plan(load(EXAMPLES / name, (), ranks=RANKS[name]), RANKS[name])
    assert max(plan.memory(rank).total for rank in range(p.pp)) < 0.8 * 80e9


def directives(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (\S+)", (EXAMPLES / script).read_text(), re.M)


@pytest.mark.parametrize("name", ["llama_7b", "llama_13b", "llama_33b", "llama_65b"])
def test_sbatch_starts_as_many_tasks_as_the_layout_has_ranks(name: str, tmp_path: Path) -> None:
    """And it ends in slurm_pretrain.sbatch with the same directives but for the name and the number of nodes."""
    ours, general = directives(f"{name}.sbatch"), directives("slurm_pretrain.sbatch")
    values = dict(d.partition("=")[::2] for d in ours)
    assert int(values["--nodes"]) * int(values["--ntasks-per-node"]) == RANKS[f"{name}.toml"]
    assert values["--ntasks-per-node"] == values["--gpus-per-node"] == "8"
    own = ("--job-name", "--nodes")
    assert [d for d in ours if not d.startswith(own)] == [d for d in general if not d.startswith(own)]
    assert {"--requeue", "--open-mode=append", "--signal=TERM@300"} <= set(ours)
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/srun.txt\n')
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "8", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = ["bash", str(EXAMPLES / f"{name}.sbatch"), "train.steps=5"]
    done = subprocess.run(command, cwd=tmp_path, env=job, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "srun.txt").read_text().endswith(f"-m megallama.pretrain examples/{name}.toml train.steps=5\n")


@pytest.mark.parametrize("name", [n for n in PAPER if n != "llama_mixture.toml"])
def test_the_heading_of_an_example_is_true(name: str) -> None:
    """Ranks, memory, micro-batches, chunks, bubble, steps and tokens in its first lines are those of the plan."""
    heading, ranks = (EXAMPLES / name).read_text().partition("[model]")[0], RANKS[name]
    heading = " ".join(line.lstrip("# ") for line in heading.splitlines())
    config = load(EXAMPLES / name, (), ranks=ranks)
    parallel, plan = config.parallel, make_plan(config, ranks)
    assert f"laid out for {ranks} A100-80GB" in heading and f"ranks={ranks}" in heading
    assert f"{config.train.steps} steps are {PAPER[name][2] / 1e12:.1f}T tokens" in heading
    assert f"sbatch examples/{Path(name).stem}.sbatch" in heading and f"{ranks // 8} nodes" in heading
    gib = max(plan.memory(rank).total for rank in range(parallel.pp)) / 2**30
    assert int(re.findall(r"(\d+) GiB", heading)[-1]) == pytest.approx(gib, rel=0.1)
    micro = 2048 // (ranks // (parallel.tp * parallel.pp)) // config.batch.micro_batch_size
    assert f"{micro} micro-batches a step" in heading
    if parallel.schedule == "1f1b":  # the bubble: (pp - 1) / (chunks x micro-batches) (Narayanan et al. 2021)
        assert f"{parallel.chunks} chunks of {config.model.num_layers // (parallel.pp * parallel.chunks)}" in heading
        assert f"{parallel.pp - 1}/{parallel.chunks * micro} " in heading
    else:
        assert f"{parallel.chunks} chunks per rank" in heading
    best, legal, _ = search(config, ranks, load_hardware("a100-80g"), "flash2")
    output = float(re.findall(r"([\d,]+) tokens/s per GPU", heading)[0].replace(",", ""))
    assert f"of {legal:,} legal ones" in heading
    ours = forecast(plan, load_hardware("a100-80g"), "flash2").prediction.tokens_per_second
    assert output == pytest.approx(ours, rel=0.005) and ours > 0.99 * best[0].prediction.tokens_per_second


STAGES = {  # tokens of a sample -> its layout on 128 H100
    8192: "parallel.pp=2 parallel.chunks=6",
    16384: "parallel.tp=2 batch.micro_batch_size=2",
    32768: "parallel.tp=2",
    65536: "parallel.cp=8",
    131072: "parallel.tp=4 parallel.cp=2",
}


@pytest.mark.parametrize("length", [8192, 131072])
def test_an_example_of_long_contexts_is_what_its_heading_says(length: int) -> None:
    """Layout, memory, speed, exchange and tokens; and that the search finds nothing more than 1 % faster."""
    name, h100 = f"llama3_8b_{length // 1024}k.toml", load_hardware("h100")
    heading = (EXAMPLES / name).read_text().partition("[model]")[0]
    heading = " ".join(line.lstrip("# ") for line in heading.splitlines())
    config = load(EXAMPLES / name, (), ranks=128).at(-1)  # of several phases the last
    assert {phase.step_tokens for phase in config.train.phases} <= {4 * 2**20}
    assert config.batch.global_batch_size * config.batch.seq_length == 4 * 2**20 and config.data.document_mask
    f = forecast(make_plan(config, 128), h100, "flash3")
    assert f.fits and f"{f.prediction.tokens_per_second:,.0f} tokens/s per GPU" in heading
    state, peak = max(f.plan.memory(r).total for r in range(f.job.pp)) / 2**30, max(f.peaks) / 2**30
    assert f"{state:.0f} GiB of state" in heading and f"{peak:.0f} with buffers" in heading
    assert f"{config.train.steps - 238419 * (length > 8192)} " in heading
    best, legal, _ = search(config, 128, h100, "flash3")
    assert f"of {legal:,} legal ones" in heading
    assert f.prediction.tokens_per_second > 0.99 * best[0].prediction.tokens_per_second
    assert f.job.cp == 1 or exchange(config) == ("gather", "cp=2 is not above 2/3 x (1 + 8 / 2) = 3.33")


def test_the_table_of_stages() -> None:
    heading, h100 = (EXAMPLES / "llama3_8b_128k.toml").read_text(), load_hardware("h100")
    for length, layout in STAGES.items():
        words = ["model.preset=llama3.1-8b", f"batch.seq_length={length}", "batch.micro_batch_size=1"]
        words += [f"batch.global_batch_size={2**22 // length}", "memory.recompute=selective", *layout.split()]
        p = forecast(make_plan(load(None, words, ranks=128, need_data=False), 128), h100, "flash3").prediction
        (row,) = re.findall(rf"#  +{length} .*", heading)
        assert row.split()[-3:] == [f"{p.tokens_per_second:,.0f}", f"{100 * p.mfu_full:.1f}", "%"], row


SCRIPTS = sorted(str(p.relative_to(EXAMPLES)) for p in EXAMPLES.rglob("*") if p.suffix in (".sbatch", ".sh"))


@pytest.mark.parametrize("script", SCRIPTS)
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


KEPT, GOES_ON = "--kill-on-bad-exit=0 --wait=120 --output=", "--no-kill --kill-on-bad-exit=0 --wait=0 --output="


@pytest.mark.parametrize(
    ("file", "arguments", "flags"),
    [
        ("[run]\nmax_replacements = 0\n", [], KEPT),
        ("[run]\nseed = 3\n", ["train.steps=5"], KEPT),
        ("[run]\n", ["run.max_replacements=20", "train.steps=5"], GOES_ON),
        ("[run]\nmax_replacements = 20  # times\n", ["train.steps=5"], GOES_ON),
        ("[run]\nmax_replacements = 20\n", ["--run.max_replacements=0"], KEPT),
        ("[run]\n", ["run.max_replacements=0", "--run.max_replacements=7"], GOES_ON),
        ("", ["run.max_replacements=1"], GOES_ON),  # without a file
    ],
)
def test_sbatch_lets_a_run_go_on_whose_ranks_are_replaced(
    tmp_path: Path, file: str, arguments: list[str], flags: str
) -> None:
    """Only then: a lost node is not the end of the job, and nobody is killed because another has left."""
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@" > srun.txt\n')
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "my.toml").write_text(file)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "8", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = ["bash", str(EXAMPLES / "slurm_pretrain.sbatch"), *(["my.toml"] if file else []), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=job, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "srun.txt").read_text().startswith(flags)
    assert (tmp_path / "srun.txt").read_text().endswith(" ".join(["megallama.pretrain", *command[2:]]) + "\n")


CONTAINERS = {  # script -> the image, and how srun is called to set up and to train
    "pyxis": (
        "nvcr.io#nvidia/pytorch:YY.MM-py3",
        "--nodes=1 --ntasks=1 --ntasks-per-node=1 {at} python3 tools/setup_env.py .venv-image base",
        "--cpu-bind=none {at} .venv-image/bin/python -u -m megallama.pretrain my.toml train.steps=5",
        "--container-image=nvcr.io#nvidia/pytorch:YY.MM-py3 --container-mounts={cwd}:{cwd},/data "
        "--container-workdir={cwd} --no-container-mount-home",
    ),
    "apptainer": (
        "pytorch.sif",
        "--nodes=1 --ntasks=1 --ntasks-per-node=1 {at} python3 tools/setup_env.py .venv-image base",
        "--cpu-bind=none {at} .venv-image/bin/python -u -m megallama.pretrain my.toml train.steps=5",
        "apptainer exec --nv --bind {cwd},/data --pwd {cwd} pytorch.sif",
    ),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_sbatch_in_a_container_sets_up_once_and_trains_in_it(tmp_path: Path, name: str) -> None:
    """Its own directives are those of the general script; where the image is refused nothing is trained."""
    assert directives(f"slurm/{name}.sbatch") == directives("slurm_pretrain.sbatch")
    image, *wanted, at = CONTAINERS[name]
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@" >> srun.txt\ncase "$*" in *setup_env*) exit $SET_UP;; esac\n')
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / ".venv-image").mkdir()
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "8", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    job |= {"IMAGE": image, "MOUNTS": "/data"}
    command = ["bash", str(EXAMPLES / "slurm" / f"{name}.sbatch"), "my.toml", "train.steps=5"]
    at = at.format(cwd=tmp_path)
    first, second = (text.format(at=at) for text in wanted)
    for set_up, status, calls in (("1", 1, [first]), ("0", 0, [first, second]), ("1", 0, [second])):
        done = subprocess.run(command, cwd=tmp_path, env=job | {"SET_UP": set_up}, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        said = (tmp_path / "srun.txt").read_text().splitlines()
        assert [line[-len(call) :] for line, call in zip(said, calls, strict=True)] == calls
        (tmp_path / "srun.txt").unlink()
    job.pop("IMAGE")
    done = subprocess.run(command, cwd=tmp_path, env=job, capture_output=True, text=True)
    assert done.returncode != 0 and "IMAGE: the image, such as " in done.stderr


SMOKE = EXAMPLES / "slurm_cpu_smoke.sh"
TRAIN = """
awk -v from=$FROM -v to=$TO -v learns=$LEARNS 'BEGIN { for (s = from; s <= to; s++)
  printf "{\\"step\\": %d, \\"loss\\": %g, \\"grad_norm\\": 1.0}\\n", s, 6 - 0.02 * s * learns }' >> $RUN/metrics.jsonl
if [ $FROM -gt 1 ]; then echo "12:00:00 resumed after step $((FROM - 1))" > $RUN/second-rank-0.log; fi
touch $RUN/first-rank-0.log $RUN/second-rank-0.log
exit $STATUS
"""


def smoke(folder: Path, status: int, first: int, last: int, learns: int = 1, **env: str) -> tuple[int, str, list[str]]:
    """One start of the smoke test with every command of Slurm replaced: its status, its words, what was called.

    The training program writes the steps `first` to `last` and leaves with `status`.
    """
    run = folder / "runs" / "slurm-smoke-7"
    (run / "data").mkdir(parents=True, exist_ok=True)
    (run / "data" / "text_valid.idx").touch()
    for name, body in (("srun", TRAIN), ("scontrol", "exit $REFUSE"), ("scancel", ""),
                       ("sleep", "")):  # fmt: skip
        (folder / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {folder}/calls\n{body}\n')
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "4", "PATH": f"{folder}:/usr/bin:/bin",
           "PYTHON": sys.executable, "RUN": str(run), "STATUS": str(status), "FROM": str(first), "TO": str(last),
           "LEARNS": str(learns), "REFUSE": "0", **env}  # fmt: skip
    done = subprocess.run(["bash", str(SMOKE)], cwd=folder, env=job, capture_output=True, text=True)
    calls = (folder / "calls").read_text().splitlines()
    return done.returncode, done.stdout + done.stderr, [c for c in calls if not c.startswith(("sleep", "scancel"))]


def test_smoke_is_stopped_requeued_and_judged(tmp_path: Path) -> None:
    status, output, calls = smoke(tmp_path, 75, 1, 40)
    assert calls[-1] == "scontrol requeue 7" and "stopped as asked" in output
    assert "train.steps=200" in calls[0] and "data.synthetic=false" in calls[0] and "parallel.tp=2" in calls[0]
    assert status == 1, "a start that Slurm does not end after the requeue is a failure"
    status, output, calls = smoke(tmp_path, 0, 41, 200, SLURM_RESTART_COUNT="1")
    assert status == 0 and "steps 1 to 200, 200 of them; loss 5.940 -> 2.040" in output, output
    assert output.endswith("smoke test passed\n") and len([c for c in calls if c.startswith("srun")]) == 2


@pytest.mark.parametrize(
    ("status", "first", "last", "learns", "message"),
    [
        (1, 41, 60, 1, "smoke test FAILED: the second start ended with status 1"),
        (0, 1, 200, 1, "smoke test FAILED: the second start began anew instead of resuming"),
        (0, 31, 200, 1, "the numbers above are not those of one whole run"),  # steps done twice
        (0, 41, 190, 1, "the numbers above are not those of one whole run"),  # steps missing
        (0, 41, 200, 0, "the numbers above are not those of one whole run"),  # nothing learned
    ],
)
def test_smoke_finds_what_is_wrong(
    tmp_path: Path, status: int, first: int, last: int, learns: int, message: str
) -> None:
    smoke(tmp_path, 75, 1, 40, learns)
    left, output, _ = smoke(tmp_path, status, first, last, learns, SLURM_RESTART_COUNT="1")
    assert left == 1 and message in output, output


def test_smoke_goes_on_where_requeue_is_refused(tmp_path: Path) -> None:
    """The second srun of the same job leaves with 75 again, which is not the end of a run."""
    left, output, calls = smoke(tmp_path, 75, 1, 40, REFUSE="1")
    assert "not requeued; going on in the same job" in output and len(calls) == 3
    assert left == 1 and "the second start ended with status 75" in output


def test_smoke_must_be_stopped_first(tmp_path: Path) -> None:
    left, output, _ = smoke(tmp_path, 0, 1, 200)
    assert left == 1 and "the first start ended with status 0; 75 (saved and left early) was expected" in output


def test_smoke_takes_nothing_from_an_earlier_job_of_its_number(tmp_path: Path) -> None:
    smoke(tmp_path, 75, 1, 40)
    assert smoke(tmp_path, 0, 41, 200, SLURM_RESTART_COUNT="1")[0] == 0
    left, output, _ = smoke(tmp_path, 75, 1, 40)
    assert "stopped as asked" in output and "passed" not in output
