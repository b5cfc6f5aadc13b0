"""Tables of layouts: what a row says, and benchmarks/planner_rows.py."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from benchmarks.planner_rows import RowError, assumed, evenly, job_of_row, main, stack_of
from megallama.forecast.forecast import job_bytes, predict
from tests.plan.test_plan import ROOT

ROW = {
    "gpu": "A100-80GB-SXM", "gpus": "64", "layers": "40", "hidden": "5120", "ffn": "13824", "gated": "1",
    "heads": "40", "seq": "2048", "vocab": "32000", "tp": "2", "pp": "2", "dp": "16", "micro_batch": "1",
    "global_batch_seqs": "2048", "attn_kernel": "flash_attention2", "dp_mode": "distopt", "sp": "1",
}  # fmt: skip
BLOOM = {"attn_kernel": "unfused_scaled_masked_softmax", "dp_mode": "zero1"}


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
    assert main([str(table), "-o", str(out)]) == 0
    assert f"{table}, line 3: not predicted: seq='x' is no number\n2 of 3 rows predicted" in capsys.readouterr().err
    written = list(csv.DictReader(io.StringIO(out.read_text())))
    job, hardware = job_of_row(ROW)
    p = predict(job, hardware)
    found = [float(written[0][k]) for k in ("measured_step_time_s", "step_time_s", "tok_s_gpu", "mem_gb")]
    assert found == pytest.approx([1.5, p.step_seconds, p.tokens_per_second, job_bytes(job, hardware) / 1e9], rel=1e-5)
    assert float(written[0]["tflops"]) == pytest.approx(p.mfu_full * 312, rel=1e-5) and written[0]["fits"] == "1"
    assert written[1]["step_time_s"] == "" and written[1]["flags"] == "not predicted: seq='x' is no number"
    assert float(written[2]["step_time_s"]) > 0


def test_tables_that_are_no_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "in.csv"
    assert main([str(table)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    table.write_text("gpu,layers\nA100,4\n")
    assert main([str(table)]) == 2
    assert "has no column hidden, heads, seq, gpus, global_batch_seqs; it needs gpu," in capsys.readouterr().err


def test_measurements_name_their_sources() -> None:
    for name in ("validate.csv", "aux_validate.csv"):
        with (ROOT / "benchmarks" / "measurements" / name).open(encoding="utf-8") as file:
            assert all(row["source"] for row in csv.DictReader(file))


def test_an_even_split_of_modules() -> None:
    """Embedding, 40 layers, norm and head over 2 and 4 ranks: what is left over goes to the first stages."""
    assert evenly(40, 2, 1, 2) == (21, 19) and evenly(40, 4, 1, 2) == (10, 11, 11, 8)
    assert evenly(80, 8, 1, 2) == (10, 11, 11, 10, 10, 10, 10, 8) and evenly(4, 6, 1, 2) == ()
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
    plain, hardware = job_of_row(row | {"schedule": "1f1b", "vpp": "3"})
    assert plain.stages == (2, *[3] * 14, 2) and plain.chunks == 1 and predict(plain, hardware).step_seconds > 0
    interleaved, _ = job_of_row(row | {"schedule": "interleaved"})
    assert interleaved.chunks == 3 and interleaved.stages == (0, *[1] * 46, 0)
