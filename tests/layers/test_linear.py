"""Tensor-parallel layers: what they communicate, and that the backward is the adjoint of the forward."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch

from megallama.analysis.recording import Call, Recording
from megallama.comm.group import Groups, Solo
from megallama.config.schema import Config
from megallama.kernels.candidate import Target
from megallama.kernels.select import select_kernels
from megallama.layers.linear import TensorParallel
from megallama.plan.plan import make_plan
from megallama.train.assemble import DTYPES, Worker, assemble, initialize
from tests.small import CPU, curve, on_threads, small_config, tokens, train
from tests.threads import run_threads

TOKENS, HIDDEN = 16, 32


def recorded(config: Config, ranks: int, fn: Any) -> list[Any]:
    """fn(rank, calls) on every rank, with the operations of the tensor-parallel group written down."""
    plan = make_plan(config, ranks)

    def body(groups: Groups) -> Any:
        calls: list[Call] = []
        groups = Groups(**{**vars(groups), "tp": Recording(groups.tp, calls)})
        rank = assemble(plan, groups, CPU, select_kernels(Target(CPU, DTYPES[config.precision.dtype])))
        initialize(rank, 1)
        calls.clear()
        return fn(rank, calls)

    return run_threads(ranks, body, plan.topology, num_kv_heads=config.model.num_kv_heads or 1)


def one_layer(rank: Worker, calls: list[Call]) -> tuple[list[Call], list[Call]]:
    """What one layer communicates in its forward and in its backward."""
    layer = rank.stages[0].layers[0]
    rows = TOKENS // (rank.groups.tp.size if rank.plan.config.parallel.sequence_parallel else 1)
    x = torch.randn(rows, HIDDEN, dtype=DTYPES[rank.plan.config.precision.dtype], requires_grad=True)
    out = torch.add(*layer(x, None, *rank.stages[0].rotary.tables(None)))
    forward = list(calls)
    calls.clear()
    out.backward(torch.randn_like(out))
    return forward, list(calls)


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_layer_communicates_what_the_contract_says(recompute: str, dtype: str) -> None:
    config = small_config(parallel={"tp": 2}, memory={"recompute": recompute}, precision={"dtype": dtype})
    full = TOKENS * HIDDEN * (2 if dtype == "bf16" else 4)
    for forward, backward in recorded(config, 2, one_layer):
        assert [c.op for c in forward] == ["all_gather", "reduce_scatter"] * 2
        assert Counter(c.op for c in backward) == {"all_gather": 4, "reduce_scatter": 2}  # 2 of them re-gathers
        assert {c.nbytes for c in forward + backward} == {full}
        assert {c.shape for c in forward + backward} == {(TOKENS, HIDDEN)}
        # the re-gather of the input starts before the reduce-scatter that follows the dgrad GEMM
        assert [c.op for c in backward] == ["all_gather", "all_gather", "reduce_scatter"] * 2


def test_without_sequence_parallelism_there_are_two_all_reduces_each_way() -> None:
    config = small_config(parallel={"tp": 2, "sequence_parallel": False})
    for forward, backward in recorded(config, 2, one_layer):
        assert [c.op for c in forward] == ["all_reduce"] * 2
        assert [c.op for c in backward] == ["all_reduce"] * 2
        assert {c.nbytes for c in forward + backward} == {TOKENS * HIDDEN * 8}


def test_one_rank_communicates_nothing() -> None:
    def calls_of(rank: Worker) -> tuple[list[Call], list[Call]]:
        calls: list[Call] = []
        return one_layer(rank, calls)

    assert on_threads(small_config(), 1, calls_of) == [([], [])]


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("tp", [2, 4])
def test_backward_is_the_adjoint_of_forward(tp: int, sequence_parallel: bool) -> None:
    """<J u, w> summed over ranks equals <u, J' w>: the directional derivative by central differences."""
    config = small_config(parallel={"tp": tp, "sequence_parallel": sequence_parallel}, model={"init_std": 0.2})

    def body(rank: Worker) -> tuple[float, float]:
        layer, group = rank.stages[0].layers[0], rank.groups.tp
        tables = rank.stages[0].rotary.tables(None)
        generator = torch.Generator().manual_seed(3)
        rows = TOKENS // (tp if sequence_parallel else 1)
        whole = torch.randn(3, TOKENS, HIDDEN, dtype=torch.float64, generator=generator)
        x, u, w = (t[group.rank * rows : (group.rank + 1) * rows] if sequence_parallel else t for t in whole)
        leaf = x.clone().requires_grad_()
        torch.add(*layer(leaf, None, *tables)).backward(w)
        with torch.no_grad():
            a, b = (torch.add(*layer(x + e * u, None, *tables)) for e in (1e-6, -1e-6))
            step = (a - b) / 2e-6
        assert leaf.grad is not None
        products = torch.stack(((step * w).sum(), (u * leaf.grad).sum()))
        if sequence_parallel:  # otherwise every rank holds all rows
            group.all_reduce(products).wait()
        return float(products[0]), float(products[1])

    for forward, backward in on_threads(config, tp, body):
        assert abs(forward - backward) <= 1e-7 * abs(forward)


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_forward_in_pieces_communicates_pieces(recompute: str, chunks: int) -> None:
    """As many bytes in more calls, in forwards only."""
    sections = {"overlap": {"tensor_parallel_chunks": chunks}, "memory": {"recompute": recompute}}
    for forward, backward in recorded(small_config(parallel={"tp": 2}, **sections), 2, one_layer):
        assert [c.op for c in forward] == (["all_gather"] * chunks + ["reduce_scatter"] * chunks) * 2
        assert {c.shape for c in forward} == {(TOKENS // chunks, HIDDEN)}
        assert {c.shape for c in backward} == {(TOKENS, HIDDEN)}


def test_one_rank_cuts_nothing_into_pieces() -> None:
    """Its products stay whole: their bits would hang on the pieces, and nothing would run meanwhile."""
    tp = TensorParallel(Solo("tp"), sequence_parallel=False, overlap=True, keep=False, chunks=4)
    assert tp.pieces(16) == 1 and replace(tp, sequence_parallel=True).pieces(16) == 1


def test_pieces_are_under_way_during_products() -> None:
    """What of a piece is under way while another one is multiplied, in the order of a trace."""

    def order(rank: Worker, calls: list[Call]) -> list[str]:
        output: list[str] = []
        layer, tp = rank.stages[0].layers[0], rank.stages[0].layers[0].qkv_proj.tp
        group, gemms = tp.group, layer.gate_up_proj.param._gemms

        class Noted:
            def __init__(self, number: int, handle: Any) -> None:
                self.number, self.handle = number, handle

            def wait(self) -> None:
                output.append(f"wait {self.number}")
                self.handle.wait()

        started = count()

        def noted(handle: Any) -> Any:
            output.append(f"start {(number := next(started))}")
            return Noted(number, handle)

        class Group:
            size, rank, name = group.size, group.rank, group.name

            def all_gather(self, *tensors: torch.Tensor) -> Any:
                return noted(group.all_gather(*tensors))

            def reduce_scatter(self, *tensors: torch.Tensor) -> Any:
                return noted(group.reduce_scatter(*tensors))

        def multiplied(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            output.append("product")
            return gemms.fprop(a, b)

        ours = replace(tp, group=Group())  # type: ignore[arg-type]
        for linear in (layer.gate_up_proj, layer.down_proj):
            linear.tp, linear.param._gemms = ours, replace(gemms, fprop=multiplied)
        x = torch.randn(TOKENS // 2, HIDDEN, dtype=torch.float64)
        layer.down_proj(layer.gate_up_proj(x, None)[1])
        return output

    config = small_config(parallel={"tp": 2}, overlap={"tensor_parallel_chunks": 2})
    column = ["start 0", "wait 0", "start 1", "product", "wait 1", "product"]
    row = ["product", "start 2", "product", "start 3", "wait 2", "wait 3"]
    assert recorded(config, 2, order) == [column + row] * 2


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("tp", [2, 4])
def test_a_forward_in_pieces_is_the_whole_one(tp: int, recompute: str, sequence_parallel: bool) -> None:
    def outcome(rank: Worker) -> torch.Tensor:
        numbers = curve(train(rank, tokens(rank.plan.config, 2)))
        return torch.cat((torch.tensor(numbers, dtype=torch.float64), rank.buffers[0].grads))

    parallel = {"tp": tp, "sequence_parallel": sequence_parallel}
    results = [
        on_threads(
            small_config(
                parallel=parallel, memory={"recompute": recompute}, overlap={"tensor_parallel_chunks": chunks}
            ),
            tp,
            outcome,
        )
        for chunks in (1, 2, 4)
    ]
    for whole, *cut in zip(*results, strict=True):
        for own in cut:
            assert torch.allclose(own, whole, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_overlap_changes_no_bit(dtype: str, chunks: int) -> None:
    def grads(rank: Worker) -> torch.Tensor:
        x = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(rank.groups.tp.rank)).to(DTYPES[dtype])
        out = torch.add(*rank.stages[0].layers[0](x.requires_grad_(), None, *rank.stages[0].rotary.tables(None)))
        out.backward(torch.ones_like(out))
        assert x.grad is not None
        return torch.cat((x.grad.reshape(-1).float(), rank.buffers[0].grads))

    results = []
    for overlap in (True, False):
        switches = {"tensor_parallel": overlap, "tensor_parallel_chunks": chunks}
        config = small_config(parallel={"tp": 2}, overlap=switches, precision={"dtype": dtype})
        results.append(on_threads(config, 2, grads))
    for on, off in zip(*results, strict=True):
        assert torch.equal(on, off)
