"""Tasks while a model trains: the numbers of its checkpoints, no other bit, bounds, stops, what is refused before."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megallama import pretrain
from megallama.evaluation.evaluate import evaluate
from megallama.evaluation.harness import Request
from tests.evaluation.test_evaluate import ITEMS, named_byte_tokenizer
from tests.pool import Pool
from tests.train.runs import curve, state_files
from tests.train.test_metrics import scalars

RUN = "tests.evaluation.in_training:run"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "pp2 zb-v": (2, {"pp": 2, "chunks": 2, "schedule": "zb-v"}),
    "dp2": (2, {}),
    "cp2 gather": (2, {"cp": 2, "cp_exchange": "gather"}),
    "cp2 heads tp2": (4, {"cp": 2, "tp": 2, "cp_exchange": "heads"}),
}
STEPS = [2, 4, 5]  # after which `sections` evaluates


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes, and a file of 24 items."""
    path = tmp_path_factory.mktemp("given")
    named_byte_tokenizer(path)
    lines = [json.dumps({**item, "context": f"{item['context']}{n or ''}"}) for n in range(8) for item in ITEMS]
    (path / "own.jsonl").write_text("\n".join(lines) + "\n")
    return path


def sections(given: Path, parallel: dict[str, Any], **evaluation: Any) -> dict[str, dict[str, Any]]:
    tasks = {"tasks": [str(given / "own.jsonl")], "tasks_interval": 2, **evaluation}
    return {
        "parallel": parallel,
        "data": {"synthetic": True, "tokenizer": str(given / "tokenizer.json")},
        "train": {"steps": 5},
        "checkpoint": {"interval": 2, "keep_last": 9},
        "eval": tasks,
    }


