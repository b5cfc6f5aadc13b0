"""The fp16 loss scaler's state machine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megallama.config.schema import PrecisionConfig
from megallama.train.progress import MAX_SCALE, LossScaler


def fp16(**keys: Any) -> LossScaler:
    values: dict[str, Any] = {"dtype": "fp16", "initial_loss_scale": 1024.0, "loss_scale_window": 3, **keys}
    return LossScaler(PrecisionConfig(**values))


def test_halves_on_overflow_and_doubles_after_the_window() -> None:
    scaler = fp16()
    flags = [True, True, True, True, True, False, True, True, True, False, False]
    scales = []
    for finite in flags:
        scaler.update(finite)
        scales.append(scaler.scale)
    assert scales == [1024, 1024, 2048, 2048, 2048, 1024, 1024, 1024, 2048, 1024, 512]


def test_says_whether_a_smaller_scale_may_help() -> None:
    scaler = fp16(initial_loss_scale=4.0)
    assert [scaler.update(False) for _ in range(4)] == [True, True, False, False]
    assert scaler.scale == 1.0
    assert scaler.update(True) is False


def test_never_below_the_minimum_nor_above_the_maximum() -> None:
    scaler = fp16(initial_loss_scale=1.5)
    assert scaler.update(False) is True
    assert scaler.scale == 1.0
    scaler = fp16(initial_loss_scale=MAX_SCALE / 2, loss_scale_window=1)
    for _ in range(5):
        scaler.update(True)
    assert scaler.scale == MAX_SCALE
    below = fp16()
    below.load_state_dict({"scale": 0.5, "good_steps": 0})  # earlier versions had a minimum to choose: never raise it
    assert below.update(False) is False
    assert below.scale == 0.5


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_identity_for_other_formats(dtype: str) -> None:
    scaler = LossScaler(PrecisionConfig.model_validate({"dtype": dtype, "loss_scale_window": 1}))
    assert [scaler.update(finite) for finite in (True, False, True)] == [False, False, False]
    assert scaler.scale == 1.0
    assert scaler.state_dict() == {}


def test_state_survives_json_and_continues_identically() -> None:
    first = fp16()
    for finite in (True, True, False, True, True):
        first.update(finite)
    second = fp16()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.scale, second.good_steps) == (512.0, 2)
    for finite in (True, False, True, True, True):
        first.update(finite)
        second.update(finite)
        assert first.state_dict() == second.state_dict()


def test_a_state_of_another_format_changes_nothing() -> None:
    scaler = fp16()
    scaler.load_state_dict({})
    assert scaler.scale == 1024.0
    plain = LossScaler(PrecisionConfig(dtype="bf16"))
    plain.load_state_dict(fp16().state_dict())
    assert plain.scale == 1.0
