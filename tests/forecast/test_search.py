"""Searching for a layout, hardware files, and what tools/plan.py prints of them."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from megallama.cli import command
from megallama.commands import plan as plan_command
from megallama.config.errors import ConfigError
from megallama.config.load import load
from megallama.config.rules import check
from megallama.forecast import job as job_module
from megallama.forecast.forecast import GIB, forecast, search, seconds_by_cause
from megallama.forecast.hardware import Hardware, load_hardware
from megallama.forecast.job import Job, candidates, config_of, job_of, placements
from megallama.plan.builders import FIXED_CHUNKS
from megallama.plan.plan import make_plan
from megallama.plan.schedule import ScheduleError
from megallama.plan.topology import Topology
from megallama.plan.work import partition

A100 = load_hardware("a100-80g")
LLAMA_65B = ["model.preset=llama-65b", "batch.global_batch_size=2048", "batch.micro_batch_size=1", "train.steps=333786"]


def test_search_of_65b_on_2048() -> None:
    """Between what the project promises and what no A100 has done."""
    config = load(None, LLAMA_65B, need_data=False)
    best, legal, too_large = search(config, 2048, A100, "flash2")
    speeds = [f.prediction.tokens_per_second for f in best]
    assert speeds == sorted(speeds, reverse=True) and len(best) == 10 and legal > 5000 > too_large > 500
    assert 460 <= speeds[0] < 505
    assert all(f.fits and f.plan.topology.world_size == 2048 for f in best)
    again = forecast(make_plan(best[0].plan.config, 2048), A100, "flash2")
    assert again.prediction == best[0].prediction


def test_the_papers_layout_without_overlap_is_slower_than_its_380() -> None:
    words = [*LLAMA_65B, "parallel.tp=8", "parallel.pp=8", "overlap.tensor_parallel=false", "overlap.grad_reduce=false"]
    plain = forecast(make_plan(load(None, words, ranks=2048, need_data=False), 2048), A100, "flash2")
    assert 300 < plain.prediction.tokens_per_second < 400


def test_candidates_are_legal_and_complete() -> None:
    config = load(None, ["model.preset=debug", "batch.global_batch_size=8", "batch.seq_length=64"], need_data=False)
    jobs = list(candidates(config, 4, A100, "flash2"))
    assert {(j.tp, j.pp, j.dp) for j in jobs} == {(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)}
    assert all(j.dp * j.micro_batch * j.num_microbatches == 8 and sum(j.stages) == 4 for j in jobs)
    assert {j.recompute for j in jobs} == {"none", "selective", "full"}
    assert {(j.schedule, j.chunks) for j in jobs if j.pp == 2} >= {("1f1b", 1), ("1f1b", 2), ("zb-h1", 1)}
    assert list(placements(4, 4, 6))[0] == ("1f1b", 1) and ("1f1b", 2) not in placements(4, 8, 6)


@pytest.mark.parametrize(("ranks", "layers", "batch"), [(4, 4, 8), (6, 3, 12), (16, 2, 16)])
def test_candidates_are_the_legal_layouts(ranks: int, layers: int, batch: int) -> None:
    """All that rules and schedules accept, tried one by one, where a node has two GPUs and every stage a layer."""
    words = ["model.preset=debug", f"model.num_layers={layers}", f"batch.global_batch_size={batch}"]
    base = load(None, [*words, "batch.seq_length=60", "batch.micro_batch_size=1"], need_data=False)
    jobs = list(candidates(base, ranks, replace(A100, gpu=replace(A100.gpu, gpus_per_node=2)), "flash2"))
    legal = set()
    sizes = product((1, 2), range(1, layers + 1), range(1, layers + 1), (1, 2, 4, 8, 16))
    kinds = list(product(("1f1b", *FIXED_CHUNKS), ("none", "selective", "full"), (True, False)))
    for (tp, pp, chunks, micro), (name, recompute, sp) in product(sizes, kinds):
        layout = {"tp": tp, "pp": pp, "chunks": chunks, "schedule": name, "sequence_parallel": sp}
        own = {"parallel": layout, "batch": {"micro_batch_size": micro}, "memory": {"recompute": recompute}}
        config = base.model_copy(update={k: getattr(base, k).model_copy(update=v) for k, v in own.items()})
        if pp * chunks > layers or (tp == 1 and not sp) or (pp == 1 and name != "1f1b"):
            continue
        if not check(config, ranks, need_data=False):
            with suppress(ScheduleError):
                legal.add((make_plan(config, ranks).stages, *layout.values(), micro, recompute))
    found = []
    for j in jobs:
        config = config_of(base, j)
        assert job_of(config, Topology(tp=j.tp, pp=j.pp, dp=j.dp), "flash2") == j
        p = config.parallel
        layout = p.tp, p.pp, p.chunks, p.schedule, p.sequence_parallel
        found.append((partition(config), *layout, config.batch.micro_batch_size, config.memory.recompute))
    assert len(found) == len(set(found)) and set(found) == legal


def test_long_sequences_are_cut_over_the_legal_numbers_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sequences of 64 tokens a rank must keep 16: every cp and exchange that the rules accept, and no other."""
    monkeypatch.setattr(job_module, "CP_TOKENS", 16)
    words = ["model.preset=debug", "model.num_layers=2", "model.num_kv_heads=1", "batch.global_batch_size=8"]
    base = load(None, [*words, "batch.seq_length=64", "batch.micro_batch_size=1"], need_data=False)
    jobs = [j for j in candidates(base, 16, A100, "flash2") if (j.pp, j.recompute, j.micro_batch) == (1, "none", 2)]
    found = {(j.tp, j.cp, j.exchange if j.cp > 1 else "auto", j.sequence_parallel or j.tp == 1) for j in jobs}
    legal = set()
    for tp, cp, kind, sp in product((1, 2, 4), (1, 2, 4, 8), ("auto", "gather", "heads"), (True, False)):
        layout = {"tp": tp, "cp": cp, "cp_exchange": kind, "sequence_parallel": sp}
        own = base.changed(parallel=layout, batch={"micro_batch_size": 2}, memory={"recompute": "none"})
        if cp <= 64 / 16 and (kind == "auto") == (cp == 1) and (sp or tp > 1) and not check(own, 16, need_data=False):
            legal.add((tp, cp, kind, sp))
    assert len(jobs) == len(found) and found == legal and (1, 4, "heads", True) in legal
    assert (2, 4, "heads", True) not in legal and (2, 4, "gather", True) in legal  # two heads on a rank
    for j in jobs:
        own = config_of(base, j)
        assert job_of(own, Topology.fill(16, tp=j.tp, cp=j.cp), "flash2") == j


