"""The dry run is the real program: what it records is what ranks really do, and the plan predicts it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import pytest
import torch

import megallama.train.step as step_module
from megallama.analysis.agreement import Disagreement, prove
from megallama.analysis.communication import collectives, communication_table
from megallama.analysis.dryrun import dry_run, record
from megallama.analysis.recording import Call, Recording
from megallama.comm.group import Groups, partitions
from megallama.config.load import load
from megallama.config.schema import BatchConfig, Config
from megallama.plan.exchange import exchange
from megallama.plan.plan import Plan, make_plan
from megallama.train.assemble import DTYPES
from megallama.train.step import evaluate_step
from tests.parity.matrix import FURTHER, Layout, matrix
from tests.small import build, documents, micro_batches, small_config, tokens, train
from tests.threads import run_threads

Key = tuple[object, ...]
SWITCHES = ("grad_reduce", "param_gather", "tensor_parallel")
FORMATS = {**DTYPES, "int64": torch.int64}


def key(call: Call) -> Key:
    return replace(call, label="")  # type: ignore[return-value]


def real_calls(config: Config, ranks: int) -> list[dict[str, list[Call]]]:
    """What every rank really does in two steps, an evaluation and a skipped step, on threads."""
    plan = make_plan(config, ranks)
    data = tokens(config, 3)
    starts = documents(config, 3) if config.data.document_mask else None

    def body(groups: Groups) -> dict[str, list[Call]]:
        calls: list[Call] = []

        def recording(group: object) -> object:
            return Recording(group, calls) if len(getattr(group, "ranks", ())) > 1 else group  # type: ignore[arg-type]

        groups = Groups(**{name: recording(value) for name, value in vars(groups).items()})
        rank = build(plan, groups)
        out = {"loading": list(calls)}
        for step in range(2):
            calls.clear()
            train(rank, data[step : step + 1], starts=None if starts is None else starts[step : step + 1])
            out[f"step {step + 1}"] = list(calls)
        calls.clear()
        batches = micro_batches(rank, data[2], None, None if starts is None else starts[2])
        evaluate_step(rank, plan.schedule_for(len(batches), training=False), batches)
        out["evaluation"] = list(calls)
        calls.clear()
        rank.buffers[next(iter(rank.buffers))].weights.fill_(float("nan"))
        (result,) = train(rank, data[2:], starts=None if starts is None else starts[2:])
        assert not result.applied
        out["skipped step 3"] = list(calls)
        return out

    return run_threads(ranks, body, plan.topology, num_kv_heads=config.model.num_kv_heads or 1)


OTHERS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "no overlap": (4, {"parallel": {"tp": 2, "pp": 2}, "overlap": dict.fromkeys(SWITCHES, False)}),
    "no overlap over dp": (4, {"parallel": {"pp": 2}, "overlap": dict.fromkeys(SWITCHES, False)}),
    "many micro-batches": (2, {"parallel": {"pp": 2, "chunks": 2}, "batch": {"global_batch_size": 16}}),
    "many micro-batches, zb-h1": (2, {"parallel": {"pp": 2, "schedule": "zb-h1"}, "batch": {"global_batch_size": 16}}),
    "another order of ranks": (8, {"parallel": {"tp": 2, "pp": 2, "rank_order": "pp-dp-cp-tp"}}),
    "stages without layers": (4, {"parallel": {"pp": 4, "stage_layers": [2, 0, 2, 0]}}),
    "small buckets": (4, {"parallel": {"tp": 2}, "overlap": {"bucket_mb": 0.001}, "precision": {"dtype": "bf16"}}),
    "one loss chunk": (2, {"parallel": {"tp": 2}, "memory": {"loss_chunk_tokens": 1000}}),
}
CONTEXT: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {  # each with two layers
    "gathered": (
        4,
        {
            "parallel": {"cp": 2, "cp_exchange": "gather"},
            "batch": {"micro_batch_size": 2},
            "overlap": {"context_parallel_heads": 2},
        },
    ),
    "gathered and kept": (
        4,
        {
            "parallel": {"cp": 4, "cp_exchange": "gather"},
            "memory": {"cp_keep_kv": True},
            "data": {"document_mask": True},
        },
    ),
    "gathered for layers that are computed again": (
        4,
        {
            "parallel": {"cp": 2, "pp": 2, "cp_exchange": "gather", "schedule": "zb-h1"},
            "memory": {"recompute": "full"},
        },
    ),
    "by heads, with copies": (
        4,
        {
            "parallel": {"cp": 2, "tp": 2, "cp_exchange": "heads"},
            "model": {"num_kv_heads": 1},
            "data": {"document_mask": True},
        },
    ),
    "by heads of layers that are computed again": (
        4,
        {
            "parallel": {"cp": 2, "cp_exchange": "heads", "rank_order": "dp-cp-tp-pp"},
            "memory": {"recompute": "full", "cp_keep_kv": True},
        },
    ),
}


@pytest.mark.parametrize("name", CONTEXT)
def test_what_context_parallelism_moves_is_what_the_plan_says(name: str) -> None:
    ranks, sections = CONTEXT[name]
    the_same(small_config(**{**sections, "model": {"num_layers": 2, **sections.get("model", {})}}), ranks)


def test_auto_is_the_exchange_of_fewer_bytes() -> None:
    """Counted, over the shapes where it can choose; where both are the same keys and values are gathered."""
    taken = Counter[str]()
    for n, k, tp, cp in product((8, 32), (1, 2, 8), (1, 4), (2, 4, 8)):
        for recompute, keep in product(("none", "full"), (False, True)):
            words = [f"model.num_heads={n}", f"model.num_kv_heads={k}", f"parallel.tp={tp}", f"parallel.cp={cp}"]
            words += [f"memory.recompute={recompute}", f"memory.cp_keep_kv={str(keep).lower()}"]
            base = load(None, ["model.preset=debug", "model.head_dim=8", *words], need_data=False)
            if n // tp % cp:
                assert exchange(base)[0] == "gather"
                continue
            moved = {}
            for kind in ("heads", "gather"):
                plan = make_plan(base.changed(parallel={"cp_exchange": kind}), tp * cp)
                found = collectives(plan.config, plan.topology, plan.stages, plan.schedule, 0)
                moved[kind] = sum(c.nbytes for c in found if c.axis == "cp")
            want = "heads" if moved["heads"] < moved["gather"] else "gather"
            assert exchange(base)[0] == want, (words, moved)
            taken[want] += 1
    assert min(taken["heads"], taken["gather"]) > 10


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_matrix_leaves_out(name: str) -> None:
    ranks, sections = OTHERS[name]
    the_same(small_config(**sections), ranks)


@pytest.mark.parametrize("layout", [row for row in [*matrix(), *FURTHER] if row.ranks > 1], ids=str)
def test_every_rank_does_what_the_dry_run_says(layout: Layout) -> None:
    the_same(layout.config("fp32", layers=layout.few_layers), layout.ranks)


def the_same(config: Config, ranks: int) -> None:
    plan = make_plan(config, ranks)
    done = dry_run(plan)
    for rank, phases in enumerate(real_calls(config, ranks)):
        program = done.programs[rank]
        assert tuple(phases) == done.phases
        for phase, calls in phases.items():
            own = [c for c in program.calls if c.label.endswith(phase)]
            assert list(map(key, own)) == list(map(key, calls)), (rank, phase)
        assert predicted(plan, rank) == counted(phases["step 2"]), rank


def test_a_growing_batch_runs_every_size() -> None:
    ramp = {"global_batch_size": 8, "ramp_start": 4, "ramp_increment": 2, "ramp_samples": 100}
    config = small_config(parallel={"pp": 2}, batch=ramp)
    done = dry_run(make_plan(config, 2))
    sends = [sum(c.op == "send" and c.label.endswith(f"step {i}") for c in done.programs[0].calls) for i in range(1, 5)]
    assert sends == [4, 6, 8, 8]


UNEVEN = {"batch": {"global_batch_size": 5, "uneven": True}, "model": {"num_layers": 6}}


def test_an_uneven_batch_is_proved_for_every_size_of_a_ramp() -> None:
    """Replicas of a stage share a program only where they have as many micro-batches in every step."""
    ramp = {"global_batch_size": 5, "ramp_start": 3, "ramp_increment": 1, "ramp_samples": 9, "uneven": True}
    config = small_config(parallel={"pp": 2}, batch=ramp)
    done = dry_run(make_plan(config, 6))
    assert done.blocking and len(set(done.programs)) == 6  # sizes 3, 4, 5: 1 1 1, 2 1 1, 2 2 1
    sends = [Counter(c.label.split(" of ")[-1] for c in p.calls if c.op == "send") for p in done.programs[:3]]
    steps = [[found[f"step {i}"] for i in range(1, 5)] for found in sends]
    assert steps == [[1, 2, 2, 2], [1, 1, 2, 2], [1, 1, 1, 1]]


def test_replicas_that_reduce_in_different_orders_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZB-V's middle rank of three completes its stages in another order with two micro-batches than with three."""
    plan = make_plan(small_config(parallel={"pp": 3, "chunks": 2, "schedule": "zb-v"}, **UNEVEN), 6)
    assert dry_run(plan).blocking
    monkeypatch.setattr(step_module, "end_alike", lambda schedules, rank: True)
    with pytest.raises(Disagreement, match="group dp of ranks 2, 3, call .*says reduce_scatter"):
        dry_run(plan)


