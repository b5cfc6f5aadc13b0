"""The plan as a whole, its page, and the command line tool."""

from __future__ import annotations

import subprocess
import sys
from math import ceil
from pathlib import Path

import pytest

from megallama.analysis.communication import communication_table
from megallama.cli import command
from megallama.config.errors import ConfigError
from megallama.config.load import load
from megallama.plan.builders import build_forward, build_schedule
from megallama.plan.plan import make_plan
from megallama.plan.schedule import ScheduleError

ROOT = Path(__file__).parents[2]


def test_65b_on_2048_ranks() -> None:
    overrides = ["model.preset=llama-65b", "parallel.tp=8", "parallel.pp=8", "batch.micro_batch_size=1"]
    config = load(None, [*overrides, "batch.global_batch_size=2048"], ranks=2048, need_data=False)
    plan = make_plan(config, 2048)
    assert (plan.topology.dp, len(plan.stages), plan.schedule.num_microbatches) == (32, 8, 64)
    text = str(plan)
    for words in (
        "llama-65b: 65,285,660,672 parameters",
        "tp=8 x pp=8 x dp=32 = 2048 ranks, sequence parallel",
        "2048 sequences x 2048 = 4,194,304 tokens per step = 32 replicas x 64 micro-batches x 1",
        "398.190 GFLOP per token (causal attention); ",
        "in flight per rank 8 7 6 5 4 3 2 1",
        "70-79 (10)  8,357,322,752",
        "GiB per rank",
    ):
        assert words in text, words
    assert "grows" not in text  # its batches do not
    assert len(text.split("\n")) < 50 and max(map(len, text.split("\n"))) <= 120


def test_page_of_every_kind() -> None:
    ramp = ["batch.ramp_start=8", "batch.ramp_increment=8", "batch.ramp_samples=64"]
    config = load(None, ["model.preset=llama3.2-1b", "batch.seq_length=64", *ramp], ranks=2, need_data=False)
    text = str(make_plan(config, 2))
    assert config.parallel.sequence_parallel and "sequence parallel" not in text  # of one rank there is none
    assert "grows from 8 by 8 over the first 64 sequences" in text and "tied embeddings" in text
    # 4 steps of 8 or 16 or 24 sequences, then 32 to step 100
    assert f"100 steps, {64 * config.batch.samples_after(100):,} tokens" in text
    zb = load(None, ["model.preset=debug", "parallel.pp=4", "parallel.schedule=zb-h1"], ranks=4, need_data=False)
    assert "rank  0 |0011" in str(make_plan(zb, 4)) and "zb-h1" in str(make_plan(zb, 4))
    deep = load(None, ["model.num_layers=40", "parallel.pp=32"], ranks=32, need_data=False)
    assert str(make_plan(deep, 32)).count("\n") < 60
    empty = load(None, ["parallel.pp=8"], ranks=8, need_data=False)
    assert "none" in str(make_plan(empty, 8))


def test_schedules_of_other_sizes() -> None:
    plan = make_plan(load(None, ["parallel.pp=2"], need_data=False), 2)
    assert plan.schedule_for(8) is plan.schedule
    assert plan.schedule_for(3) == build_schedule(plan.config.parallel, 3)
    assert plan.schedule_for(3) is plan.schedule_for(3)
    assert plan.schedule_for(3, training=False) == build_forward(plan.schedule, 3)
    assert not plan.schedule_for(8, training=False).is_training


def test_both_schedules_of_an_uneven_batch_are_built_and_checked_at_once() -> None:
    words = ["parallel.pp=2", "batch.global_batch_size=20", "batch.uneven=true"]
    plan = make_plan(load(None, words, ranks=4, need_data=False), 4)
    assert [s.num_microbatches for s in (plan.schedule, *plan._schedules.values())] == [3, 2]
    chunks = load(None, [*words, "parallel.chunks=2", "batch.global_batch_size=24"], need_data=False)
    for size, bad in ((20, 3), (28, 3)):  # 3 and 2, 4 and 3: whichever replica it is
        batch = chunks.batch.model_copy(update={"global_batch_size": size})
        with pytest.raises(ScheduleError, match=f"multiple of pp=2, not {bad}; use 2 or 4"):
            make_plan(chunks.model_copy(update={"batch": batch}), 4)


