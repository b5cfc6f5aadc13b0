"""The doctor: it tells what is there and what is missing, never crashes, and its exit status is the verdict."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.cli import command
from megallama.commands import doctor
from megallama.kernels import select
from megallama.kernels.processors import Processor, entries

ROOT = Path(__file__).resolve().parents[2]
ALL = dict.fromkeys((*doctor.NEEDED, *doctor.OPTIONAL), "1.0")


def found(**changes: Any) -> dict[str, Any]:
    """What `examine` gathers before it gives advice, on a machine that lacks nothing."""
    versions = {**ALL, "apex": "not installed", "MPI library": "MPICH 5", "C++ compiler": "/usr/bin/g++",
                "CUDA of torch": "none: a CPU build of torch", **changes.pop("versions", {})}  # fmt: skip
    cpu = {"instructions": ["AVX512", "AVX512 bf16"], "shm_gib": 8.0, "usable_cores": 2, **changes.pop("cpu", {})}
    return {"versions": versions, "cpu": cpu, "gpus": [], "kernels": [], **changes}


def test_as_a_program_on_this_machine() -> None:
    done = subprocess.run(
        [sys.executable, "tools/doctor.py", "--json", "--device", "cpu"], cwd=ROOT, capture_output=True, text=True
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["can_train"]
    assert report["verdict"].startswith("can train in bf16 on ")
    assert [k["operation"] for k in report["kernels"]] == [*select.OPERATIONS, "fp8 products (precision.fp8)"]
    assert report["kernels"][0]["taken"] == "blocks of matrix products"
    assert report["kernels"][0]["refused"] == {"Transformer Engine": "no CUDA device"}
    assert torch.__version__.startswith(report["versions"]["torch"])  # which may lack the +cpu or +cu130
    assert report["cpu"]["usable_cores"] >= 1 and report["cpu"]["memory_gib"] > 0.5


def test_the_text_ends_with_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("doctor")(["--device", "cpu", "--dtype", "fp32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("This machine can train in fp32 on ")
    heads = [line for line in lines if line.isupper() and line[0] != " "]
    assert heads == ["KERNELS", "VERSIONS", "GPUS", "PROCESSOR AND MEMORY", "FOR MORE"]
    assert "  attention: torch scaled_dot_product_attention" in lines
    assert "      not blocks of matrix products: 16-bit formats on a CPU only" in lines


def test_another_apex_on_the_path_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.which_apex() == "not installed"
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('a web toolkit that needs pyramid')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.which_apex() == "not NVIDIA's: an unrelated web toolkit of the same name"
    advice = doctor.advice(found(versions={"apex": doctor.which_apex()}), "bf16")
    assert advice == [doctor.WRONG_APEX] and "build NVIDIA/apex from source" in advice[0]
    (package / "__init__.py").write_text("")
    (package / "optimizers.py").write_text("")
    sys.modules.pop("apex", None)
    assert doctor.which_apex() == "NVIDIA's, Python only: built without CUDA extensions"
    (tmp_path / "amp_C.py").write_text("")
    assert doctor.which_apex() == "NVIDIA's, with amp_C"
    sys.modules.pop("apex", None)


def test_what_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **settings: Any) -> None:
        raise RuntimeError("libcudart.so: no such file\nmore")

    for name in ("versions", "gpus", "cpu", "kernels", "advice"):
        monkeypatch.setattr(doctor, name, broken)
    report = doctor.examine()
    assert not report["can_train"]
    assert report["verdict"] == "cannot train: RuntimeError: libcudart.so: no such file"
    assert "libcudart.so" in doctor.text(report)
    monkeypatch.setattr(doctor, "examine", lambda *a: report)
    assert command("doctor")([]) == 1


def test_a_gpu_that_is_asked_for_and_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    report = doctor.examine(device="cuda")
    assert report["verdict"] == f"cannot train: RuntimeError: torch {torch.__version__} finds no GPU"


H200 = {"name": "NVIDIA H200", "memory_gib": 139.8, "capability": "9.0"}
NO_TE = dict.fromkeys(("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"), "not installed")
ADVICE: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"versions": {"torch": "not installed"}}, "install torch: make quickstart sets up .venv"),
    ({"versions": {"CUDA of torch": "13.0"}}, "torch is a CUDA build but finds no GPU: check nvidia-smi"),
    ({"cpu": {"instructions": ["AVX2"]}}, "this processor has no bf16 instructions: precision.dtype=fp32"),
    (
        {"cpu": {"product_time_over_fp32": 5.23}},
        "this processor has no bf16 instructions: precision.dtype=fp32 is faster, matrix products take 5.2 times",
    ),
    ({"cpu": {"shm_gib": 0.06}}, "/dev/shm holds 0.06 GiB; start the container with --shm-size=1g or more"),
    ({"versions": {"mpi4py": "not installed"}}, "pip install mpi4py mpich (no system package needed): preprocessing"),
    ({"versions": {"MPI library": "none that works (x)"}}, "pip install mpich: mpi4py is there but finds no MPI"),
    ({"versions": {"C++ compiler": "none"}}, "run.compile=true would need a C++ compiler (g++), Triton a C compiler"),
    (
        {"gpus": [H200], "versions": {**NO_TE, "CUDA of torch": "13.0", "apex": "NVIDIA's, with amp_C"}},
        "Transformer Engine: transformer-engine-cu13 and transformer-engine-torch, 2.12.0 (later ones want a newer",
    ),
    (
        {"gpus": [H200], "versions": {"CUDA of torch": "13.0", "transformer-engine-torch": "not installed"}},
        "Transformer Engine is there in part; it also needs transformer-engine-cu13 and transformer-engine-torch",
    ),
    (
        {"gpus": [H200], "versions": {"CUDA of torch": "13.0", "transformer-engine-cu13": "2.0"}},
        "transformer-engine, transformer-engine-cu13 and transformer-engine-torch must have one version",
    ),
    (
        {"gpus": [H200], "versions": {"CUDA of torch": "13.0"},
         "kernels": [{"operation": "AdamW", "taken": "x", "refused": {"Transformer Engine": "undefined symbol"}}]},
        "Transformer Engine was refused: undefined symbol",
    ),
    (
        {"gpus": [{**H200, "capability": "7.5"}], "versions": {"CUDA of torch": "13.0"}},
        "a GPU below compute capability 8.0 has no bf16: use precision.dtype=fp16",
    ),
    (
        {"gpus": [H200, {**H200, "name": "NVIDIA H100"}], "versions": {"CUDA of torch": "13.0"}},
        "the GPUs differ: a job runs at the speed of the slowest",
    ),
    (
        {"kernels": [{"operation": "RMSNorm", "taken": "apex", "refused": {},
                      "microseconds": {"apex": 30.0, "torch fused": None, "torch": 20.0}}]},
        "RMSNorm: torch is 1.50 times as fast here; run.without_kernels="
        '["RMSNorm: apex", "RMSNorm: torch fused"]',
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), ADVICE, ids=[a[1][:40] for a in ADVICE])
def test_advice(changes: dict[str, Any], said: str) -> None:
    lines = doctor.advice(found(**changes), "bf16")
    assert [line[: len(said)] for line in lines] == ([said] if said else [])


def test_every_implementation_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """At sizes a hundred times smaller; what --measure leaves out are the refused ones only."""
    monkeypatch.setattr(doctor, "CPU_SIZE", (64, 32, 48, 2, 16, 16, 61))
    for row in doctor.kernels("fp32", "cpu", True, False)[:-1]:
        names = {kind for kind, _ in select.OPERATIONS[row["operation"]].candidates}
        assert set(row["microseconds"]) == names - set(row["refused"]) | {select.OPERATIONS[row["operation"]].last[0]}
        assert all(us > 0 for us in row["microseconds"].values()), row


def test_the_mpi_library_is_asked_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(0, "MPICH Version:\t5.0.2\nmore\0", ""), (1, "", "x\nRuntimeError: cannot load MPI library\n")]
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess([], *answers.pop(0)))
    assert doctor.mpi_library() == "MPICH Version: 5.0.2"
    assert doctor.mpi_library() == "none that works (RuntimeError: cannot load MPI library)"


def test_the_table_of_a_processor_names_what_is_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of planted times: fp32 products in bf16, nothing for attention, which is 4 % faster only."""
    row = {"operation": "matrix product", "taken": "torch mm", "refused": {}, "microseconds": {"torch mm": 100.0}}
    attend = {"operation": "attention", "taken": "a", "refused": {}, "microseconds": {"a": 50.0}, "named": {"b": 48.0}}
    rows = {
        "bf16": [row | {"named": {"oneDNN in fp32": 40.0, "torch mm in fp32": None}}, attend, {"operation": "AdamW"}],
        "fp32": [row | {"named": {"oneDNN in fp32": None, "torch mm in fp32": None}}, attend],
    }
    monkeypatch.setattr(doctor, "kernels", lambda dtype, *args, table: rows[dtype])
    here = Processor("GenuineIntel", frozenset({"avx2", "avx512f"}))
    monkeypatch.setattr(Processor, "here", classmethod(lambda cls: here))
    path = tmp_path / "t.toml"
    assert doctor.run(["--table", str(path)]) == 0
    assert path.read_text() in capsys.readouterr().out
    (entry,) = entries(path)
    assert entry.kernels == {"bf16": {"matrix product": "oneDNN in fp32"}} and entry.bf16
    assert here.entry(768, str(path)) == entry
    assert doctor.run(["--table", str(path)]) == 2 and "is there already" in capsys.readouterr().err
    slow = {"bf16": [row | {"named": {"x": 101.0}}], "fp32": [row | {"named": {"x": 99.0}}]}
    assert "bf16 = false" in doctor.entry(slow, "x")
