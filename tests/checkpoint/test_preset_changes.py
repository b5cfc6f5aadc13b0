"""A preset's row may change between versions: a run that goes on keeps what it began with, and says so."""

from __future__ import annotations

import json

import pytest

from megallama.checkpoint import manifest
from megallama.checkpoint.disk import CheckpointError
from megallama.config.load import load
from megallama.config.presets import PRESETS
from megallama.config.schema import Config
from megallama.plan.topology import Topology
from tests.checkpoint.states import MODEL, empty_solo, make_config, make_manager, make_state, on_grid, solo_shards
from tests.pool import Pool
from tests.train.runs import curve, state_files


def changed_preset(monkeypatch, **row: object) -> None:
    sizes = {key: value for key, value in MODEL.model_dump().items() if key not in ("preset", "norm_eps")}
    monkeypatch.setitem(PRESETS, "small", {**sizes, "rope_scaling": None, "norm_eps": 1e-6, **row})


def preset_config(*words: str) -> Config:
    config = load(None, ["model.preset=small", "checkpoint.async_save=false", *words], need_data=False)
    return config.model_copy(update={"batch": make_config().batch, "precision": make_config().precision})


def test_a_resumed_run_keeps_what_its_preset_said_when_it_began(tmp_path, monkeypatch) -> None:
    changed_preset(monkeypatch)
    make_manager(tmp_path, preset_config()).save(1, solo_shards(make_state()), {"step": 1})
    changed_preset(monkeypatch, norm_eps=1e-5)
    log: list[str] = []
    grid = Topology(dp=2)

    def rank(group):
        manager = make_manager(tmp_path, preset_config(), group, log=log.append)
        config = manager.keep_settings()
        assert config.model.norm_eps == 1e-6 and manager.resume(empty_solo()) == {"step": 1}
        assert manager.keep_settings() == config
        return manager

    on_grid(grid, rank)
    assert log == [
        f"model.norm_eps=1e-06 as in {tmp_path / 'step-00000001'}; its preset says 1e-05 by now: "
        "write model.norm_eps to choose"
    ]
    manager = make_manager(tmp_path, preset_config())
    manager.keep_settings()
    manager.save(2, solo_shards(make_state()), {})
    saved = manifest.read_manifest(tmp_path / "step-00000002")
    assert saved.body["config"]["model"]["norm_eps"] == saved.model.norm_eps == 1e-6
    assert json.loads((tmp_path / "step-00000002/model/config.json").read_text())["rms_norm_eps"] == 1e-6


def test_what_the_user_wrote_is_never_replaced(tmp_path, monkeypatch) -> None:
    changed_preset(monkeypatch)
    make_manager(tmp_path, preset_config()).save(1, solo_shards(make_state()), {"step": 1})
    changed_preset(monkeypatch, norm_eps=1e-5)
    for words in (["model.norm_eps=1e-5"], ["model.rope_theta=5e5", "model.norm_eps=1e-6"]):
        config = preset_config(*words)
        manager = make_manager(tmp_path, config)
        assert manager.keep_settings() is config
        with pytest.raises(CheckpointError, match="was saved by another model:\n  model\\.(norm_eps|rope_theta): chec"):
            manager.resume(empty_solo())
    new = preset_config("checkpoint.resume=fresh")
    assert make_manager(tmp_path, new).keep_settings() is new
    assert make_manager(tmp_path / "none", preset_config()).keep_settings().model.norm_eps == 1e-5


def test_the_steps_after_a_resume_are_made_with_what_was_kept(pool: Pool, tmp_path) -> None:
    steps, half = {"train": {"steps": 6}}, {"train": {"steps": 6, "stop_after_steps": 3}}
    assert pool.run(2, "tests.train.runs:run_preset", str(tmp_path / "whole"), steps, 0.5)[0]["step"] == 6
    assert pool.run(2, "tests.train.runs:run_preset", str(tmp_path / "cut"), half, 0.5)[0]["status"] == 75
    assert pool.run(2, "tests.train.runs:run_preset", str(tmp_path / "cut"), steps, 1e-6)[0]["step"] == 6
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert state_files(tmp_path / "cut") == state_files(tmp_path / "whole")
    assert "model.norm_eps=0.5 as in " in (tmp_path / "cut/run.log").read_text()
    assert pool.run(2, "tests.train.runs:run_preset", str(tmp_path / "new"), steps, 1e-6)[0]["step"] == 6
    assert curve(tmp_path / "new") != curve(tmp_path / "whole")
