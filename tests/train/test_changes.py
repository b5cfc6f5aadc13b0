"""What a resume says of what changed since the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.pretrain import main
from megallama.train.setup import changes
from tests.faults.test_bad_input import GOOD
from tests.pool import Pool
from tests.small import small_config
from tests.train.runs import curve
from tests.train.test_loop import RUN, sections

QUIET = [*GOOD, "log.tensorboard=false", "lr_schedule.kind=cosine"]


def messages(saved: dict, **now: dict) -> list[str]:
    """Of a checkpoint after 6 steps of 8 samples."""
    return list(changes(small_config(**saved).model_dump(mode="json"), small_config(**now), 6, 48))


def test_nothing_changed() -> None:
    assert messages({}) == []


def test_more_steps_make_another_curve() -> None:
    cosine = {"lr_schedule": {"kind": "cosine", "warmup_steps": 1}}
    lines = messages({**cosine, "train": {"steps": 6}}, **cosine, train={"steps": 20})
    assert lines[:3] == [
        "lr_schedule.decay_steps was 6 and is 20",
        "lr_schedule.wsd_decay_steps was 1 and is 2",
        "train.steps was 6 and is 20",
    ]
    assert lines[3].startswith("the learning-rate curve is another one: step 7 has 0.000")
    assert lines[3].endswith("instead of 0.0001; write lr_schedule.decay_steps=6 to keep its end where it was")


def test_a_curve_that_changes_only_in_words_is_not_another_one() -> None:
    lines = messages({"lr_schedule": {"min_ratio": 0.1}}, lr_schedule={"min_ratio": 0.2})  # constant: it has no minimum
    assert lines == ["lr_schedule.min_ratio was 0.1 and is 0.2"]


def test_names_of_earlier_versions_are_no_change() -> None:
    source = {"path": "a", "max_epochs": 2.0}
    now = {"data": {"train": [source], "on_exhausted": "stop"}, "lr_schedule": {"kind": "wsd", "wsd_decay_steps": 0}}
    saved = small_config(**now).model_dump(mode="json")
    data = saved["data"]
    data |= {"at_max_epochs": data.pop("on_exhausted"), "changes": data.pop("mixture_schedule")}
    saved["lr_schedule"] |= {"kind": "linear", "wsd_decay_steps": 1}
    assert list(changes(saved, small_config(**now), 6, 48)) == []
    later = list(changes(saved, small_config(**now, batch={"global_batch_size": 16}), 6, 48))
    assert later[0] == "batch.global_batch_size was 8 and is 16"


def test_batches_seeds_and_formats() -> None:
    lines = messages({}, batch={"global_batch_size": 16}, train={"seed": 8}, precision={"dtype": "fp32"})
    for line in (
        "batch.global_batch_size was 8 and is 16",
        'precision.dtype was "fp64" and is "fp32"',
        "the data come in the same order, but a step takes 16 samples instead of 8",
        "the order of the data from step 7 on is another one, by train.seed",
    ):
        assert line in lines


def test_a_checkpoint_of_an_earlier_version_had_the_defaults() -> None:
    saved = small_config().model_dump(mode="json")
    del saved["checkpoint"]["finish_seconds"], saved["lr_schedule"]
    lines = list(changes(saved, small_config(checkpoint={"finish_seconds": 9.0}), 6, 48))
    assert "checkpoint.finish_seconds was 30.0 and is 9.0" in lines
    assert lines[-1].startswith("an earlier version wrote the checkpoint")


def test_a_run_says_where_it_resumes_and_what_is_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*QUIET, f"run.folder={tmp_path}"]
    assert main([*run, "train.steps=6"]) == 0
    assert "since then" not in capsys.readouterr().out
    assert main([*run, "train.steps=20", "optimizer.lr=1e-3", "data.at_max_epochs=error"]) == 0
    out = capsys.readouterr().out
    old = "command line: data.at_max_epochs is now called data.on_exhausted; it was read as that\n"
    assert out.count(old) == 1 and (tmp_path / "logs" / "rank-0000.log").read_text().count(old) == 1
    assert f"resumed after step 6, 384 tokens, from {tmp_path / 'checkpoints' / 'step-00000006'}" in out
    assert "since then: optimizer.lr was 0.0003 and is 0.001" in out
    assert "since then: the learning-rate curve is another one: step 7 has" in out


def test_sizes_of_a_ramp_that_are_past_bind_nobody(pool: Pool, tmp_path: Path) -> None:
    """A first size of 1 forbids a second rank, but not after it."""
    ramp = {"ramp_start": 1, "ramp_increment": 1, "ramp_samples": 6, "global_batch_size": 4, "micro_batch_size": 1}
    settings = {**sections({}, "fp64"), "batch": ramp}
    pool.run(1, RUN, str(tmp_path / "straight"), settings)
    steps = curve(tmp_path / "straight")
    assert len(steps) == 8
    pool.run(1, RUN, str(tmp_path / "more"), {**settings, "train": {**settings["train"], "stop_after_steps": 3}})
    answers = pool.run(2, RUN, str(tmp_path / "more"), settings)
    assert all("batch.ramp_increment=1 is not a multiple" in a.get("error", "") for a in answers), answers
    pool.run(1, RUN, str(tmp_path / "more"), {**settings, "train": {**settings["train"], "stop_after_steps": 3}})
    assert [a["status"] for a in pool.run(2, RUN, str(tmp_path / "more"), settings)] == [0, 0]
    for own, theirs in zip(curve(tmp_path / "more"), steps, strict=True):
        assert own == pytest.approx(theirs, rel=1e-10)