def test_ranks_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="ranks=6 cannot be cut into tp=4 x pp=1 x cp=1 = 4"):
        make_plan(load(None, ["parallel.tp=4"], need_data=False), 6)


def test_tool_prints_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[model]\npreset = "debug"\n')
    assert command("plan")([str(file), "--ranks=8", "--parallel.tp=2"]) == 0
    want = make_plan(load(file, ["parallel.tp=2"], need_data=False), 8)
    table = communication_table(want.config, want.topology, want.stages, want.schedule)
    assert "tp" in table and f"\n{want}\n\n{table}\n\nmemory     peak" in (out := capsys.readouterr().out)
    output = "hardware   a100-80g GPUs are assumed; hardware=KIND plans for others. This machine is not looked at"
    assert out.split("\n")[0] == output


def test_tool_tells_what_copies_in_memory_take(capsys: pytest.CaptureFixture[str]) -> None:
    """6,738,415,616 parameters on 8 ranks, 12 bytes each, twice; at 10 GB/s, between steps of 2.256 s."""
    words = ["model.preset=llama-7b", "parallel.tp=8", "ranks=16", "hardware=a100-80g"]
    assert command("plan")([*words, "checkpoint.memory_interval=2"]) == 0
    out = capsys.readouterr().out
    lines = (
        "copies     in memory every 2 steps, two of them: 9.42 GiB per rank, 75.3 GiB on a node of 8 ranks\n"
        "           each takes 0.51 s at 10 GB/s (assumed), "
    )
    assert lines in out
    step = float(out.split("\nstep ")[1].split(" s,")[0])
    seconds = 12 * 6_738_415_616 / 16 / 10e9
    assert out.split(lines)[1].startswith(f"{seconds / (seconds + 2 * step):.1%} of the time\n")
    seconds = 12 * 6_738_415_616 / 16 / 1e9
    least = ceil(seconds / step)
    assert 4 <= least < 9
    far = f"each is there after {seconds:.2g} s at 1 GB/s, for which checkpoint.memory_interval={least} leaves the time"
    assert f"           as much again for another node's copies; {far}\n" in out
    for other in (["ranks=16", "checkpoint.buddy_rate=0"], ["ranks=8"]):  # none goes anywhere
        assert command("plan")([*words[:2], "checkpoint.memory_interval=2", *other]) == 0
        assert "GB/s (assumed)" in (out := capsys.readouterr().out) and "another node" not in out
    assert command("plan")(words) == 0
    assert "copies" not in capsys.readouterr().out


def test_tool_whose_reader_has_gone_says_nothing() -> None:
    """As in ``python tools/plan.py ... --json | head``."""
    root = Path(__file__).parents[2]
    words = root / "tools/plan.py", root / "examples/llama_65b.toml", "ranks=2048", "--json"
    process = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    stderr = process.stderr.read().decode()
    assert (process.wait(), stderr) == (141, "")


def test_tool_says_that_one_rank_communicates_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan")(["model.preset=debug", "ranks=1"]) == 0
    assert "\n\none rank communicates nothing\n\nmemory     peak" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv,message",
    [
        (["parallel.tp=2"], "the plan needs one number of ranks; write for example ranks=8"),
        (["ranks=x"], "the plan needs one number of ranks, not ranks=x; write for example ranks=8"),
        (["ranks=0"], "the plan needs one number of ranks, not ranks=0; write for example ranks=8"),
        (["ranks=1", "ranks=2"], "the plan needs one number of ranks, not ranks=1 ranks=2; write for example ranks=8"),
        (["a.toml", "b.toml", "ranks=1"], "two configuration files, a.toml and b.toml; give one"),
        (["ranks=8", "model.lr=3", "parallel.tp=3"], "6 problems in the configuration:"),
    ],
)
def test_tool_refuses(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan")(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.split("\n")[0] == f"error: {message}" and captured.out == ""


def test_tool_as_a_program() -> None:
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), "ranks=2", "parallel.tp=4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: command line: ranks=2 cannot be cut into parallel.tp=4 x parallel.pp=1 = 4")
