"""Recorded micro-batches: the same bits as without, from a tape that runs no Python when it is played again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megallama.config.schema import Config
from megallama.kernels.choose import choose_kernels
from megallama.plan.plan import make_plan
from megallama.train import graphs
from megallama.train.assemble import DTYPES, Rank, assemble, initialize
from megallama.train.step import train_step
from tests.small import CPU, curve, micro_batches, small_config, tokens, train
from tests.threads import run_threads
from tests.train.tape import TapeRecorder

STEPS = 6


def config(settings: dict[str, Any], on: bool, microbatches: int = 3, dp: int = 1) -> Config:
    batch = {"micro_batch_size": 2, "global_batch_size": 2 * microbatches * dp, **settings.get("batch", {})}
    return small_config(**{**settings, "batch": batch, "run": {"cuda_graphs": on}})


def trained(settings: dict[str, Any], on: bool, microbatches: int = 3, dp: int = 1) -> list[tuple[Any, list[str]]]:
    """Of every rank: the curve, gradients and weights after the last step, and what the recorder was asked for."""
    setting = config(settings, on, microbatches, dp)
    plan = make_plan(setting, dp)
    data = tokens(setting, STEPS)

    def body(groups: Any) -> tuple[Any, list[str]]:
        recorder = TapeRecorder()
        kernels = choose_kernels(CPU, DTYPES[setting.precision.dtype])
        rank = assemble(plan, groups, CPU, kernels, recorder=recorder)
        initialize(rank, 7)
        numbers = curve(train(rank, data))
        rank.optimizer.wait()
        grads = rank.buffers[0].grads.nan_to_num(7.0)  # of other ranks' shards a reduction leaves anything
        return (numbers, grads, rank.buffers[0].weights.clone()), recorder.log

    return run_threads(dp, body, plan.topology, num_kv_heads=4)


def assert_same_bits(mine: Any, want: Any) -> None:
    assert mine[0] == want[0]
    assert torch.equal(mine[1], want[1]) and torch.equal(mine[2], want[2])


VARIANTS: list[dict[str, Any]] = [
    {},
    {"precision": {"dtype": "bf16"}},
    {"precision": {"dtype": "fp32"}, "memory": {"recompute": "full"}},
    {"precision": {"dtype": "fp32"}, "memory": {"recompute": "none"}, "model": {"tie_embeddings": True}},
    {"model": {"num_kv_heads": 2}},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_replays_give_the_bits_of_running(settings: dict[str, Any]) -> None:
    ((want, nothing),) = trained(settings, on=False)
    ((mine, log),) = trained(settings, on=True)
    assert nothing == []
    assert_same_bits(mine, want)
    warm = graphs.WARM_UPS
    assert log.count("warm up") == 2 * warm and log.count("record") == 2  # first of a step, and others
    assert log.count("replay") == 3 * STEPS - 2 * warm


def test_one_micro_batch_per_step_needs_one_recording() -> None:
    ((want, _),) = trained({}, on=False, microbatches=1)
    ((mine, log),) = trained({}, on=True, microbatches=1)
    assert_same_bits(mine, want)
    assert log == ["warm up"] * graphs.WARM_UPS + ["record"] + ["replay"] * (STEPS - graphs.WARM_UPS)


@pytest.mark.parametrize("overlap", [True, False])
def test_where_gradients_are_reduced_under_the_backward_the_last_is_run(overlap: bool) -> None:
    settings = {"overlap": {"grad_reduce": overlap}}
    wanted, mine = trained(settings, on=False, dp=2), trained(settings, on=True, dp=2)
    for (want, _), (have, log) in zip(wanted, mine, strict=True):
        assert_same_bits(have, want)
        taken = (2 if overlap else 3) * STEPS
        assert log.count("warm up") + log.count("replay") == taken and log.count("record") == 2


def test_loss_scale_and_token_count_reach_a_replay() -> None:
    """The scale of the gradient is a value in memory, not one of the recording."""
    results = []
    for on in (False, True):
        setting = config({"precision": {"dtype": "fp32"}}, on)
        ((rank, _),) = [built(setting)]
        data, scales = tokens(setting, STEPS), [1.0, 2.0, 4.0, 8.0, 1024.0, 2.0]
        for batch, scale in zip(data, scales, strict=True):
            batches = micro_batches(rank, batch)
            results.append(train_step(rank, rank.plan.schedule_for(len(batches)), batches, 1e-3, loss_scale=scale))
    half = len(results) // 2
    assert results[half:] == results[:half]
    assert len({r.grad_norm for r in results}) == half


def built(setting: Config) -> tuple[Rank, TapeRecorder]:
    plan, recorder = make_plan(setting, 1), TapeRecorder()
    kernels = choose_kernels(CPU, DTYPES[setting.precision.dtype])

    def body(groups: Any) -> Rank:
        rank = assemble(plan, groups, CPU, kernels, recorder=recorder)
        initialize(rank, 7)
        return rank

    (rank,) = run_threads(1, body, plan.topology, num_kv_heads=4)
    return rank, recorder


def test_weights_are_whole_before_a_replay() -> None:
    rank, recorder = built(config({}, True, microbatches=1))
    data = tokens(rank.plan.config, STEPS)
    train(rank, data[:4])

    class Late:
        """A gather that is under way: the weights are wrong until it is awaited."""

        def wait(self) -> None:
            recorder.log.append("gathered")

        def done(self) -> bool:
            return True

    recorder.log.clear()
    for gather in rank.buffers[0].gathers:
        gather.start(Late())
    train(rank, data[4:5])
    assert recorder.log == ["gathered"] * len(rank.buffers[0].gathers) + ["replay"]


def test_a_gpu_is_what_records_without_a_recorder() -> None:
    rank, _ = built(config({}, True))
    assert rank.runtime._whole is not None
    setting = config({}, True)
    plan = make_plan(setting, 1)
    kernels = choose_kernels(CPU, torch.float64)
    (on_cpu,) = run_threads(1, lambda groups: assemble(plan, groups, CPU, kernels), plan.topology, num_kv_heads=4)
    assert on_cpu.runtime._whole is None


def test_masks_are_refused() -> None:
    rank, _ = built(config({}, True))
    data = tokens(rank.plan.config, 1)
    masks = torch.ones(1, 6, rank.plan.config.batch.seq_length, dtype=torch.bool)
    with pytest.raises(AssertionError, match="masks of recorded micro-batches are fixed"):
        train(rank, data, masks)
