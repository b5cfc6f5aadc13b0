"""The kernels of a run: what the configuration asks for, the same on all ranks; and what the plan says of fp8."""

from __future__ import annotations

import pytest

from megallama.comm.group import Solo
from megallama.config.errors import MegallamaError
from megallama.forecast.forecast import flags
from megallama.forecast.hardware import load_hardware
from megallama.forecast.job import job_of
from megallama.plan.plan import make_plan
from megallama.train.assemble import kernels_of, same_kernels
from tests.small import CPU, small_config


def test_the_configuration_reaches_the_choice() -> None:
    config = small_config(precision={"dtype": "bf16"}, run={"without_kernels": ["blocks of matrix products"]})
    assert kernels_of(config, CPU).choices[0].selected == "torch scaled_dot_product_attention"
    with pytest.raises(MegallamaError, match=r"precision.fp8: .*no CUDA device\); write precision.fp8=.none."):
        kernels_of(small_config(precision={"dtype": "bf16", "fp8": "tensorwise"}), CPU)


def test_ranks_that_took_different_kernels_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = [["attention", "apex"], ["AdamW", "apex"]], [["attention", "apex"], ["AdamW", "torch fused"]]
    group, kernels = Solo(), kernels_of(small_config(), CPU)
    monkeypatch.setattr(group, "gather_values", lambda value: [own, own, own])
    same_kernels(group, kernels)
    monkeypatch.setattr(group, "gather_values", lambda value: [own, own, other])
    with pytest.raises(MegallamaError) as caught:
        same_kernels(group, kernels)
    assert str(caught.value) == (
        "AdamW: rank 0 took apex, rank 2 torch fused; its log says why. Make the installations alike, or write "
        'run.without_kernels=["AdamW: apex"]'
    )


def test_the_plan_says_that_fp8_is_predicted_from_other_programs() -> None:
    output = []
    for fp8 in ("none", "tensorwise"):
        config = small_config(precision={"dtype": "bf16", "fp8": fp8})
        plan = make_plan(config, 1)
        assert ("fp8 tensorwise in the layers' linear maps" in str(plan)) is (fp8 != "none")
        output.append(flags(job_of(config, plan.topology, "flash2"), load_hardware("a100-80g")))
    assert set(output[1]) - set(output[0]) == {"fp8 products have other programs' speed"}