def records(folder: Path) -> list[dict[str, Any]]:
    """Of evaluations on tasks."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "task"]


def numbers(folder: Path) -> list[tuple[int, dict[str, float]]]:
    return [(record["step"], record["metrics"]) for record in records(folder)]


@pytest.fixture(scope="module")
def straight(pool: Pool, given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank in one go."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    (answer,) = pool.run(1, RUN, str(folder), sections(given, {}) | {"log": {"tensorboard": True}})
    assert (answer["status"], answer["step"]) == (0, 5), answer
    return folder


def test_the_numbers_are_those_of_the_checkpoint(straight: Path, given: Path) -> None:
    """And they are in the log, in TensorBoard and in the picture."""
    assert [step for step, _ in numbers(straight)] == STEPS
    for record in records(straight):
        step = straight / "checkpoints" / f"step-{record['step']:08d}"
        found = evaluate(Request(step, items=(given / "own.jsonl",)), lambda text: None, lambda text: None)
        want = {name: found["results"]["own"][f"{name},none"] for name in record["metrics"]}
        assert list(want) == ["acc", "acc_norm", "bits_per_byte"]
        assert record["metrics"] == pytest.approx(want, rel=1e-12)
        assert record["items"] == 24 and record["seconds"] > 0
    bits = [(step, pytest.approx(metrics["bits_per_byte"])) for step, metrics in numbers(straight)]
    assert len({value.expected for _, value in bits}) == 3
    assert scalars(straight / "tensorboard")["task/own/bits_per_byte"] == bits
    assert (straight / "loss.png").exists()
    last = numbers(straight)[-1][1]
    log = (straight / "run.log").read_text()
    assert f"step 5/5 | own | acc {last['acc']:.4f} | acc_norm {last['acc_norm']:.4f} | bits_per_byte" in log


@pytest.mark.parametrize("layout", [*LAYOUTS][1:])
def test_every_layout_gives_them_and_no_bit_of_the_training_changes(
    pool: Pool, tmp_path: Path, given: Path, straight: Path, layout: str
) -> None:
    ranks, parallel = LAYOUTS[layout]
    settings = sections(given, parallel)
    assert {a["status"] for a in pool.run(ranks, RUN, str(tmp_path / "with"), settings)} == {0}
    for (step, own), (want_step, want) in zip(numbers(tmp_path / "with"), numbers(straight), strict=True):
        assert step == want_step and own == pytest.approx(want, rel=1e-10)
    if layout != "tp2 pp2":
        return
    del settings["eval"]
    assert {a["status"] for a in pool.run(ranks, RUN, str(tmp_path / "without"), settings)} == {0}
    assert curve(tmp_path / "with") == curve(tmp_path / "without")
    assert state_files(tmp_path / "with") == state_files(tmp_path / "without")


def test_a_request_to_stop_ends_it_and_the_next_start_makes_it(
    pool: Pool, tmp_path: Path, given: Path, straight: Path
) -> None:
    """The first start is stopped at step 2, the next after the last step, where a third has nothing else to make."""
    settings = sections(given, {"pp": 2})
    for step, made, windows in ((2, [], 2), (5, STEPS[:2], 8)):
        answers = pool.run(2, RUN, str(tmp_path), settings, f"signal:{windows}")
        assert [(a["status"], a["step"]) for a in answers] == [(75, step)] * 2
        assert answers[0]["windows"] == windows, "not one more"
        assert "evaluation on own ended before its end: the next start makes it again" in answers[0]["said"]
        assert (tmp_path / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()
        assert [s for s, _ in numbers(tmp_path)] == made
    third = pool.run(2, RUN, str(tmp_path), settings, "signal:2")
    assert [(a["status"], a["step"], a["windows"]) for a in third] == [(75, 5, 2)] * 2
    assert [(a["status"], a["step"]) for a in pool.run(2, RUN, str(tmp_path), settings)] == [(0, 5)] * 2
    for (step, own), (want_step, want) in zip(numbers(tmp_path), numbers(straight), strict=True):
        assert step == want_step and own == pytest.approx(want, rel=1e-10)
    assert [a["windows"] for a in pool.run(2, RUN, str(tmp_path), settings)] == [0, 0]


def test_phases_do_not_change_when_they_are_made(pool: Pool, tmp_path: Path, given: Path) -> None:
    """The first phase ends after step 2, where one is due and is stopped; the next start makes it, and goes on."""
    settings, runs = sections(given, {"tp": 2}), [tmp_path / name for name in ("straight", "stopped")]
    phases = [{"until_tokens": 256}, {"until_tokens": 1024, "seq_length": 32, "rope_theta": 100.0}]  # 2 and 3 steps
    settings["train"] = {"phases": phases}
    settings["checkpoint"] = {"interval": 0, "keep_last": 9}
    assert {a["status"] for a in pool.run(2, RUN, str(runs[0]), settings)} == {0}
    answers = pool.run(2, RUN, str(runs[1]), settings, "signal:2")
    assert [(a["status"], a["step"]) for a in answers] == [(75, 2)] * 2 and numbers(runs[1]) == []
    assert [(a["status"], a["step"]) for a in pool.run(2, RUN, str(runs[1]), settings)] == [(0, 5)] * 2
    assert [step for step, _ in numbers(runs[0])] == STEPS and numbers(runs[1]) == numbers(runs[0])
    assert curve(runs[1]) == curve(runs[0]) and state_files(runs[1]) == state_files(runs[0])


def test_what_a_later_phase_cannot_score_is_known_at_the_start(pool: Pool, tmp_path: Path, given: Path) -> None:
    (given / "long.jsonl").write_text(json.dumps({"context": "a", "choices": ["b" * 12, "c"], "gold": 1}))
    settings = sections(given, {}, tasks=[str(given / "long.jsonl")])
    settings["train"] = {"phases": [{"until_tokens": 256}, {"until_tokens": 512, "seq_length": 8}]}
    (answer,) = pool.run(1, RUN, str(tmp_path / "run"), settings)
    assert "long: a continuation has 12 tokens, and the context 8: it does not fit" in answer["error"]
    assert not (tmp_path / "run").exists()


def test_what_takes_too_long_on_any_rank_is_left_out_and_it_is_said(pool: Pool, tmp_path: Path, given: Path) -> None:
    settings = sections(given, {}, max_seconds=0.7)
    settings["eval"]["tasks"] += [str(given / "more" / "own2.jsonl")]
    (given / "more").mkdir()
    (given / "more" / "own2.jsonl").write_text((given / "own.jsonl").read_text())
    answers = pool.run(2, RUN, str(tmp_path), settings, "slow:1")
    assert [a["status"] for a in answers] == [0, 0]
    made = [(r["step"], r["name"], r["items"]) for r in records(tmp_path)]
    assert made == [(2, "own", 0), (2, "own2", 0), *((s, n, 24) for s in (4, 5) for n in ("own", "own2"))]
    left = "step 2/5 | own | left out, eval.max_seconds are over; use more, or a smaller eval.limit | 0 items"
    assert any(line.startswith(left) for line in answers[0]["said"])
    assert records(tmp_path)[1]["seconds"] < 0.7 < records(tmp_path)[0]["seconds"]


def test_files_that_differ_between_ranks_are_refused(pool: Pool, tmp_path: Path, given: Path) -> None:
    answers = pool.run(2, RUN, str(tmp_path / "run"), sections(given, {}), "other items")
    said = "eval.tasks: rank 1 on localhost has other items than rank 0; copy its files and packages there"
    assert [a["error"] for a in answers] == [said] * 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ("no.jsonl", "no.jsonl does not exist; name files that are there"),
        ("bad.jsonl", "bad.jsonl:1 is not an item; write lines like"),
        ("long.jsonl", "long: a continuation has 40 tokens, and the context 16: it does not fit"),
        ("piqa", "pip install 'megallama[eval]', or give --items, in training files *.jsonl"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_changed(
    given: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch, tasks: str, said: str
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    (tmp_path / "bad.jsonl").write_text("{}")
    (tmp_path / "long.jsonl").write_text(json.dumps({"context": "a", "choices": ["b" * 40, "c"], "gold": 1}))
    name = str(tmp_path / tasks) if tasks.endswith("jsonl") else tasks
    words = ["model.preset=debug", "data.synthetic=true", f"data.tokenizer={given}/tokenizer.json"]
    words += ["batch.seq_length=16", f"run.folder={tmp_path}/run", "run.device=cpu", f'eval.tasks=["{name}"]']
    assert pretrain.main(words) == 2
    assert said in capfd.readouterr().err and not (tmp_path / "run").exists()
