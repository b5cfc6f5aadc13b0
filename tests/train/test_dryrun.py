"""The dry run is the real program: what it records is what ranks really do, and the plan predicts it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod

import pytest
import torch

from megallama.comm.groups import Groups
from megallama.comm.recording import Call, Recording
from megallama.plan.communication import collectives
from megallama.plan.plan import Plan, make_plan
from megallama.train.assemble import DTYPES
from megallama.train.dryrun import dry_run
from megallama.train.step import evaluate_step
from tests.parity.matrix import Layout, matrix
from tests.small import build, documents, micro_batches, tokens, train
from tests.threads import run_threads

Key = tuple[object, ...]
FORMATS = {**DTYPES, "int64": torch.int64}


def key(call: Call) -> Key:
    return replace(call, label="")  # type: ignore[return-value]


def real_calls(layout: Layout) -> list[dict[str, list[Call]]]:
    """What every rank really does in two steps, an evaluation and a skipped step, on threads."""
    config = layout.config("fp32")
    plan = make_plan(config, layout.ranks)
    data = tokens(config, 3)
    starts = documents(config, 3) if layout.documents else None

    def body(groups: Groups) -> dict[str, list[Call]]:
        calls: list[Call] = []

        def recording(group: object) -> object:
            return Recording(group, calls) if getattr(group, "size", 1) > 1 else group  # type: ignore[arg-type]

        groups = Groups(**{name: recording(value) for name, value in vars(groups).items()})
        rank = build(plan, groups)
        out = {"loading": list(calls)}
        for step in range(2):
            calls.clear()
            train(rank, data[step : step + 1], starts=None if starts is None else starts[step : step + 1])
            out[f"step {step + 1}"] = list(calls)
        calls.clear()
        batches = micro_batches(rank, data[2], None, None if starts is None else starts[2])
        evaluate_step(rank, plan.forward_schedule(len(batches)), batches)
        out["evaluation"] = list(calls)
        calls.clear()
        rank.buffers[next(iter(rank.buffers))].weights.fill_(float("nan"))
        (result,) = train(rank, data[2:], starts=None if starts is None else starts[2:])
        assert not result.applied
        out["skipped step 3"] = list(calls)
        return out

    return run_threads(layout.ranks, body, plan.topology, num_kv_heads=layout.kv_heads)


@pytest.mark.parametrize("layout", [row for row in matrix() if row.ranks > 1], ids=str)
def test_every_rank_does_what_the_dry_run_says(layout: Layout) -> None:
    plan = make_plan(layout.config("fp32"), layout.ranks)
    done = dry_run(plan)
    for rank, phases in enumerate(real_calls(layout)):
        program = done.programs[rank]
        assert tuple(phases) == done.phases
        for phase, calls in phases.items():
            mine = [c for c in program.calls if c.label.endswith(phase)]
            assert list(map(key, mine)) == list(map(key, calls)), (rank, phase)
        assert predicted(plan, rank) == counted(phases["step 2"]), rank


def predicted(plan: Plan, rank: int) -> Counter[Key]:
    at = plan.topology.coords(rank)
    found = collectives(plan.config, plan.topology, plan.stages, plan.schedule, at["pp"], at["dp"])
    assert all(c.count > 0 and c.nbytes == c.count * prod(c.shape) * FORMATS[c.dtype].itemsize for c in found)
    out: Counter[Key] = Counter()
    for c in found:
        out[c.axis, c.op, c.shape, FORMATS[c.dtype]] += c.count
    return out


def counted(calls: list[Call]) -> Counter[Key]:
    return Counter((c.group, c.op, c.shape, c.dtype) for c in calls)