def test_a_long_context_is_found_a_layout() -> None:
    """LLaMA 3 8B with 128k tokens on 128 H100: no rank has room for whole sequences without 8 tensor-parallel ones."""
    words = ["model.preset=llama3-8b", "batch.seq_length=131072", "batch.global_batch_size=32"]
    config = load(None, [*words, "batch.micro_batch_size=1"], need_data=False)
    h100 = load_hardware("h100")
    best, legal, too_large = search(config, 128, h100, "flash3")
    assert best[0].job.cp > 1 and best[0].fits and legal > too_large > 1000
    first = best[0].job
    other = replace(first, exchange={"gather": "heads", "heads": "gather"}[first.exchange])
    assert first.heads // first.tp % first.cp or seconds(first, h100) <= seconds(other, h100)  # by price
    assert seconds(replace(first, stride=8), h100) > seconds(first, h100)  # cp ranks of a group in different nodes


def seconds(job: Job, hardware: Hardware) -> float:
    return sum(seconds_by_cause(job, hardware).values())


def test_the_page_says_what_each_exchange_moves(capsys: pytest.CaptureFixture[str]) -> None:
    """LLaMA 3 8B, cp 4, a micro-batch of 8192 tokens: gathered thrice 2 x 8 heads of 128, by heads twice 48 and 32."""
    words = ["model.preset=llama3-8b", "parallel.cp=4", "batch.global_batch_size=32", "batch.micro_batch_size=1"]
    assert command("plan")(["ranks=4", "hardware=h100", *words]) == 0
    out = capsys.readouterr().out
    assert "layout     tp=1 x cp=4 x pp=1 x dp=1 = 4 ranks" in out
    assert "exchange   heads, since cp=4 is above 2/3 x (1 + 32 / 8) = 3.33" in out
    each = 32 * 32 * 2 * 3 / 4 / 2**30  # layers, micro-batches, bytes, and what is another rank's
    gather, heads = 3 * 2 * 8 * 128 * 8192 * each, 2 * (48 + 32) * 128 * 8192 / 4 * each
    for kind, moved in (("gather", gather), ("heads", heads)):
        assert f"exchange   {kind}: {moved:.2f} GiB each way and step, a step of " in out
    assert "cp comm" in out
    assert command("plan")(["ranks=4", "--json", *words]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["topology"] == {"tp": 1, "cp": 4, "pp": 1, "dp": 1} and shown["seconds_by_cause"]["cp comm"] > 0


def test_how_far_cp_ranks_lie_apart() -> None:
    """Next to tp, unless the order of ranks says otherwise."""
    words = ["model.preset=llama3-8b", "parallel.tp=2", "parallel.cp=4", "batch.global_batch_size=32"]
    for order, stride in (("tp-cp-dp-pp", 2), ("tp-dp-cp-pp", 8), ("cp-tp-dp-pp", 1)):
        plan = make_plan(load(None, [*words, f"parallel.rank_order={order}"], ranks=32, need_data=False), 32)
        assert job_of(plan.config, plan.topology, "flash2").stride == stride, order


def test_nothing_fits() -> None:
    config = load(None, ["model.preset=llama-65b", "batch.global_batch_size=8"], need_data=False)
    with pytest.raises(ConfigError, match=r"none of [\d,]+ legal layouts of 4 ranks fits into 79 GiB; use other ranks"):
        search(config, 4, A100, "flash2")


def test_hardware_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "h100"\nnic_gbit = 800\nmemory_gib = 100.0\n')
    own, h100 = load_hardware(str(file)), load_hardware("h100")
    assert (own.gpu.nic_gbit, own.gpu.memory_gib, own.gpu.gemm) == (800, 100.0, h100.gpu.gemm)
    assert load_hardware("h200").gpu.gemm == h100.gpu.gemm and load_hardware("h200").gpu.memory_gb_per_s == 4800


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('base = "h10"', 'mine.toml: base="h10" is no known kind of GPU; did you mean h100?, or a .toml file'),
        ("nic_gbit = 800", 'mine.toml: base="" is no known kind of GPU; use a100-80g, a100-40g, h100, h200'),
        ('base = "h100"\nnic_gbt = 8', "mine.toml: nic_gbt is no constant of a GPU; did you mean nic_gbit?"),
        ('base = "h100"\nnic_gbit = "8"', "mine.toml: nic_gbit='8' must be a number above 0, like 400.0"),
        ('base = "h100"\ngemm = 0', "mine.toml: gemm=0 must be a number above 0, like"),
        ("base = ", "mine.toml is not valid TOML: "),
    ],
)
def test_hardware_files_that_are_wrong(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_hardware(str(file))
    assert message in str(error.value)


def test_unknown_hardware_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan")(["ranks=8", "hardware=a100"]) == 2
    assert "hardware=a100 is no known kind of GPU; did you mean a100-80g?" in capsys.readouterr().err
    assert command("plan")(["ranks=8", "kernel=flash9"]) == 2
    assert "kernel=flash9 is unknown; use unfused, flash1, flash2, flash3" in capsys.readouterr().err


def test_json_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*LLAMA_65B, "parallel.tp=8", "parallel.pp=4", "parallel.chunks=5"]
    assert command("plan")(["ranks=2048", "--json", *words]) == 0
    shown = json.loads(capsys.readouterr().out)
    plan = make_plan(load(None, words, ranks=2048, need_data=False), 2048)
    f = forecast(plan, A100, "flash2")
    assert shown["step_seconds"] == f.prediction.step_seconds == pytest.approx(sum(shown["seconds_by_cause"].values()))
    assert shown["memory_bytes"][0]["peak"] == plan.memory(0).total + f.buffers <= shown["memory_limit_bytes"]
    assert shown["topology"] == {"tp": 8, "pp": 4, "dp": 64} and shown["stages"][5]["rank"] == 1
    assert [len(s["layers"]) for s in shown["stages"]] == list(map(len, plan.stages))
    assert shown["config"]["model"]["num_layers"] == 80 and shown["fits"] is True
    assert shown["mwh"] == pytest.approx(shown["gpu_hours"] * 400 * 1.1 / 1e6)


