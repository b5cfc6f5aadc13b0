"""What a run finds by itself: bits that change, gradients that are wrong by much, steps that stand out."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megallama.commands.explain import explain, ledger_of, numbers_of
from megallama.data.sources import TrainDataset, open_sources
from megallama.data.writer import IndexedWriter
from megallama.train.progress import Spikes
from tests.pool import Pool
from tests.small import small_config
from tests.train.runs import curve, records, state_files
from tests.train.test_metrics import scalars

RUN = "tests.train.runs:run"


def sections(parallel: dict[str, Any] | None = None, dtype: str = "bf16", **train: Any) -> dict[str, dict[str, Any]]:
    return {
        "parallel": parallel or {},
        "precision": {"dtype": dtype, "initial_loss_scale": 256.0},
        "train": {"steps": 6, **train},
        "optimizer": {"lr": 1e-3},
        "log": {"tensorboard": False, "plot": False},
    }


def log_of(folder: Path, rank: int = 0) -> str:
    return (folder / "logs" / f"rank-{rank:04d}.log").read_text()


@pytest.mark.parametrize(("ranks", "wrong", "dtype"), [(2, 1, "bf16"), (4, 0, "fp16")])
def test_a_bit_that_stays_wrong_ends_the_run_and_names_the_rank(
    pool: Pool, tmp_path: Path, ranks: int, wrong: int, dtype: str
) -> None:
    settings = sections({}, dtype, check_replicas=2) | {"checkpoint": {"interval": 1, "async_save": False}}
    answers = pool.run(ranks, RUN, str(tmp_path / "run"), settings, f"stuck:2:{wrong}")
    assert {a["status"] for a in answers} == {5} and answers == answers[:1] * ranks
    error = answers[0]["error"]
    assert error.startswith("step 4: weights have other bits than their masters or copies: model.layers.1.self_attn.o_")
    assert f"o_proj.weight on rank {wrong} (" in error and error.count(" on rank ") == 1
    assert "same command goes on from the newest checkpoint" in error
    saved = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved[-1] == "step-00000003", "nothing is saved of the step in which it was found"
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("ranks", "parallel", "dtype"),
    [(2, {}, "bf16"), (2, {"tp": 2}, "fp16"), (2, {"pp": 2}, "fp32"), (1, {}, "fp64")],
)
def test_looking_changes_no_bit(pool: Pool, tmp_path: Path, ranks: int, parallel: dict[str, int], dtype: str) -> None:
    settings = sections(parallel, dtype) | {"model": {"tie_embeddings": True}}
    for name, interval in (("on", 1), ("off", 0)):
        settings["train"]["check_replicas"] = interval
        answers = pool.run(ranks, RUN, str(tmp_path / name), settings)
        assert [a.get("status") for a in answers] == [0] * ranks, answers
        assert "warning" not in log_of(tmp_path / name).replace("far from what LLaMA", "").split("starting from")[1]
    assert curve(tmp_path / "on") == curve(tmp_path / "off")
    assert state_files(tmp_path / "on") == state_files(tmp_path / "off")


@pytest.mark.parametrize(("ranks", "parallel", "wrong"), [(2, {}, 0), (4, {}, 2), (4, {"pp": 2}, 3)])
def test_a_gradient_wrong_by_much_is_named(
    pool: Pool, tmp_path: Path, ranks: int, parallel: dict[str, int], wrong: int
) -> None:
    pool.run(ranks, RUN, str(tmp_path), sections(parallel, "fp32"), f"scale:4:{wrong}:100")
    lines = [line for line in log_of(tmp_path).splitlines() if "before the reduction" in line]
    named = {int(line.partition("the gradient of rank ")[2].partition(" ")[0]) for line in lines}
    assert wrong in named and all("step 5: " in line for line in lines)
    assert named == ({wrong} if not parallel else {1, 3}), "of a pipeline the stages before get the wrong gradient too"
    norm, typical = map(float, re.findall(r"(?:norm|weights) ([\d.]+)", lines[0]))
    assert 60 * typical < norm < 150 * typical, "of this step alone"


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """300 windows of 16 tokens of the ids 0 to 60, in documents of 7 tokens."""
    count = 300 * 16 + 5
    with IndexedWriter(tmp_path / "text", np.dtype(np.uint16)) as writer:
        ids = np.random.default_rng(0).integers(0, 61, count)
        writer.add(ids, np.array([7] * (count // 7) + [count % 7]))
    return str(tmp_path / "text")


def on_corpus(corpus: str, **train: Any) -> dict[str, dict[str, Any]]:
    settings = sections({}, "fp32", **{"steps": 26, **train})
    return settings | {"data": {"synthetic": False, "train": [{"path": corpus}]}, "log": {"interval": 4, "plot": False}}


def test_a_spike_is_said_with_its_documents(pool: Pool, tmp_path: Path, corpus: str) -> None:
    run, settings = tmp_path / "run", on_corpus(corpus)
    answers = pool.run(2, RUN, str(run), settings, "scale:23:1:1000")
    assert [a["updates"] for a in answers] == [26] * 2
    lines = [line[20:] for line in log_of(run).splitlines() if "step 24" in line]
    (said,) = [line for line in lines if "stands out" in line]
    value, typical = float(said.split()[4]), float(said.split()[-1])
    assert said.startswith("warning: step 24: grad_norm ") and value > 100 * typical > 0
    assert value == pytest.approx(curve(run)[5][2], rel=1e-3), "it is the norm that metrics.jsonl has"
    config = small_config(**settings)
    for rank, count in ((0, 8), (1, 4)):
        begin = "step 24 begins with the samples " if rank == 0 else "step 24 has on this rank the samples "
        text = next(line for line in log_of(run, rank).splitlines() if begin in line).partition(begin)[2]
        told = {int(part.split(" (")[0]): part.split(" (text ")[1].rstrip(")") for part in text.split("), ")}
        assert set(told) < set(range(23 * 8, 24 * 8)) or len(told) == 8 == count
        for sample in explain(open_sources(config).train, None, list(told)):  # type: ignore[arg-type]
            documents = [piece.document for piece in sample.pieces]
            assert told[sample.sample] == f"{documents[0]}-{documents[-1]}"


def test_a_step_between_two_lines_has_its_numbers_in_the_log(pool: Pool, tmp_path: Path, corpus: str) -> None:
    pool.run(1, RUN, str(tmp_path / "a"), on_corpus(corpus, steps=6))
    settings = on_corpus(corpus, steps=6)
    settings["log"]["interval"] = 1
    pool.run(1, RUN, str(tmp_path / "b"), settings)
    for step, loss, norm, _ in curve(tmp_path / "b"):
        assert (f"step {step}: loss {loss!r}, grad norm {norm!r}" in log_of(tmp_path / "a")) == (step not in (4, 6))
        assert ": loss " not in log_of(tmp_path / "b")


def test_a_skipped_spike_changes_nothing_and_the_statistics_go_on(pool: Pool, tmp_path: Path, corpus: str) -> None:
    settings = on_corpus(corpus, on_spike="skip") | {"checkpoint": {"interval": 1, "keep_last": 30}}
    settings["log"]["interval"], settings["precision"] = 1, {"dtype": "fp16", "initial_loss_scale": 16.0}
    answers = pool.run(2, RUN, str(tmp_path), settings, "scale:22,24:1:200")
    assert answers == [{"status": 0, "step": 26, "updates": 24}] * 2
    skipped = [r for r in records(tmp_path) if r["skipped"]]
    assert {r["loss_scale"] for r in records(tmp_path)} == {16.0}, "it is no overflow"
    assert [(r["step"], r["skipped_steps"]) for r in skipped] == [(23, 1), (25, 2)] and skipped[0]["loss"] > 0
    log = (tmp_path / "run.log").read_text()
    assert "step 23/26 | SKIPPED, a spike (1 so far)" in log and log.count("its update is left out") == 2
    steps = [tmp_path / "checkpoints" / f"step-{step:08d}" for step in (22, 23)]
    before, after = ({p.name: p.read_bytes() for p in sorted(step.rglob("*.safetensors"))} for step in steps)
    assert before == after
    counters = json.loads((tmp_path / "checkpoints" / "step-00000026" / "manifest.json").read_text())["counters"]
    assert len(counters["spikes"]["grad_norm"]) == 24 and counters["bad_steps"]["last_good"] == 26


def test_resuming_with_skip_changes_no_bit(pool: Pool, tmp_path: Path, corpus: str) -> None:
    """What is skipped depends on the steps before: they are in the checkpoint."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    pool.run(1, RUN, str(straight), on_corpus(corpus, on_spike="skip"), "scale:24:0:1000")
    pool.run(1, RUN, str(stopped), on_corpus(corpus, on_spike="skip", stop_after_steps=23))
    answers = pool.run(1, RUN, str(stopped), on_corpus(corpus, on_spike="skip"), "scale:24:0:1000")
    assert answers == [{"status": 0, "step": 26, "updates": 25}]
    assert state_files(straight) == state_files(stopped)


