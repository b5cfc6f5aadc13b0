"""Whole runs on files: consumption in log, metrics and checkpoint; named held-out sets; caps; what resuming refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megallama.data.writer import IndexedWriter
from megallama.pretrain import main
from tests.pool import Pool
from tests.train.runs import curve, records

RUN = "tests.train.runs:run"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Three corpora of 61 token ids: 40, 20 and 11 windows of 16 tokens in documents of 7."""
    generator, made = np.random.default_rng(0), {}
    for name, sequences in (("web", 40), ("code", 20), ("held", 11)):
        count = sequences * 16 + 5
        with IndexedWriter(tmp_path / name, np.dtype(np.uint16)) as writer:
            writer.add(generator.integers(0, 61, count), np.array([7] * (count // 7) + [count % 7]))
        made[name] = str(tmp_path / name)
    return made


def sections(files: dict[str, str], parallel: dict[str, Any] | None = None, **data: Any) -> dict[str, dict[str, Any]]:
    mixed = [{"path": files["web"], "weight": 0.75}, {"path": files["code"], "weight": 0.25}]
    return {
        "parallel": parallel or {},
        "train": {"steps": 6},
        "eval": {"interval": 3, "batches": 1},
        "data": {"synthetic": False, "train": mixed, **data},
    }


def test_the_ledger_is_logged_saved_and_shown_again(pool: Pool, tmp_path: Path, files: dict[str, str]) -> None:
    run, changes = tmp_path / "run", [{"step": 5, "weights": {"code": 0.75}}]
    settings = sections(files, {"pp": 2}, mixture_schedule=changes)
    settings["train"]["stop_after_steps"] = 4
    answers = pool.run(4, RUN, str(run), settings)
    assert [a.get("status") for a in answers] == [75] * 4, answers
    first = records(run)[0]["sources"]
    assert first == {
        "web": {"samples": 6, "tokens": 96, "epochs": 0.15},
        "code": {"samples": 2, "tokens": 32, "epochs": 0.1},
    }
    counters = json.loads((run / "checkpoints" / "step-00000004" / "manifest.json").read_text())["counters"]
    assert [(s["name"], s["samples"], s["epochs"]) for s in counters["sources"]] == [("web", 24, 0.6), ("code", 8, 0.4)]
    assert counters["mixture"] == [{"step": 1, "sample": 0, "weights": {"web": 0.75, "code": 0.25}}]
    del settings["train"]["stop_after_steps"]
    pool.run(2, RUN, str(run), {**settings, "parallel": {}})  # another layout
    last = records(run)[-1]["sources"]
    assert {name: used["samples"] for name, used in last.items()} == {"web": 24 + 8, "code": 8 + 8}
    log = (run / "run.log").read_text()
    messages = "data source web: 0.6000 epochs, 384 tokens used"
    assert log.count(messages) == 2 and log.index(messages) < log.index("resumed after step 4") < log.rindex(messages)
    pool.run(1, RUN, str(tmp_path / "straight"), {**settings, "parallel": {}})
    for own, theirs in zip(curve(run), curve(tmp_path / "straight"), strict=True):
        assert own == pytest.approx(theirs, rel=1e-10, abs=0)


def test_tensorboard_has_tokens_and_epochs_of_every_source(pool: Pool, tmp_path: Path, files: dict[str, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = sections(files, valid=[{"path": files["held"]}], test=[{"path": files["held"], "name": "last"}])
    pool.run(1, RUN, str(tmp_path / "run"), settings)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["tokens/web"] == [(step, 96.0 * step) for step in range(1, 7)]
    assert found["epochs/code"] == [(step, pytest.approx(0.1 * step)) for step in range(1, 7)]
    assert [step for step, _ in found["valid/held/loss"]] == [3, 6] and [s for s, _ in found["test/last/loss"]] == [6]


def test_held_out_sets_are_evaluated_alone_by_name_and_test_once_in_full(
    pool: Pool, tmp_path: Path, files: dict[str, str]
) -> None:
    """Every set of one document range of one file; the test set has more than eval.batches batches."""
    held = [{"path": files["web"], "documents": (a, b), "name": n} for a, b, n in ((0.8, 0.9, "x"), (0.9, 1.0, "y"))]
    settings = sections(files, valid=held, test=[{"path": files["held"]}])
    settings["data"]["train"][0]["documents"] = (0.0, 0.8)
    results = []
    for ranks, name in ((1, "one"), (2, "two")):
        pool.run(ranks, RUN, str(tmp_path / name), settings)
        lines = records(tmp_path / name, "valid") + records(tmp_path / name, "test")
        results.append([(r["kind"], r["name"], r["step"], r["tokens"], r["loss"]) for r in lines])
    assert [r[:4] for r in results[0]] == [
        ("valid", "x", 3, 3 * 16), ("valid", "y", 3, 3 * 16), ("valid", "x", 6, 3 * 16), ("valid", "y", 6, 3 * 16),
        ("test", "held", 6, 11 * 16),
    ]  # fmt: skip
    assert results[1] == [(*r[:4], pytest.approx(r[4], rel=1e-10)) for r in results[0]]
    assert all(abs(r[4] - math.log(61)) < 0.1 for r in results[0]) and len({r[4] for r in results[0]}) == 5
    log = (tmp_path / "one" / "run.log").read_text()
    assert "step 6/6 | y loss " in log and "step 6/6 | test held loss " in log
    again = pool.run(1, RUN, str(tmp_path / "one"), settings)
    assert again[0]["status"] == 0 and len(records(tmp_path / "one", "test")) == 1


@pytest.mark.parametrize("at", ["error", "stop"])
def test_a_cap_on_epochs(pool: Pool, tmp_path: Path, files: dict[str, str], at: str) -> None:
    settings = sections(files, on_exhausted=at)
    settings["data"]["train"][1]["max_epochs"] = 0.45  # 9 samples, 2 in every step
    answers = pool.run(2, RUN, str(tmp_path / "run"), settings)
    why = 'step 5 would take source "code" to 0.5 epochs, over max_epochs=0.45'
    if at == "error":
        assert all(a["error"].startswith("data: rank 0 on ") and why in a["error"] for a in answers)
        assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
        return
    assert answers == [{"status": 0, "step": 4, "updates": 4}] * 2
    log = (tmp_path / "run" / "run.log").read_text()
    assert f"the data end after step 4 of 6: {why}" in log and "finished: 4 steps" in log
    assert (tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json").exists()
    assert pool.run(1, RUN, str(tmp_path / "run"), settings)[0] == {"status": 0, "step": 4, "updates": 4}


def test_changed_weights_or_files_do_not_resume(pool: Pool, tmp_path: Path, files: dict[str, str]) -> None:
    settings = sections(files)
    settings["train"]["stop_after_steps"] = 2
    pool.run(2, RUN, str(tmp_path / "run"), settings)
    settings["data"]["train"][0]["weight"] = 0.5
    for answer in pool.run(2, RUN, str(tmp_path / "run"), settings):
        assert "write data.mixture_schedule=[{step = 3, weights = {web = 0.5, code = 0.25}}]" in answer["error"]
    settings["data"]["train"][0]["weight"] = 0.75
    tokens = bytearray(Path(files["code"] + ".bin").read_bytes())
    tokens[0] ^= 1
    Path(files["code"] + ".bin").write_bytes(tokens)
    Path(files["code"] + ".sums").unlink()
    for answer in pool.run(2, RUN, str(tmp_path / "run"), settings):
        assert f'data.train source "code": {files["code"]}.bin/.idx is not what this run was' in answer["error"]


@pytest.mark.parametrize("masked", [False, True])
def test_a_file_truncated_during_training_ends_the_run_with_its_name(
    pool: Pool, tmp_path: Path, files: dict[str, str], masked: bool
) -> None:
    settings = sections(files, document_mask=masked)
    (answer,) = pool.run(1, RUN, str(tmp_path / "run"), settings, f"truncate:2:0:{files['web']}.bin")
    assert answer["type"] == "DataError"
    assert answer["error"].startswith(f"{files['web']}.bin ends at byte 20, expected 34 bytes from byte ")


def test_damage_found_during_training_ends_the_run_with_its_name(
    pool: Pool, tmp_path: Path, files: dict[str, str]
) -> None:
    """A block with a flipped bit; a source without checksums says so."""
    Path(files["code"] + ".sums").unlink()
    output = f"{files['code']}.sums: No such file or directory; a flipped bit would not be found"
    for name, checksums in (("asked", True), ("unasked", False)):
        assert pool.run(1, RUN, str(tmp_path / name), sections(files, checksums=checksums))[0]["status"] == 0
        assert (tmp_path / name / "run.log").read_text().count(output) == checksums
    tokens = bytearray(Path(files["web"] + ".bin").read_bytes())
    tokens[len(tokens) // 4 * 2] ^= 1
    Path(files["web"] + ".bin").write_bytes(tokens)
    (answer,) = pool.run(1, RUN, str(tmp_path / "run"), sections(files))
    assert f"{files['web']}.bin: the 65536 bytes from 0 on are not what was written" in answer["error"]


def test_a_wrong_mixture_on_the_command_line(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"data.train={files['web']}", "data.mixture_schedule=[{step=3, weights={wbe=1}}]"]
    assert main(arguments) == 2
    assert 'data.mixture_schedule[0] gives a weight to "wbe", which data.train does not have; did you mean "web"?' in (
        capsys.readouterr().err
    )


def test_a_run_within_documents_counts_and_learns_the_same_in_any_layout(
    pool: Pool, tmp_path: Path, files: dict[str, str]
) -> None:
    """Windows of 16 tokens in documents of 7: the first tokens of documents are not predicted, on no rank."""
    settings = sections(files, document_mask=True, valid=[{"path": files["held"], "name": "held"}])
    pool.run(1, RUN, str(tmp_path / "one"), settings)
    want = curve(tmp_path / "one")
    counted = [r["tokens"] for r in records(tmp_path / "one")]
    assert sum(counted) == 659 and all(8 * (16 - 3) <= count <= 8 * (16 - 2) for count in counted)
    for name, parallel in (("dp", {}), ("tp", {"tp": 2}), ("pp", {"pp": 2, "schedule": "zb-h1"})):
        answers = pool.run(4, RUN, str(tmp_path / name), {**settings, "parallel": parallel})
        assert [a.get("status") for a in answers] == [0] * 4, answers
        assert [r["tokens"] for r in records(tmp_path / name)] == counted
        for own, theirs in zip(curve(tmp_path / name), want, strict=True):
            assert own == pytest.approx(theirs, rel=1e-10, abs=0)
