"""How deep a step is: the frames of ours from the program's entry to the attention kernel."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch.nn.functional as F

import megallama
from megallama.pretrain import main
from tests.faults.test_bad_input import GOOD

OURS = str(Path(megallama.__file__).parent)


def test_the_log_of_a_rank_that_fails_says_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr("megallama.layers.linear.RowParallelLinear.__call__", broken)
    assert main([*GOOD, f"run.folder={tmp_path}"]) == 4
    assert "this rank stood in F0.0 of its pipeline" in (tmp_path / "logs" / "rank-0000.log").read_text()


def test_at_most_ten_frames_from_the_entry_to_the_attention_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, stacks = F.scaled_dot_product_attention, []

    def seen(*args: object, **named: object) -> object:
        stacks.append([frame.name for frame in traceback.extract_stack() if frame.filename.startswith(OURS)])
        return real(*args, **named)  # type: ignore[arg-type]

    arguments = [*GOOD, "precision.dtype=fp32", "log.tensorboard=false", "train.steps=1", f"run.folder={tmp_path}"]
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    assert main(arguments) == 0
    forward = [stack for stack in stacks if "_forward" in stack]  # the others are the check of the kernel
    assert forward and all(stack[0] == "main" and stack[-1] == "sdpa" for stack in forward)
    assert max(map(len, forward)) <= 10, forward[0]
