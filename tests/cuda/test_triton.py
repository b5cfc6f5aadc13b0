"""Our Triton kernels without a GPU: interpreted beside float64, compiled for A100 and H100, planted faults found."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.kernels import select
from megallama.kernels.candidate import APEX, COMPILED, TE, TRITON, Target, Unsupported

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("triton_table.tsv")
ON_CUDA = Target(torch.device("cuda"), torch.bfloat16)
OURS = ("RMSNorm", "RoPE", "SwiGLU", "cross entropy")
MEASURED_WITH = "3.7.1"

try:
    VERSION = importlib.metadata.version("triton")
except importlib.metadata.PackageNotFoundError:
    VERSION = ""
needs_triton = pytest.mark.skipif(
    not VERSION, reason="Triton is not installed (requirements/test.txt, Linux on x86-64)"
)


def output_of(module: str, *args: str, **environment: str) -> str:
    """What a module prints that is run as a program."""
    command = [sys.executable, "-m", f"tests.cuda.{module}", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Findings of `interpreted.main`."""
    if VERSION.startswith("3.6."):
        pytest.skip("the interpreter of Triton 3.6 does not work with numpy 2.4")
    found: dict[str, Any] = json.loads(
        output_of("interpreted", str(tmp_path_factory.mktemp("far")), TRITON_INTERPRET="1")
    )
    return found


@needs_triton
@pytest.mark.parametrize("operation", OURS)
def test_kernels_are_right_both_ways(interpreted: dict[str, Any], operation: str) -> None:
    """One rounding to fp32; to bf16 the interpreter cuts off where a GPU rounds."""
    for kind, limit in (("float32", 1e-6), ("bfloat16", 8e-3)):
        errors = interpreted["errors"][operation][kind]
        assert len(errors) >= 10
        assert [(what, e) for what, e in errors if not e <= limit] == []
        assert any(e > 0 for _, e in errors)


@needs_triton
def test_fp8_is_rounded_as_by_torch(interpreted: dict[str, Any]) -> None:
    """To the bit, from bf16 and fp32, in both layouts; what is not finite is seen."""
    for kind in ("float32", "bfloat16"):
        errors = interpreted["errors"]["fp8 products"][kind]
        assert len(errors) == 2 * (5 * 5 + 4)
        assert [what for what, e in errors if e != 0] == []


@needs_triton
def test_planted_faults_are_found(interpreted: dict[str, Any]) -> None:
    """Also row offsets in 32 bits."""
    assert interpreted["survivors"] == []


@needs_triton
def test_rows_beyond_2_to_the_31_elements_are_found(interpreted: dict[str, Any]) -> None:
    assert set(interpreted["far"]) == {*OURS, "fp8 products"}
    assert [(what, e) for errors in interpreted["far"].values() for what, e in errors if not e <= 8e-3] == []


@needs_triton
def test_a_model_trains_as_with_torchs_operations(interpreted: dict[str, Any]) -> None:
    """In fp32 within documents, its vocabulary whole and over two ranks, its heads rotated in place as on a GPU."""
    found = interpreted["models"]
    assert {name: e for name, e in found.items() if name.startswith("torch")} == {
        "torch's in place, tp=1": 0,
        "torch's in place, tp=2": 0,
    }
    ours = [e for name, e in found.items() if name.startswith("ours")]
    assert len(ours) == 4 and all(0 < e <= 1e-6 for e in ours)


@needs_triton
def test_rows_that_fit_in_no_registers_are_refused(interpreted: dict[str, Any]) -> None:
    assert interpreted["too wide"] == "rows of 8193 elements; at most 8192 fit in registers"


@needs_triton
def test_compiled_for_a_gpu_they_use_no_more_than_before(tmp_path: Path) -> None:
    """Nothing spilled, and no registers, shared memory or narrow accesses beyond `triton_table.tsv`.

    Nor is anything left to compile in a step: the program fails if selection compiles another kernel.
    """
    text = output_of("ahead_of_time", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    (tmp_path / "new.tsv").write_text(text, encoding="utf-8")
    new, old = ([line.split("\t") for line in t.splitlines()] for t in (text, TABLE.read_text(encoding="utf-8")))
    assert new[0] == old[0] == ["kernel", "format", "capability", "registers", "spilled", "shared", "narrow"]
    assert [row[:3] for row in new] == [row[:3] for row in old]
    assert {row[4] for row in new[1:]} == {"0"}, "registers spilled"
    if VERSION == MEASURED_WITH:  # another compiler, other numbers
        numbers = [[[int(n) for n in row[3:]] for row in rows[1:]] for rows in (new, old)]
        worse = [new[i + 1] for i, row in enumerate(zip(*numbers, strict=True)) if any(map(int.__gt__, *row))]
        assert worse == [], f"more than in {TABLE.name}"


@pytest.mark.parametrize("operation", OURS)
def test_ours_stand_behind_the_packages_and_before_torchs_own(operation: str) -> None:
    kinds = [kind for kind, _ in select.OPERATIONS[operation].candidates]
    assert [k for k in kinds if k != "torch fused"] == [k for k in (COMPILED, TE, APEX, TRITON) if k in kinds]
    assert TRITON in kinds and kinds.index(TRITON) < kinds.index("torch fused") if "torch fused" in kinds else True


def test_where_triton_cannot_be_used_the_reason_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    makes = [dict(select.OPERATIONS[operation].candidates)[TRITON] for operation in OURS]
    for make in makes:
        with pytest.raises(Unsupported, match="computes in fp32, not torch.float64"):
            make(Target(torch.device("cuda"), torch.float64))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for make in makes:
        with pytest.raises(Unsupported, match="not installed"):
            make(ON_CUDA)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "megallama.kernels.triton_kernels", raising=False)
    monkeypatch.setattr(Target, "need_cuda", lambda self: None)
    choices = {c.operation: c for c in select.select_kernels(Target(torch.device("cpu"), torch.float32)).choices}
    for operation in OURS:
        assert dict(choices[operation].refused)[TRITON].startswith("import of triton halted"), choices[operation]
        assert choices[operation].broken and choices[operation].selected != TRITON


def test_only_a_selected_kernel_imports_triton() -> None:
    """No module of the package imports Triton, or a file that does, before a candidate is tried."""
    found = []
    for path in sorted((ROOT / "megallama").rglob("*.py")):
        top = [
            node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        if any("triton" in ast.unparse(node) for node in top):
            found.append(path.name)
    assert found == ["triton_kernels.py"]
