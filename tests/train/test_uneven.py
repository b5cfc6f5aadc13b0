"""Replicas that differ by one micro-batch (batch.uneven): whole runs, the same as any other to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

import megallama.train.step as step_module
from megallama.config.schema import Config
from megallama.data.writer import IndexedWriter
from megallama.layers.batch import MicroBatch
from megallama.plan.plan import make_plan
from megallama.train.assemble import Worker
from megallama.train.step import StepConsensus, train_step
from tests.pool import Pool
from tests.small import micro_batches, on_threads, small_config, tokens, train
from tests.train.runs import curve, records, state_files
from tests.train.test_loop import RUN, sections

Settings = dict[str, dict[str, Any]]


def settings_of(parallel: dict[str, Any], folder: Path, **train: Any) -> Settings:
    """Sizes 4, 5, 6, 7 and 8, of which three replicas can share only one; two evaluations of 11 windows."""
    ramp = {"ramp_start": 4, "ramp_increment": 1, "ramp_samples": 20, "global_batch_size": 8, "uneven": True}
    data = {"valid": [{"path": str(folder / "held")}]}
    return {**sections(parallel, "fp64", **train), "eval": {"interval": 4}, "batch": ramp, "data": data}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, masters and moments too, by file and name."""
    files = state_files(folder).items()
    return {f"{file} {name}": tensor.double() for file, data in files for name, tensor in load(data).items()}


def test_a_run_goes_on_with_4_3_2_and_1_replicas(pool: Pool, tmp_path: Path) -> None:
    """Losses, evaluations and the last state are those of one rank, step by step with the same samples."""
    with IndexedWriter(tmp_path / "held", np.dtype(np.uint16)) as writer:
        writer.add(np.random.default_rng(0).integers(0, 61, 11 * 16 + 1))
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    pool.run(1, RUN, str(straight), settings_of({}, tmp_path))
    for ranks, steps, parallel in ((4, 2, {}), (3, 3, {}), (4, 1, {"pp": 2}), (1, None, {})):
        answers = pool.run(ranks, RUN, str(changed), settings_of(parallel, tmp_path, stop_after_steps=steps))
        assert [a.get("status") for a in answers] == [75 if steps else 0] * ranks, answers
    assert [r["consumed_samples"] for r in records(straight)] == [4, 8, 13, 19, 26, 34, 42, 50]
    for key in ("consumed_samples", "consumed_tokens", "tokens", "lr"):
        assert [r[key] for r in records(changed)] == [r[key] for r in records(straight)], key
    for own, theirs in zip(curve(changed), curve(straight), strict=True):
        assert own == pytest.approx(theirs, rel=1e-10, abs=0)
    evaluated = [[(r["step"], r["tokens"], r["loss"]) for r in records(run, "valid")] for run in (changed, straight)]
    assert [step for step, _, _ in evaluated[1]] == [4, 8]
    for own, theirs in zip(*evaluated, strict=True):
        assert own == pytest.approx(theirs, rel=1e-10, abs=0)
    own_state, state = weights(changed), weights(straight)
    assert own_state.keys() == state.keys() and len(state) > 100
    for name, tensor in state.items():
        assert (own_state[name] - tensor).norm() <= 1e-10 * tensor.norm(), name


def test_of_a_batch_that_can_be_divided_no_bit_is_another(pool: Pool, tmp_path: Path) -> None:
    for name, uneven in (("off", False), ("on", True)):
        settings = sections({"pp": 2, "schedule": "zb-h1"}, "bf16", steps=3) | {"batch": {"uneven": uneven}}
        answers = pool.run(4, RUN, str(tmp_path / name), settings)
        assert answers == [{"status": 0, "step": 3, "updates": 3}] * 4
    assert curve(tmp_path / "on") == curve(tmp_path / "off")
    assert state_files(tmp_path / "on") == state_files(tmp_path / "off")


@pytest.mark.parametrize("fault", ["read:2:2", "read-in-evaluation:0:2"])
def test_a_replica_with_fewer_micro_batches_that_has_no_data_ends_all(pool: Pool, tmp_path: Path, fault: str) -> None:
    """It brings zeros of its own number."""
    with IndexedWriter(tmp_path / "held", np.dtype(np.uint16)) as writer:
        writer.add(np.random.default_rng(0).integers(0, 61, 11 * 16 + 1))
    settings = settings_of({}, tmp_path)
    answers = pool.run(3, RUN, str(tmp_path / "run"), settings, fault, collective_timeout=20.0)
    assert all("rank 2 on" in a["error"] and "Input/output error" in a["error"] for a in answers), answers


