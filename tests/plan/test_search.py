"""Searching for a layout, hardware files, tables of layouts, and what tools/plan.py prints of them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from megallama.config.errors import ConfigError
from megallama.config.load import load
from megallama.plan.capacity import GIB
from megallama.plan.forecast import forecast
from megallama.plan.hardware import load_machine
from megallama.plan.plan import make_plan
from megallama.plan.predict import predict
from megallama.plan.rows import RowError, assumed, evenly, job_of_row, stack_of
from megallama.plan.search import candidates, placements, search
from tests.plan.test_plan import ROOT, tool

A100 = load_machine("a100-80g")
LLAMA_65B = ["model.preset=llama-65b", "batch.global_batch_size=2048", "batch.micro_batch_size=1", "train.steps=333786"]
ROW = {
    "gpu": "A100-80GB-SXM", "gpus": "64", "layers": "40", "hidden": "5120", "ffn": "13824", "gated": "1",
    "heads": "40", "seq": "2048", "vocab": "32000", "tp": "2", "pp": "2", "dp": "16", "micro_batch": "1",
    "global_batch_seqs": "2048", "attn_kernel": "flash_attention2", "dp_mode": "distopt", "sp": "1",
}  # fmt: skip
BLOOM = {"attn_kernel": "unfused_scaled_masked_softmax", "dp_mode": "zero1"}


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


def test_nothing_fits() -> None:
    config = load(None, ["model.preset=llama-65b", "batch.global_batch_size=8"], need_data=False)
    with pytest.raises(ConfigError, match=r"none of [\d,]+ legal layouts of 4 ranks fits into 79 GiB; use other ranks"):
        search(config, 4, A100, "flash2")


def test_hardware_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "h100"\nnic_gbit = 800\nmemory_gib = 100.0\n')
    mine, h100 = load_machine(str(file)), load_machine("h100")
    assert (mine.gpu.nic_gbit, mine.gpu.memory_gib, mine.gpu.gemm) == (800, 100.0, h100.gpu.gemm)
    assert load_machine("h200").gpu.gemm == h100.gpu.gemm and load_machine("h200").gpu.memory_gb_per_s == 4800


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('base = "h10"', 'mine.toml: base="h10" is no known kind of GPU; did you mean h100?, or a .toml file'),
        ("nic_gbit = 800", 'mine.toml: base="" is no known kind of GPU; use a100-80g, a100-40g, h100, h200'),
        ('base = "h100"\nnic_gbt = 8', "mine.toml: nic_gbt is no constant of a GPU; did you mean nic_gbit?"),
        ('base = "h100"\nnic_gbit = "8"', "mine.toml: nic_gbit='8' must be a number above 0, like 400.0"),
        ('base = "h100"\ngemm = 0', "mine.toml: gemm=0 must be a number above 0, like"),
        ("base = ", ", h200\n  line 1: base ="),
    ],
)
def test_hardware_files_that_are_wrong(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_machine(str(file))
    assert message in str(error.value)


def test_unknown_hardware_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool("plan").main(["ranks=8", "hardware=a100"]) == 2
    assert "hardware=a100 is no known kind of GPU; did you mean a100-80g?" in capsys.readouterr().err
    assert tool("plan").main(["ranks=8", "kernel=flash9"]) == 2
    assert "kernel=flash9 is unknown; use unfused, flash1, flash2, flash3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "MI300"}, "gpu='MI300' is not among A100, H100, H200"),
        ({"layers": ""}, "layers is empty"),
        ({"layers": "many"}, "layers='many' is no number"),
        ({"seq": "-1"}, "seq=-1 is no whole number above 0"),
        ({"seq": "nan"}, "seq=nan is no whole number above 0"),
        ({"tp": "4"}, "tp=4 x pp=2 x cp=1 x dp=16 is not gpus=64"),
        ({"global_batch_seqs": "8"}, "global_batch_seqs=8 is less than micro_batch=1 x dp=16"),
        ({"tp": "", "pp": "", "dp": ""}, "tp, pp and dp are empty: the layout is not known"),
        ({"heads": "41"}, "hidden=5120 is no multiple of heads=41"),
        ({"vpp": "40"}, "pp=2 x vpp=40 stages are more than layers=40 and two"),
        ({"stack": "jax"}, "stack=jax is unknown; use megatron, "),
    ],
)
def test_rows_that_are_wrong(changes: dict[str, str], message: str) -> None:
    with pytest.raises(RowError) as error:
        job_of_row(ROW | changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "stack"),
    [
        ({}, "megatron-2024"),
        ({"dp_mode": "zero1"}, "scaling"),
        ({"dp_mode": "zero1", "gpu": "H100"}, "nanotron"),
        ({"dp_mode": "zero1", "attn_kernel": "flash_attention2 + RMS kernel"}, "scaling-rms"),
        ({"attn_kernel": "unfused_scaled_masked_softmax", "dp_mode": "ddp"}, "megatron"),
        ({"attn_kernel": "unfused_scaled_masked_softmax", "dp_mode": "zero1"}, "megatron-deepspeed"),
        ({"attn_kernel": "unfused_scaled_masked_softmax", "dp_mode": "zero3"}, "deepspeed"),
        ({"dp_mode": "fsdp"}, "fsdp"),
        ({"dp_mode": "fsdp2"}, "torchtitan"),
        ({"attn_kernel": "cudnn/flash (TE)"}, "megatron-core"),
        ({"schedule": "zb-2p", "attn_kernel": "", "dp_mode": "none"}, "zerobubble"),
        ({"stack": "megallama"}, "megallama"),
        (BLOOM, "megatron-deepspeed"),
        (BLOOM | {"note": "date tag 02-24; 2nd-iteration timing"}, "megatron-deepspeed"),
        (BLOOM | {"note": "date tag 02-25; 2nd-iteration timing"}, "megatron-deepspeed-numa"),
        (BLOOM | {"note": "embedding and head count as layers"}, "megatron-deepspeed"),
    ],
)
def test_the_program_follows_from_the_columns(changes: dict[str, str], stack: str) -> None:
    assert stack_of(ROW | changes) == stack


def test_a_table_with_a_bad_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The good rows are predicted, the bad one is named; measured columns stay, under another name."""
    table, out = tmp_path / "in.csv", tmp_path / "out.csv"
    other = {"step_time_s": ""}
    rows = [ROW | {"step_time_s": "1.5"}, ROW | other | {"seq": "x"}, ROW | other | {"pp": "1", "tp": "4"}]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert tool("plan").main(["--rows", str(table), "-o", str(out)]) == 0
    assert f"{table}, line 3: not predicted: seq='x' is no number\n2 of 3 rows predicted" in capsys.readouterr().err
    written = list(csv.DictReader(io.StringIO(out.read_text())))
    job, machine = job_of_row(ROW)
    p = predict(job, machine)
    found = [float(written[0][k]) for k in ("measured_step_time_s", "step_time_s", "tok_s_gpu", "mem_gb")]
    assert found == pytest.approx([1.5, p.step_seconds, p.tokens_per_second, p.memory_bytes / 1e9], rel=1e-5)
    assert float(written[0]["tflops"]) == pytest.approx(p.mfu_full * 312, rel=1e-5) and written[0]["fits"] == "1"
    assert written[1]["step_time_s"] == "" and written[1]["flags"] == "not predicted: seq='x' is no number"
    assert float(written[2]["step_time_s"]) > 0


