"""Whole runs: resuming, changing the layout, faults that must not spread, signals, evaluation, ramp-up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megallama.data.writer import IndexedWriter
from tests.pool import Pool
from tests.train.runs import curve, records, state_files
from tests.train.test_metrics import scalars

RUN = "tests.train.runs:run"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "pp2 chunks2 dp2": (4, {"pp": 2, "chunks": 2}),
    "pp2 zb-h1": (2, {"pp": 2, "schedule": "zb-h1"}),
    "cp2 dp2": (4, {"cp": 2}),
    "pp2 zb-v": (2, {"pp": 2, "chunks": 2, "schedule": "zb-v"}),
}


def sections(parallel: dict[str, Any], dtype: str = "bf16", **train: Any) -> dict[str, dict[str, Any]]:
    return {
        "parallel": parallel,
        "precision": {"dtype": dtype},
        "train": {"steps": 8, **train},
        "lr_schedule": {"kind": "cosine", "warmup_steps": 2},
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resuming_changes_no_bit(pool: Pool, tmp_path: Path, layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    straight, stopped = str(tmp_path / "straight"), str(tmp_path / "stopped")
    for answer in pool.run(ranks, RUN, straight, sections(parallel)):
        assert answer == {"status": 0, "step": 8, "updates": 8}
    for steps in (3, 2, None):  # stopped twice
        for answer in pool.run(ranks, RUN, stopped, sections(parallel, stop_after_steps=steps)):
            assert answer["status"] == (75 if steps else 0)
    assert curve(Path(stopped)) == curve(Path(straight))
    own, theirs = state_files(Path(stopped)), state_files(Path(straight))
    assert own.keys() == theirs.keys() and len(own) == 4
    assert own == theirs


def test_every_layout_writes_the_same_bytes_and_continues_any_other(pool: Pool, tmp_path: Path) -> None:
    """In float64 a run that changes its layout twice follows the one that never does, to rounding."""
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    pool.run(1, RUN, str(straight), sections({}, "fp64"))
    starts = (2, "tp2 pp2"), (2, "pp2 chunks2 dp2"), (1, "cp2 dp2"), (1, "pp2 zb-v"), (1, "dp2"), (None, "pp2 zb-h1")
    for steps, layout in starts:
        ranks, parallel = LAYOUTS[layout]
        pool.run(ranks, RUN, str(changed), sections(parallel, "fp64", stop_after_steps=steps))
    for own, theirs in zip(curve(changed), curve(straight), strict=True):
        assert own == pytest.approx(theirs, rel=1e-10, abs=0)


@pytest.mark.parametrize("layout", ["one", "tp2 pp2", "dp2"])
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(pool: Pool, tmp_path: Path, layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    good, bad = tmp_path / "good", tmp_path / "bad"
    settings = sections(parallel, "fp32", stop_after_steps=3)
    pool.run(ranks, RUN, str(good), settings)
    settings["train"]["stop_after_steps"] = 4
    answers = pool.run(ranks, RUN, str(bad), settings, f"nan:3:{ranks - 1}")
    assert [a["updates"] for a in answers] == [3] * ranks
    assert state_files(bad) == state_files(good)
    last = records(bad)[-1]
    assert last["skipped"] and last["skipped_steps"] == 1 and last["loss"] is None
    assert [r["skipped"] for r in records(bad)] == [False, False, False, True]


def test_too_many_bad_steps_end_the_run(pool: Pool, tmp_path: Path) -> None:
    settings = sections({}, "fp32", max_bad_steps=2)
    settings["checkpoint"] = {"interval": 2}
    answers = pool.run(2, RUN, str(tmp_path), settings, "nan:3,4:1")
    assert answers[0] == answers[1] and answers[0]["type"] == "TrainingStopped"
    assert answers[0]["error"].startswith(
        "loss or gradients were non-finite for 2 steps in a row (steps 4-5); last good step 3; resume from step 2"
    )


@pytest.mark.parametrize("layout", ["one", "tp2 pp2"])
def test_a_signal_to_one_rank_saves_the_same_step_on_all(pool: Pool, tmp_path: Path, layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    answers = pool.run(ranks, RUN, str(tmp_path), sections(parallel), f"signal:4:{ranks - 1}")
    assert answers == [{"status": 75, "step": 5, "updates": 5}] * ranks
    assert (tmp_path / "checkpoints" / "step-00000005" / "manifest.json").exists()
    assert "stopped: SIGTERM on 1 rank; saved at step 5" in (tmp_path / "run.log").read_text()
    pool.run(ranks, RUN, str(tmp_path / "straight"), sections(parallel))
    pool.run(ranks, RUN, str(tmp_path), sections(parallel))
    assert curve(tmp_path) == curve(tmp_path / "straight")


def test_every_rank_logs_the_loss_where_asked(pool: Pool, tmp_path: Path) -> None:
    pool.run(4, RUN, str(tmp_path), sections({"tp": 2, "pp": 2}) | {"log": {"every_rank": True, "interval": 3}})
    assert [r["step"] for r in records(tmp_path)] == [3, 6, 8]  # the last one too
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000008"]
    loss = f"loss {curve(tmp_path)[-1][1]:.4f}"
    for rank in range(4):
        assert f"step 8/8 | {loss}" in (tmp_path / "logs" / f"rank-000{rank}.log").read_text()


def test_another_synchronised_metric_is_two_edits(pool: Pool, tmp_path: Path) -> None:
    """What `rank_numbers` has more is summed over the ranks and stands in metrics.jsonl; `TAGS` draws it."""
    settings = sections({"tp": 2, "pp": 2}, "fp32", steps=3) | {"log": {"tensorboard": True}}
    answers = pool.run(4, "tests.train.runs:run_with_another_metric", str(tmp_path), settings)
    assert answers == [{"status": 0, "step": 3, "updates": 3}] * 4
    assert [r["layers_held"] for r in records(tmp_path)] == [8.0] * 3  # four layers, each held by two ranks
    assert scalars(tmp_path / "tensorboard")["train/layers_held"] == [(1, 8.0), (2, 8.0), (3, 8.0)]


def test_evaluation_is_the_mean_over_real_samples(pool: Pool, tmp_path: Path) -> None:
    """11 windows in batches of 8: the padding of the second batch counts nothing, in any layout."""
    generator = np.random.default_rng(0)
    with IndexedWriter(tmp_path / "held", np.dtype(np.uint16)) as writer:
        writer.add(generator.integers(0, 61, 11 * 16 + 1))
    results = []
    for name in ("one", "tp2 pp2", "dp2", "cp2 dp2", "pp2 zb-v"):
        ranks, parallel = LAYOUTS[name]
        settings = sections(parallel, "fp64") | {"eval": {"interval": 4}}
        settings["data"] = {"valid": [{"path": str(tmp_path / "held")}]}
        pool.run(ranks, RUN, str(tmp_path / name), settings)
        results.append([(r["step"], r["loss"], r["tokens"]) for r in records(tmp_path / name, "valid")])
    assert [step for step, _, _ in results[0]] == [4, 8]
    assert all(tokens == 11 * 16 for _, _, tokens in results[0])
    assert abs(results[0][0][1] - math.log(61)) < 0.05
    for other in results[1:]:
        for own, theirs in zip(other, results[0], strict=True):
            assert own == pytest.approx(theirs, rel=1e-10)


def test_ramp_up_uses_each_sample_once_in_any_layout(pool: Pool, tmp_path: Path) -> None:
    ramp = {"ramp_start": 4, "ramp_increment": 4, "ramp_samples": 16, "global_batch_size": 12}
    curves = []
    for name in ("one", "dp2"):
        ranks, parallel = LAYOUTS[name]
        settings = {**sections(parallel, "fp64"), "batch": ramp}
        pool.run(ranks, RUN, str(tmp_path / name), settings)
        curves.append(curve(tmp_path / name))
    consumed = [r["consumed_samples"] for r in records(tmp_path / "one")]
    assert consumed == [4, 8, 16, 28, 40, 52, 64, 76]
    for own, theirs in zip(curves[1], curves[0], strict=True):
        assert own == pytest.approx(theirs, rel=1e-10)


def test_fp16_scales_its_loss_and_recovers_from_overflow(pool: Pool, tmp_path: Path) -> None:
    settings = sections({"tp": 2, "pp": 2}, "fp16")
    settings["precision"] |= {"initial_loss_scale": 2.0**24, "loss_scale_window": 3}
    answers = pool.run(4, RUN, str(tmp_path), settings)
    lines = records(tmp_path)
    skipped = sum(r["skipped"] for r in lines)
    assert [a["updates"] for a in answers] == [8 - skipped] * 4
    scales = [r["loss_scale"] for r in lines]
    assert skipped == 0 or scales[0] < 2.0**24
    fp32 = tmp_path / "fp32"
    pool.run(1, RUN, str(fp32), sections({}, "fp32"))
    first = next(r for r in lines if not r["skipped"])
    want = records(fp32)[first["step"] - 1]
    assert first["loss"] == pytest.approx(want["loss"], rel=5e-3) or skipped


def test_memory_is_flat_over_the_run(pool: Pool, tmp_path: Path) -> None:
    """As many live tensors and bytes after step 40 as after step 10; what the process holds stays within 2 MB."""
    settings = sections({"tp": 2, "pp": 2}, steps=40)
    settings["data"] = {"prefetch": 0}  # how many batches wait in the queue is a matter of timing
    marks = pool.run(4, "tests.train.runs:live_memory", str(tmp_path), settings, [10, 25, 40])
    for early, middle, late in marks:
        assert late[:2] == middle[:2] == early[:2]
        assert late[2] - early[2] < 2e6


def test_transformers_opens_a_checkpoint_and_gives_our_logits(pool: Pool, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    settings = sections({"tp": 2, "pp": 2}, "fp32")
    settings["model"] = {"num_kv_heads": 2, "vocab_size": 59}
    pool.run(4, RUN, str(tmp_path), settings)
    tokens = torch.randint(0, 59, (2, 16), generator=torch.Generator().manual_seed(0))
    alone = {**settings, "parallel": {}}
    (own,) = pool.run(1, "tests.train.runs:our_logits", str(tmp_path), alone, tokens)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "step-00000008" / "model")
    with torch.no_grad():
        theirs = model(tokens).logits.reshape(own.shape)
    assert float((own - theirs).norm() / theirs.norm()) <= 2e-5
