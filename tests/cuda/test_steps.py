"""The real training step of every layout, with every branch and kernel candidate of a GPU, on shapes and formats."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from megallama.analysis import dryrun
from megallama.config.load import load
from megallama.config.schema import Config
from megallama.kernels import gemm
from megallama.plan.plan import make_plan
from tests.cuda.claimed import claimed, kernels_on_cuda
from tests.cuda.counted_triton import counted_triton
from tests.parity.matrix import FURTHER, Layout, matrix
from tests.small import small_config

ROOT = Path(__file__).resolve().parents[2]
WIDE = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_hidden_size": 96, "vocab_size": 61}
FP8 = {"dtype": "bf16", "fp8": "tensorwise"}
CASES: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "fp16": (1, {"precision": {"dtype": "fp16"}}),
    "fp32": (1, {"precision": {"dtype": "fp32"}}),
    "fp32, documents, gqa": (1, {"precision": {"dtype": "fp32"}, "data": {"document_mask": True},
                                 "model": {"num_kv_heads": 2}}),
    "documents, gqa, tp2": (2, {"precision": {"dtype": "bf16"}, "data": {"document_mask": True},
                                "model": {"num_kv_heads": 2}, "parallel": {"tp": 2}}),
    "fp8": (1, {"precision": FP8, "model": WIDE}),
    "fp8, none": (1, {"precision": FP8, "model": WIDE, "memory": {"recompute": "none"}}),
    "fp8, full, documents, gqa": (1, {"precision": FP8, "model": WIDE | {"num_kv_heads": 2},
                                      "memory": {"recompute": "full"}, "data": {"document_mask": True}}),
    "fp8, tp2 pp2 dp2, split backward": (8, {"precision": FP8, "model": WIDE, "parallel": {
        "tp": 2, "pp": 2, "schedule": "zb-h1"}, "overlap": {"tensor_parallel_chunks": 1}}),
}  # fmt: skip


def run(config: Config, ranks: int, of: set[int] | None = None, triton: bool = False) -> list[dryrun.Program]:
    """The first rank, which has the embedding, and the last one; that all fit together is shown elsewhere."""
    with claimed(), counted_triton() if triton else nullcontext(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dryrun, "select_kernels", lambda target: kernels_on_cuda(config, triton))
        return [dryrun.record(make_plan(config, ranks), rank) for rank in of or {0, ranks - 1}]


@pytest.mark.parametrize("layout", [*matrix()[::3], *FURTHER[::2]], ids=str)
def test_layouts(layout: Layout) -> None:
    """Some of those that are compared with one rank: what a GPU does differently lies within layers."""
    for program in run(layout.config("bf16", layers=layout.few_layers), layout.ranks):
        assert bool(program.calls) == (layout.ranks > 1)


@pytest.mark.parametrize("name", CASES)
def test_formats_documents_and_grouped_heads(name: str) -> None:
    ranks, sections = CASES[name]
    assert len(run(small_config(**sections), ranks)) == min(2, ranks)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_with_the_triton_kernels(recompute: str) -> None:
    """Their host code: shapes, strides of grouped heads, tables by document, columns beside padding."""
    model, data = {"num_kv_heads": 2, "vocab_size": 63}, {"document_mask": True}
    parallel = {"tp": 2, "pp": 2}
    config = small_config(
        model=model, data=data, parallel=parallel, memory={"recompute": recompute}, precision={"dtype": "bf16"}
    )
    with claimed(), counted_triton():
        taken = {choice.operation: choice.selected for choice in kernels_on_cuda(config, triton=True).choices}
    assert {taken[name] for name in ("RMSNorm", "RoPE", "SwiGLU", "cross entropy")} == {"Triton"}
    assert all(program.calls for program in run(config, 4, triton=True))


def test_the_largest_example_at_its_size() -> None:
    """Of 2048 ranks one that has the embedding and the head; with grouped heads."""
    words = ["data.synthetic=true", "data.train=[]", "data.valid=[]", "eval.interval=0", "model.num_kv_heads=8"]
    config = load(ROOT / "examples" / "llama_65b.toml", words, ranks=2048, need_data=False)
    (program,) = run(config, 2048, of={0})
    assert program.calls


def test_a_product_that_a_gpu_would_refuse_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operand in the wrong order: fp8 products want rows along the sum."""
    plain = gemm.quantize
    monkeypatch.setattr(gemm, "quantize", lambda x, dtype, rows, columns: plain(x, dtype) * (rows + columns))
    with pytest.raises((AssertionError, RuntimeError)):
        run(small_config(precision=FP8, model=WIDE), 1)


def test_selection_takes_what_a_gpu_has() -> None:
    """Not the kernels of a CPU, so that the other tests of this folder mean something."""
    config = small_config(precision=FP8, model=WIDE)
    with claimed():
        taken = {choice.operation: choice.selected for choice in kernels_on_cuda(config).choices}
    assert taken["RMSNorm"] == "torch fused" and taken["weight gradient"] == "torch addmm into fp32"
    assert taken["fp8 products"] == "torch _scaled_mm" and "oneDNN" not in taken.values()
