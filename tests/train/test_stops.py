"""Stopping at every moment: save first, evaluate what is missing at the next start, with the curves of one go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megallama.checkpoint import manifest
from megallama.data.writer import IndexedWriter
from tests.pool import Pool
from tests.train.runs import records, state_files

RUN = "tests.train.runs:run"
SETS = (("valid", "x", 2), ("valid", "y", 2), ("valid", "x", 4), ("valid", "y", 4), ("test", "z", 4))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Four steps; two validation sets of two batches after every second one, a test set of two at the end."""
    generator, folder = np.random.default_rng(0), tmp_path_factory.mktemp("held")
    for name in "xyz":
        with IndexedWriter(folder / name, np.dtype(np.uint16)) as writer:
            writer.add(generator.integers(0, 61, 11 * 16 + 1))
    paths = {name: {"path": str(folder / name)} for name in "xyz"}
    return {
        "precision": {"dtype": "fp32"},
        "train": {"steps": 4},
        "eval": {"interval": 2},
        "lr_schedule": {"kind": "cosine", "warmup_steps": 1},
        "data": {"valid": [paths["x"], paths["y"]], "test": [paths["z"]]},
    }


def with_train(settings: dict[str, dict[str, Any]], **train: Any) -> dict[str, dict[str, Any]]:
    return {**settings, "train": {**settings["train"], **train}}


def messages(folder: Path) -> list[tuple[str, str, int, float]]:
    """Kind, name, step and loss of all lines; those of evaluations may come later than in one go."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sorted((r["kind"], r.get("name", ""), r["step"], r["loss"]) for r in lines)


def evaluations(folder: Path) -> list[tuple[str, str, int]]:
    """Kind, name and step of every evaluation, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["kind"], r["name"], r["step"]) for r in lines if r["kind"] != "train"]