def test_a_deal_that_is_off_by_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rank of a pipeline takes its number of micro-batches from the next replica."""
    plan, real = make_plan(small_config(parallel={"pp": 2}, **UNEVEN), 4), BatchConfig.deal
    programs = [record(plan, rank) for rank in range(4)]
    groups = partitions(plan.topology, 4)
    prove(programs, groups)
    monkeypatch.setattr(BatchConfig, "deal", lambda self, size, dp: real(self, size, dp)[::-1])
    with pytest.raises(Disagreement, match="group pp of ranks 0, 2, message 2 from rank 0 to rank 2: rank 0 says"):
        prove([*programs[:2], *(record(plan, rank) for rank in (2, 3))], groups)


def test_the_table_of_collectives() -> None:
    plan = make_plan(small_config(parallel={"tp": 2, "pp": 2}), 8)
    table = communication_table(plan.config, plan.topology, plan.stages, plan.schedule).splitlines()
    rows = {tuple(line.split()[:3]): line.split()[-2:] for line in table[1:-1]}
    hidden = 16 * 32 * 8  # bytes of [tokens, hidden] in fp64
    assert rows["tp", "all_gather", "layers"] == [str(4 * 2 * 6), f"{4 * 2 * 6 * hidden / 2**20:.3f}"]
    assert rows["pp", "recv", "activations"] == ["4", f"{4 * hidden // 2 / 2**20:.3f}"]
    assert rows["world", "all_reduce", "loss,"] == ["1", "0.000"]
    assert table[-1].startswith("of a rank at pipeline position 1,")


def predicted(plan: Plan, rank: int) -> Counter[Key]:
    at = plan.topology.coords(rank)
    batch = plan.config.batch
    schedule = plan.schedule_for(batch.deal(batch.global_batch_size, plan.topology.dp)[at["dp"]])
    (same_weights,) = (ranks for ranks in plan.topology.groups("dp", "cp") if rank in ranks)
    found = collectives(plan.config, plan.topology, plan.stages, schedule, at["pp"], same_weights.index(rank))
    assert all(c.count > 0 and c.nbytes == c.count * prod(c.shape) * FORMATS[c.dtype].itemsize for c in found)
    out: Counter[Key] = Counter()
    for c in found:
        out[c.axis, c.op, c.shape, FORMATS[c.dtype]] += c.count
    return out


def counted(calls: list[Call]) -> Counter[Key]:
    return Counter((c.group, c.op, c.shape, c.dtype) for c in calls)