def one_step(config: Config, ranks: int) -> list[list[float]]:
    """Loss and gradient norm of a step on every rank."""

    def body(rank: Worker) -> list[float]:
        (result,) = train(rank, tokens(config, 1))
        return [result.loss, result.grad_norm]

    return on_threads(config, ranks, body)


def batch(size: int, micro: int = 1) -> dict[str, Any]:
    return {"global_batch_size": size, "micro_batch_size": micro, "uneven": True}


V = {"pp": 3, "chunks": 2, "schedule": "zb-v"}


@pytest.mark.parametrize("overlap", [True, False])
def test_replicas_that_end_in_different_orders(overlap: bool) -> None:
    """ZB-V's middle rank of three completes its stages in another order with two micro-batches than with three."""
    settings: Settings = {"model": {"num_layers": 6}, "overlap": {"grad_reduce": overlap}}
    settings["batch"] = batch(5)
    want = one_step(small_config(**settings), 1)[0]
    for found in one_step(small_config(**settings, parallel=V), 6):
        assert found == pytest.approx(want, rel=1e-12)


def test_without_looking_at_the_orders_the_replicas_would_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "end_alike", lambda schedules, rank: True)
    with pytest.raises(RuntimeError, match=r"calls reduce_scatter .* where rank \d calls reduce_scatter"):
        one_step(small_config(model={"num_layers": 6}, parallel=V, batch=batch(5)), 6)


def first_reductions(parallel: dict[str, Any], size: int) -> list[list[str]]:
    """By rank, the action under which each bucket of a step was reduced, in order."""
    config = small_config(model={"num_layers": 6}, parallel=parallel, batch=batch(size))

    def body(rank: Worker) -> list[str]:
        seen = []
        for sync in rank.optimizer.syncs:

            def reduce(bucket: Any, real: Any = sync._reduce) -> None:
                seen.append(str(rank.runtime.observer.action))
                real(bucket)

            sync._reduce = reduce  # type: ignore[method-assign]
        train(rank, tokens(config, 1))
        return seen

    return on_threads(config, 2 * parallel["pp"], body)


def test_reductions_run_under_the_last_backward_of_each_replica() -> None:
    ranks = first_reductions({"pp": 2}, 5)  # the first replica has three micro-batches, the second two
    for rank, stage, last in ((0, 0, 2), (1, 0, 1), (2, 1, 2), (3, 1, 1)):
        assert set(ranks[rank]) == {f"B{stage}.{last}"}, ranks[rank]
    orders = first_reductions(V, 5)
    assert [{"None"} == set(seen) for seen in orders] == [False, False, True, True, False, False]
    assert first_reductions(V, 6)[2][0] != "None"  # three for each


def test_tokens_are_those_of_all_replicas() -> None:
    """With every fifth token masked and without: the loss is a mean over the tokens of the step."""
    config, seen = small_config(batch=batch(8, 2)), []
    for masked in (False, True):
        masks = torch.arange(16).expand(1, 8, 16) % 5 > 0 if masked else None

        def body(rank: Worker, masks: torch.Tensor | None = masks) -> int:
            (result,) = train(rank, tokens(config, 1), masks)
            return result.tokens

        seen.append(on_threads(config, 3, body))
    assert seen == [[8 * 16] * 3, [8 * 12] * 3]


def test_a_deal_that_is_not_the_batch_is_a_bug() -> None:
    config = small_config(batch=batch(8))

    def body(rank: Worker) -> StepConsensus:
        batches: list[MicroBatch] = micro_batches(rank, tokens(config, 1)[0])
        return train_step(rank, rank.plan.schedule_for(len(batches)), batches, 1e-3, deal=(3, 2, 3))

    with pytest.raises(AssertionError, match=r"\(3, 2, 3\), [12], [32]"):
        on_threads(config, 3, body)


def test_ranks_with_as_many_micro_batches_are_compared() -> None:
    plan = make_plan(small_config(parallel={"pp": 2}, batch=batch(8)), 6)
    assert [plan.work_of(rank) for rank in range(6)] == [(0, 3), (0, 3), (0, 2), (1, 3), (1, 3), (1, 2)]
    even = make_plan(small_config(parallel={"pp": 2}), 4)
    assert [even.work_of(rank) for rank in range(4)] == [(0,), (0,), (1,), (1,)]