def test_tables_that_are_no_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "in.csv"
    assert tool("plan").main(["--rows", str(table)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    table.write_text("gpu,layers\nA100,4\n")
    assert tool("plan").main(["--rows", str(table)]) == 2
    assert "has no column hidden, heads, seq, gpus, global_batch_seqs; it needs gpu," in capsys.readouterr().err


def test_json_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*LLAMA_65B, "parallel.tp=8", "parallel.pp=4", "parallel.chunks=5"]
    assert tool("plan").main(["ranks=2048", "--json", *words]) == 0
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
    assert tool("plan").main(["ranks=2048", *LLAMA_65B, "parallel.tp=8", "parallel.pp=8", "hardware=h100"]) == 0
    out = capsys.readouterr().out
    for words in ("GiB: fits", "h100, attention kernel flash3", "tokens/s per GPU", "MFU", "HFU", "t CO2 (700 W per"):
        assert words in out, words
    assert out.startswith("hardware   h100 GPUs. This machine is not looked at\n")
    assert tool("plan").main(["ranks=8", *LLAMA_65B, "parallel.tp=8"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_small_numbers_keep_digits(capsys: pytest.CaptureFixture[str]) -> None:
    few = tool("plan").few
    assert [few(x) for x in (833_577.4, 17.2, 0.00014, 0)] == ["833,577", "17", "0.00014", "0"]
    assert [few(x, 1) for x in (60.71, 1, 0.0123)] == ["60.7", "1.0", "0.012"]
    assert tool("plan").main(["model.preset=debug", "ranks=1"]) == 0
    out = capsys.readouterr().out
    assert not [word for word in ("0.0 days", " 0 GPU-hours", " 0 MWh", "MFU 0.0%", "  0.0%") if word in out], out


def test_search_by_the_tool(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.preset=llama-7b", "batch.global_batch_size=256", "batch.micro_batch_size=1"]
    assert tool("plan").main(["ranks=64", "--search", *words]) == 0
    head, first, settings, limited, *_ = capsys.readouterr().out.split("\n")
    assert head.endswith("predicted to be fastest:")
    assert " legal layouts of 64 ranks on a100-80g (assumed; hardware=KIND for others), " in head
    assert first.startswith(" 1. ") and limited.startswith("    limited by ")
    f = forecast(make_plan(load(None, [*words, *settings.split()], ranks=64, need_data=False), 64), A100, "flash2")
    assert f"{f.prediction.tokens_per_second:,.0f} tokens/s per GPU" in first
    assert f"{max(f.peaks) / GIB:.1f} GiB" in first


def test_measurements_name_their_sources() -> None:
    for name in ("validate.csv", "aux_validate.csv"):
        with (ROOT / "benchmarks" / "measurements" / name).open(encoding="utf-8") as file:
            assert all(row["source"] for row in csv.DictReader(file))


def test_an_even_split_of_modules() -> None:
    """Embedding, 40 layers, norm and head over 2 and 4 ranks: what is left over goes to the first stages."""
    assert evenly(40, 2, 1, 2) == (21, 19) and evenly(40, 4, 1, 2) == (10, 11, 11, 8)
    assert evenly(80, 8, 1, 2) == (10, 11, 11, 10, 10, 10, 10, 8) and evenly(4, 6, 1, 2) is None
    scaling = {"dp_mode": "zero1", "pp": "4", "dp": "8", "vpp": "1"}
    assert job_of_row(ROW | scaling)[0].stages == (10, 11, 11, 8)
    assert job_of_row(ROW | scaling | {"pp": "1", "dp": "32"})[0].stages == (40,)


def test_what_a_row_leaves_open() -> None:
    assert assumed(ROW | {"vpp": "1"}) == [] == assumed(ROW | {"pp": "1"})
    assert assumed(ROW) == ["vpp=1 is assumed"]
    assert assumed(ROW | {"schedule": "interleaved", "micro_batch": "", "vocab": ""}) == [
        "micro_batch=1 is assumed", "vocab=50304 is assumed", "vpp=2 is assumed",
    ]  # fmt: skip


def test_embedding_and_head_that_count_as_layers() -> None:
    """The zero-bubble authors' split: first and last stage hold a layer less; only interleaving has chunks."""
    row = ROW | {"attn_kernel": "", "dp_mode": "none", "sp": "0", "layers": "46", "tp": "1", "pp": "16", "dp": "4"}
    plain, _ = job_of_row(row | {"schedule": "1f1b", "vpp": "3"})
    assert plain.stages == (2, *[3] * 14, 2) and plain.chunks == 1 and predict(plain, A100).step_seconds > 0
    interleaved, _ = job_of_row(row | {"schedule": "interleaved"})
    assert interleaved.chunks == 3 and interleaved.stages == (0, *[1] * 46, 0)