def rollback(corpus: str, **train: Any) -> dict[str, dict[str, Any]]:
    settings = on_corpus(corpus, on_spike="rollback", max_rollbacks=1, **train)
    return settings | {"checkpoint": {"interval": 5, "keep_last": 9}, "log": {"plot": False}}


def test_a_run_goes_back_once_and_leaves_the_data_out(pool: Pool, tmp_path: Path, corpus: str) -> None:
    run, stopped, settings = tmp_path / "run", tmp_path / "stopped", rollback(corpus, rollback_skip_steps=1)
    answers = pool.run(2, RUN, str(run), settings, "scale:23:1:1000")  # again when it comes to this step again
    assert answers == [{"status": 0, "step": 26, "updates": 26}] * 2
    log = (run / "run.log").read_text()
    undone = (
        "warning: step 24 is undone (rollback 1 of at most 1): the run goes on after step 20; samples 160 to 199 are"
    )
    assert log.count(undone) == 1 and log.count(" is undone") == 1 and log.count("step 24: grad_norm ") == 2
    steps = records(run)
    assert [r["step"] for r in steps] == [*range(1, 27)], "one curve"
    assert [r["consumed_samples"] for r in steps[18:22]] == [152, 160, 208, 216]
    assert [step for step, _ in scalars(run / "tensorboard")["train/loss"]] == [*range(1, 27)]
    counters = json.loads((run / "checkpoints" / "step-00000026" / "manifest.json").read_text())["counters"]
    assert (counters["rollbacks"], counters["left_out"], counters["samples"]) == (1, {"20": 40}, 248)
    assert counters["sources"][0]["samples"] == 248
    pool.run(
        2, RUN, str(stopped), settings | {"train": {**settings["train"], "stop_after_steps": 25}}, "scale:23:1:1000"
    )
    assert pool.run(2, RUN, str(stopped), settings) == answers
    assert state_files(stopped) == state_files(run)
    shown = numbers_of(small_config(**settings), 22, None, None, None, counters)
    before = numbers_of(small_config(**settings), 20, None, None, None, {"left_out": {"20": 40}})
    assert (shown, before[0]) == ([*range(208, 216)], 152)
    assert ledger_of(small_config(**settings, run={"folder": str(run)})) == counters