@pytest.fixture(scope="module")
def straight(pool: Pool, settings: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one go."""
    folder = tmp_path_factory.mktemp("straight")
    assert [a["status"] for a in pool.run(2, RUN, str(folder), settings)] == [0, 0]
    assert tuple(evaluations(folder)) == SETS
    return folder


def statuses(pool: Pool, folder: Path, settings: dict[str, dict[str, Any]], fault: str | None = None) -> int:
    """The exit status, the same on both ranks."""
    answers = pool.run(2, RUN, str(folder), settings, fault)
    assert answers[0]["status"] == answers[1]["status"], answers
    status: int = answers[0]["status"]
    return status


@pytest.mark.parametrize("kind", ["signal", "late"])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 8, 9, 10])
def test_an_evaluation_ends_between_batches_and_is_made_anew(
    pool: Pool, tmp_path: Path, settings: dict[str, dict[str, Any]], straight: Path, kind: str, batch: int
) -> None:
    """The flag is seen after the batch; complete sets count, and after the very last batch all is done."""
    status = statuses(pool, tmp_path, settings, f"{kind}-in-evaluation:{batch}:1")
    assert status == (0 if batch == 10 else 75)
    step = 2 if batch <= 4 else 4
    assert (tmp_path / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()
    assert tuple(evaluations(tmp_path)) == SETS[: batch // 2]
    assert ("ended after 1 of 2 batches" in (tmp_path / "run.log").read_text()) == (batch % 2 == 1)
    assert statuses(pool, tmp_path, settings) == 0
    assert tuple(evaluations(tmp_path)) == SETS and messages(tmp_path) == messages(straight)
    assert state_files(tmp_path) == state_files(straight)


@pytest.mark.parametrize("steps", [2, 4])
def test_a_stop_saves_and_leaves_and_what_was_due_comes_first(
    pool: Pool, tmp_path: Path, settings: dict[str, dict[str, Any]], straight: Path, steps: int
) -> None:
    assert statuses(pool, tmp_path, with_train(settings, stop_after_steps=steps)) == 75
    assert tuple(evaluations(tmp_path)) == SETS[: 0 if steps == 2 else 2]
    log = (tmp_path / "run.log").read_text()
    assert ("again to make the evaluations that are missing" in log) == (steps == 4)
    missing = steps == 4
    if missing:  # interrupted there once more, and nothing is saved again
        before = (tmp_path / "checkpoints" / "step-00000004" / "manifest.json").read_bytes()
        again = pool.run(2, RUN, str(tmp_path), settings, "signal-in-evaluation:1:0")
        assert [(answer["status"], answer["told"]) for answer in again] == [(75, 4)] * 2  # no step was made
        assert (tmp_path / "checkpoints" / "step-00000004" / "manifest.json").read_bytes() == before
        assert tuple(evaluations(tmp_path)) == SETS[:2]
    for _ in range(2):  # and once is enough
        assert statuses(pool, tmp_path, settings) == 0
        assert tuple(evaluations(tmp_path)) == SETS and messages(tmp_path) == messages(straight)


def test_the_last_step_is_saved_before_it_is_evaluated(straight: Path) -> None:
    log = (straight / "run.log").read_text()
    order = ["step 4/4 | loss", "saved ", "step 4/4 | x loss", "step 4/4 | test z loss", "finished: 4 steps"]
    assert [log.rindex(text) for text in order] == sorted(log.rindex(text) for text in order)


def test_what_is_on_record_is_not_made_again(
    pool: Pool, tmp_path: Path, settings: dict[str, dict[str, Any]], straight: Path
) -> None:
    """The checkpoint of step 2 was saved before the evaluation that followed it: metrics.jsonl knows of it."""
    saving = {**with_train(settings, stop_after_steps=3), "checkpoint": {"interval": 2, "keep_last": 9}}
    assert statuses(pool, tmp_path, saving) == 75
    newest = tmp_path / "checkpoints" / "step-00000003"
    newest.rename(newest.with_name("kept-aside"))
    assert statuses(pool, tmp_path, settings) == 0
    assert "resumed after step 2" in (tmp_path / "run.log").read_text()
    assert tuple(evaluations(tmp_path)) == SETS and messages(tmp_path) == messages(straight)


def test_a_checkpoint_of_an_earlier_version_lacks_no_evaluation(
    pool: Pool, tmp_path: Path, settings: dict[str, dict[str, Any]]
) -> None:
    """It was saved after it; whether the line is there or not."""
    assert statuses(pool, tmp_path, with_train(settings, stop_after_steps=2)) == 75
    file = tmp_path / "checkpoints" / "step-00000002" / "manifest.json"
    body = json.loads(file.read_text())
    assert body["counters"].pop("evaluated") == 1
    del body["digest"]
    file.write_bytes(manifest.render(body))
    assert statuses(pool, tmp_path, settings) == 0
    assert tuple(evaluations(tmp_path)) == SETS[2:]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("step", [0, 3])
def test_a_rank_whose_data_fail_is_known_to_all_between_two_steps(
    pool: Pool, tmp_path: Path, settings: dict[str, dict[str, Any]], straight: Path, step: int, prefetch: int
) -> None:
    settings = {**settings, "data": {**settings["data"], "prefetch": prefetch}}
    answers = pool.run(2, RUN, str(tmp_path), settings, f"read:{step}:1")
    assert answers[0] == answers[1] and answers[0]["type"] == "DataError"
    assert answers[0]["status"] == (4 if step else 2)
    text = answers[0]["error"]
    assert text.startswith(f"rank 1 on localhost: the train loader cannot read step {step}, samples ")
    assert "Input/output error: '/data/text.bin'" in text and "Traceback" not in text
    assert ("step 3 is saved, the same command goes on from there" in text) == (step == 3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000003"][: step // 3]
    assert len(records(tmp_path)) == step
    assert statuses(pool, tmp_path, settings) == 0
    assert messages(tmp_path) == messages(straight) and state_files(tmp_path) == state_files(straight)


def test_held_out_data_that_fail_cost_no_step(
    pool: Pool, tmp_path: Path, settings: dict[str, dict[str, Any]], straight: Path
) -> None:
    answers = pool.run(2, RUN, str(tmp_path), settings, "read-in-evaluation:0:1")
    assert answers[0] == answers[1] and answers[0]["status"] == 4
    assert "rank 1 on localhost: the x loader cannot read" in answers[0]["error"]
    assert "step 2 is saved" in answers[0]["error"]
    assert statuses(pool, tmp_path, settings) == 0
    assert tuple(evaluations(tmp_path)) == SETS and messages(tmp_path) == messages(straight)