def test_page_says_what_a_run_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan")(["ranks=2048", *LLAMA_65B, "parallel.tp=8", "parallel.pp=8", "hardware=h100"]) == 0
    out = capsys.readouterr().out
    for words in ("GiB: fits", "h100, attention kernel flash3", "tokens/s per GPU", "MFU", "HFU", "t CO2 (700 W per"):
        assert words in out, words
    assert out.startswith("hardware   h100 GPUs. This machine is not looked at\n")
    assert command("plan")(["ranks=8", *LLAMA_65B, "parallel.tp=8"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_small_numbers_keep_digits(capsys: pytest.CaptureFixture[str]) -> None:
    few = plan_command.few
    assert [few(x) for x in (833_577.4, 17.2, 0.00014, 0)] == ["833,577", "17", "0.00014", "0"]
    assert [few(x, 1) for x in (60.71, 1, 0.0123)] == ["60.7", "1.0", "0.012"]
    assert command("plan")(["model.preset=debug", "ranks=1"]) == 0
    out = capsys.readouterr().out
    assert not [word for word in ("0.0 days", " 0 GPU-hours", " 0 MWh", "MFU 0.0%", "  0.0%") if word in out], out


def test_search_by_the_tool(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.preset=llama-7b", "batch.global_batch_size=256", "batch.micro_batch_size=1"]
    assert command("plan")(["ranks=64", "--search", *words]) == 0
    head, first, settings, limited, *_ = capsys.readouterr().out.split("\n")
    assert head.endswith("predicted to be fastest:")
    assert " legal layouts of 64 ranks on a100-80g (assumed; hardware=KIND for others), " in head
    assert first.startswith(" 1. ") and limited.startswith("    limited by ")
    f = forecast(make_plan(load(None, [*words, *settings.split()], ranks=64, need_data=False), 64), A100, "flash2")
    assert f"{f.prediction.tokens_per_second:,.0f} tokens/s per GPU" in first
    assert f"{max(f.peaks) / GIB:.1f} GiB" in first


def test_tables_have_a_program_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan")(["--rows", "in.csv", "-o", "out.csv"]) == 2
    want = "error: tables of layouts have a program of their own: python benchmarks/planner_rows.py in.csv -o out.csv\n"
    assert capsys.readouterr().err == want