def test_later_weights_begin_with_the_step_that_they_are_for(corpus: str) -> None:
    other = [{"path": corpus, "name": name, "weight": weight} for name, weight in (("a", 0.75), ("b", 0.25))]
    changes = [{"step": 5, "weights": {"b": 0.75}}, {"step": 23, "weights": {"a": 0.0}}]
    data = {"synthetic": False, "train": other, "mixture_schedule": changes}
    train = open_sources(small_config(data=data)).train
    assert isinstance(train, TrainDataset)
    assert [(phase.step, phase.sample) for phase in train.mixture.phases] == [(1, 0), (5, 32), (23, 176)]
    train.resume(train.state(160), 20, 160, 200)  # 40 samples are left out after step 20
    assert [(phase.step, phase.sample) for phase in train.mixture.phases] == [(1, 0), (5, 32), (23, 216)]
    again = open_sources(small_config(data=data)).train
    assert isinstance(again, TrainDataset)
    again.resume(train.state(232), 24, 232)  # a checkpoint after step 24, behind both
    assert again.mixture.phases == train.mixture.phases and again.consumption(232) == train.consumption(232)


def test_without_a_checkpoint_nobody_goes_back(pool: Pool, tmp_path: Path, corpus: str) -> None:
    settings = rollback(corpus) | {"checkpoint": {"interval": 0}}
    assert pool.run(1, RUN, str(tmp_path), settings, "scale:23:0:1000") == [{"status": 0, "step": 26, "updates": 26}]
    log = (tmp_path / "run.log").read_text()
    assert "step 24: grad_norm " in log and "is undone" not in log and "left out" not in log


def test_noise_is_no_spike_and_a_new_level_is_one_for_a_while() -> None:
    generator, spikes = random.Random(1), Spikes({})

    def step(loss: float, norm: float) -> dict[str, float]:
        values = {"loss": loss, "grad_norm": norm}
        found = spikes.found(values)
        spikes.seen(values, found)
        return found

    for number in range(3000):  # a loss that falls, a norm whose logarithm is normal
        assert step(2 + 9 * 0.995**number + generator.gauss(0, 0.05), generator.lognormvariate(0, 0.3)) == {}
    (typical,) = step(2.0, 50.0).values()
    assert 0.8 < typical < 1.25
    assert step(4.0, 1.0).keys() == {"loss"} and step(4.0, 50.0).keys() == {"loss", "grad_norm"}
    assert len(spikes.windows["loss"]) == 200, "spikes are no part of what is typical"
    found = [bool(step(2.0, 50.0)) for _ in range(40)]
    assert found == [True] * 7 + [False] * 33, "with the three before them ten in a row"
    assert not Spikes({}).found({"loss": 1e9, "grad_norm": 1e9}), "nothing is typical yet"
