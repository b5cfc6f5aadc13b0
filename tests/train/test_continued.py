"""checkpoint.continue_from: nothing changed is the run that never stopped, to the bit; what changed begins anew."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megallama.cli import command
from megallama.config.load import load
from megallama.data.mixture import Phase
from megallama.data.sources import TrainDataset, open_sources
from megallama.data.writer import IndexedWriter
from megallama.pretrain import main
from tests.faults.test_bad_input import GOOD
from tests.pool import Pool
from tests.small import small_config
from tests.train.runs import curve, records, state_files

RUN = "tests.train.runs:run"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "pp2 chunks2 dp2": (4, {"pp": 2, "chunks": 2}),
}


ALL = (
    "weights, moments and Adam's count of updates, place in the learning-rate schedule, place in data source web, "
    "place in data source code"
)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Two corpora of 61 token ids, of 641 and 321 tokens: a run of 8 steps reads more than an epoch of one."""
    generator, made = np.random.default_rng(0), {}
    for name, count in (("web", 641), ("code", 321)):
        with IndexedWriter(tmp_path / name, np.dtype(np.uint16)) as writer:
            writer.add(generator.integers(0, 61, count), np.array([7] * (count // 7) + [count % 7]))
        made[name] = str(tmp_path / name)
    return made


def sections(files: dict[str, str], **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    mixed = [{"path": files["web"], "weight": 0.75}, {"path": files["code"], "weight": 0.25}]
    base: dict[str, dict[str, Any]] = {
        "precision": {"dtype": "bf16"},
        "train": {"steps": 8},
        "lr_schedule": {"kind": "cosine", "warmup_steps": 2},
        "data": {"synthetic": False, "train": mixed, "mixture_schedule": [{"step": 6, "weights": {"code": 0.75}}]},
    }
    return {name: {**base.get(name, {}), **changes.get(name, {})} for name in {*base, *changes}}


def step(run: Path, number: int) -> str:
    return str(run / "checkpoints" / f"step-{number:08d}")


def counters(run: Path, number: int) -> dict[str, Any]:
    return json.loads((Path(step(run, number)) / "manifest.json").read_text())["counters"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_changed_is_the_run_that_never_stopped(
    pool: Pool, tmp_path: Path, files: dict[str, str], layout: str
) -> None:
    """Weights, moments, losses, samples and counters; through two runs, the second of which is stopped once more."""
    (ranks, parallel), runs = LAYOUTS[layout], [tmp_path / name for name in ("straight", "first", "second")]
    settings = sections(files, parallel=parallel, checkpoint={"interval": 3, "keep_last": 9})
    pool.run(ranks, RUN, str(runs[0]), settings)
    pool.run(ranks, RUN, str(runs[1]), sections(files, parallel=parallel, train={"steps": 8, "stop_after_steps": 3}))
    further = {**settings, "checkpoint": {**settings["checkpoint"], "continue_from": step(runs[1], 3)}}
    stopped = {**further, "train": {"steps": 8, "stop_after_steps": 2}}
    assert [a["step"] for a in pool.run(ranks, RUN, str(runs[2]), stopped)] == [5] * ranks
    assert [a["step"] for a in pool.run(ranks, RUN, str(runs[2]), further)] == [8] * ranks
    assert curve(runs[1]) + curve(runs[2]) == curve(runs[0])
    assert [r["sources"] for r in records(runs[2])] == [r["sources"] for r in records(runs[0])][3:]
    assert state_files(runs[2]) == state_files(runs[0]) and len(state_files(runs[0])) == 4
    assert counters(runs[2], 8) == counters(runs[0], 8)
    log = (runs[2] / "run.log").read_text()
    assert f"going on after step 3 of {step(runs[1], 3)}, 384 tokens read, with its {ALL}\n" in log
    assert "begins anew" not in log and log.count("is not read: the run has checkpoints of its own") == 1


def test_a_longer_context_goes_on_in_tokens(pool: Pool, tmp_path: Path, files: dict[str, str]) -> None:
    """Another sample length, theta and batch; stopped and resumed it has the same bits; all of it is in the files."""
    pool.run(1, RUN, str(tmp_path / "short"), sections(files, train={"steps": 8, "stop_after_steps": 3}))
    used = {s["name"]: s["tokens"] for s in counters(tmp_path / "short", 3)["sources"]}
    assert used == {"web": 18 * 16, "code": 6 * 16}
    long = sections(
        files,
        model={"rope_theta": 50000.0},
        batch={"seq_length": 40, "global_batch_size": 4},
        checkpoint={"continue_from": step(tmp_path / "short", 3)},
    )
    pool.run(2, RUN, str(tmp_path / "straight"), long)
    pool.run(2, RUN, str(tmp_path / "stopped"), {**long, "train": {"steps": 8, "stop_after_steps": 2}})
    pool.run(2, RUN, str(tmp_path / "stopped"), long)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "straight")
    assert state_files(tmp_path / "stopped") == state_files(tmp_path / "straight")
    assert [r["step"] for r in records(tmp_path / "straight")] == [4, 5, 6, 7, 8]
    last = counters(tmp_path / "straight", 8)
    assert last["ledger"] == [
        {"first_token": 0, "seq_length": 16},
        {"first_token": 3 * 8 * 16, "seq_length": 40},
    ]
    assert (last["samples"], last["updates"], last["tokens_read"]) == (24 + 5 * 4, 8, 384 + 20 * 40)
    assert last["mixture"][0] == {
        "step": 4, "sample": 24, "weights": {"web": 0.75, "code": 0.25},
        "starts": {"web": -(-288 // 40), "code": -(-96 // 40)},
    }  # fmt: skip
    now = {s["name"]: s["samples"] for s in last["sources"]}  # of 40: 8 by the first weights, 12 by the others
    assert now == {"web": 8 + 6 + 6, "code": 3 + 2 + 6}
    exported = json.loads((Path(step(tmp_path / "straight", 8)) / "model/config.json").read_text())
    assert (exported["rope_theta"], exported["max_position_embeddings"]) == (50000.0, 40)
    log = (tmp_path / "straight" / "run.log").read_text()
    assert f"384 tokens read, with its {ALL}\n" in log and "begins anew" not in log
    assert "since then: model.rope_theta was 10000.0 and is 50000.0" in log
    assert "what loss is usual is learnt anew" in log
    rates = [rate for *_, rate in curve(tmp_path / "short")] + [rate for *_, rate in curve(tmp_path / "straight")]
    pool.run(1, RUN, str(tmp_path / "never"), sections(files))
    assert rates == [rate for *_, rate in curve(tmp_path / "never")]  # the schedule goes on


def test_what_has_other_settings_begins_anew_and_the_log_says_why(
    pool: Pool, tmp_path: Path, files: dict[str, str]
) -> None:
    pool.run(1, RUN, str(tmp_path / "first"), sections(files, train={"steps": 8, "stop_after_steps": 3}))
    here = {"continue_from": step(tmp_path / "first", 3)}

    def log_of(name: str, **changes: Any) -> str:
        settings = sections(files, **{"train": {"steps": 8, "stop_after_steps": 3}, "checkpoint": here, **changes})
        pool.run(1, RUN, str(tmp_path / name), settings)
        return (tmp_path / name / "run.log").read_text()

    log = log_of("moments", optimizer={"beta2": 0.9})
    assert "moments and Adam's count of updates begins anew: optimizer.beta2 changed" in log
    assert counters(tmp_path / "moments", 6)["updates"] == 3
    assert f"with its {ALL}\n".replace(" moments and Adam's count of updates,", "") in log
    log = log_of("schedule", lr_schedule={"kind": "wsd", "warmup_steps": 2})
    assert "place in the learning-rate schedule begins anew: lr_schedule.kind changed" in log
    assert counters(tmp_path / "schedule", 6)["schedule_begun"] == 3
    assert [rate for *_, rate in curve(tmp_path / "schedule")] == pytest.approx([5e-4, 1e-3, 1e-3])
    settings = sections(files, checkpoint=here, lr_schedule={"kind": "wsd", "warmup_steps": 2})
    pool.run(1, RUN, str(tmp_path / "schedule"), settings)  # it ends with the run all the same
    assert [rate for *_, rate in curve(tmp_path / "schedule")][-2:] == pytest.approx([1e-3, 1e-4])
    asked = {"checkpoint": {**here, "continue_reset": ["schedule", "data", "moments"]}}
    log = log_of("asked", **asked)
    for what in ALL.split(", ")[1:]:
        assert f"{what} begins anew: checkpoint.continue_reset says so" in log
    assert log.count("with its weights\n") == 1
    web = {"path": files["web"], "weight": 0.75, "documents": (0.0, 0.9)}
    other = {"synthetic": False, "train": [web, {"path": files["code"], "name": "new"}, {"path": files["code"]}]}
    log = log_of("data", data=other)
    assert "data source web begins anew: its files, or which of their documents are read, are others" in log
    assert "data source new begins anew: the other run did not read it" in log and "place in data source code\n" in log


@pytest.mark.parametrize("length", [16, 8, 40, 160])
def test_places_in_the_data_are_counted_in_tokens(tmp_path: Path, files: dict[str, str], length: int) -> None:
    def opened(length: int) -> TrainDataset:
        found = open_sources(small_config(**sections(files, batch={"seq_length": length}))).train
        assert isinstance(found, TrainDataset)
        return found

    before, after = opened(16), opened(length)
    saved = before.state(24)
    used = {name: took["tokens"] for name, took in before.consumption(24).items()}
    assert after.take_over(saved, 3, 24) == {}
    for name, took in after.consumption(24).items():
        assert used[name] <= took["tokens"] < used[name] + length
    places = [(source.name, index) for source, index, _ in after.places(range(24, 64))]
    for name in ("web", "code"):  # one after the other from there on
        own = [index for found, index in places if found == name]
        assert own[0] == -(-used[name] // length) and all(b == a + 1 for a, b in pairwise(own))
    again = opened(length)
    again.resume(after.state(40), 5, 40)
    assert [*again.places(range(40, 64))] != [] and again.mixture.phases == after.mixture.phases
    assert np.array_equal(again.read(range(40, 64)).tokens, after.read(range(40, 64)).tokens)
    if length == 16:
        assert after.mixture.phases == before.mixture.phases
        assert np.array_equal(after.read(range(24, 64)).tokens, before.read(range(24, 64)).tokens)
    else:
        assert after.mixture.phases[0] == Phase(4, 24, {"web": 0.75, "code": 0.25}, after.mixture.phases[0].starts)
        assert after.mixture.phases[1].step == 6 and after.mixture.phases[1].sample == 24 + 2 * 8


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*GOOD, "run.supervisor=false", "log.tensorboard=false", *words]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_gone_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = f"run.folder={tmp_path / 'a'}", f"run.folder={tmp_path / 'b'}"
    assert main([*GOOD, "run.supervisor=false", "log.tensorboard=false", first]) == 0
    capsys.readouterr()
    here = f"checkpoint.continue_from={step(tmp_path / 'a', 2)}"
    shutil.copytree(Path(step(tmp_path / "a", 2)) / "model", tmp_path / "exported")
    text = refused(capsys, second, f"checkpoint.continue_from={tmp_path / 'exported'}")
    assert "exported is no step-N folder of a run; weights alone are taken with checkpoint.weights_from" in text
    text = refused(capsys, second, here, "model.ffn_hidden_size=64", "model.rope_theta=2e4")
    assert "model.ffn_hidden_size: checkpoint 48, now 64" in text and "rope_theta" not in text
    assert "or choose another checkpoint.continue_from" in text and not (tmp_path / "b").exists()
    text = refused(capsys, second, here, here.replace("continue", "weights"))
    assert "checkpoint.weights_from and checkpoint.continue_from are two beginnings of one run; leave one out" in text
    text = refused(capsys, second, here, "checkpoint.resume=must")
    assert 'step-00000002" begins a run, but checkpoint.resume="must" wants to go on' in text
    text = refused(capsys, second, 'checkpoint.continue_reset=["data"]')
    assert 'checkpoint.continue_reset=["data"] begins nothing anew without checkpoint.continue_from=STEP' in text
    text = refused(capsys, second, here, 'checkpoint.continue_reset=["weights"]')
    assert 'checkpoint.continue_reset=["weights"] must be a list of' in text
    broken = next((Path(step(tmp_path / "a", 2)) / "optimizer").glob("exp_avg-*"))
    broken.write_bytes(broken.read_bytes()[:-1] + b"\xff")
    assert f"{broken} is damaged in block" in refused(capsys, second, here)
    assert broken.exists() and not [*(tmp_path / "b").glob("checkpoints/step-*")]  # the other run's is left alone


def test_a_length_in_tokens_counts_those_of_the_other_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps of 4 x 16 tokens, then 3 of 2 x 48 until 400; a start that was stopped ends at the same step."""
    quiet = [*GOOD, "run.supervisor=false", "log.tensorboard=false"]
    assert main([*quiet, f"run.folder={tmp_path / 'a'}"]) == 0
    here = [*quiet, f"run.folder={tmp_path / 'b'}", f"checkpoint.continue_from={tmp_path / 'a'}"]
    here = [word for word in here if not word.startswith("train.steps")]
    here += ["batch.seq_length=48", "batch.global_batch_size=2", "train.tokens=400"]
    assert main([*here, "train.stop_after_steps=1"]) == 75
    assert main(here) == 0
    assert [r["step"] for r in records(tmp_path / "b")] == [3, 4, 5]
    assert counters(tmp_path / "b", 5)["samples"] == 8 + 6 and main(here) == 0
    config = load(None, [word for word in here if "supervisor" not in word])
    assert config.train.steps == 5  # of 96 tokens, where nothing is known to be read


def test_explain_knows_where_a_run_goes_on(
    tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What `megallama explain` says of step 4, the second of two of another length, is what the run read."""
    quiet = [word for word in GOOD if not word.startswith(("data.synthetic", "train.steps"))]
    quiet += ["run.supervisor=false", "log.tensorboard=false", f"data.train={files['web']}"]
    assert main([*quiet, "train.steps=2", f"run.folder={tmp_path / 'a'}"]) == 0
    here = [*quiet, "train.steps=4", f"run.folder={tmp_path / 'b'}", "batch.seq_length=40", "batch.micro_batch_size=1"]
    here += ["batch.global_batch_size=2", f"checkpoint.continue_from={tmp_path / 'a'}"]
    (tmp_path / "b.toml").write_text("")
    words = [str(tmp_path / "b.toml"), "4", *here[:-1], here[-1], "--json"]
    words = [word for word in words if not word.startswith("run.supervisor")]
    assert command("explain")(words) == 2 and "the run has no checkpoint yet" in capsys.readouterr().err
    assert main(here) == 0
    capsys.readouterr()
    assert command("explain")(words) == 0
    found = json.loads(capsys.readouterr().out)["samples"]
    assert [(sample["sample"], sample["index"]) for sample in found] == [(10, -(-8 * 16 // 40) + 2), (11, 7)]
    assert [sum(piece["length"] for piece in sample["pieces"]) for sample in found] == [41, 41]
    assert command("explain")([words[0], "2", *words[2:]]) == 2
    assert "step 2 does not exist; steps count from 3, as in the log" in capsys.readouterr().err
