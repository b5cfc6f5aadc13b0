"""A step is run again, and what is said of it: the same bits, a record that is wrong, another layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megallama.comm.launch import World
from megallama.commands.replay import run as replay_command
from megallama.config.errors import ConfigError
from megallama.recovery.replay import _checkpoints, judge, recorded, replay_with
from tests.pool import Pool
from tests.train.runs import curve

RUN, AGAIN = "tests.train.runs:run", "tests.recovery.test_replay:again"


def again(world: World, folder: str, step: int) -> list[str]:
    """`megallama replay` in ranks that have met."""
    return replay_with(world, Path(folder), step, *_checkpoints(Path(folder), step))


def sections(dtype: str, **log: Any) -> dict[str, dict[str, Any]]:
    return {
        "precision": {"dtype": dtype},
        "train": {"steps": 7},
        "checkpoint": {"interval": 3, "keep_last": 5},
        "log": {"tensorboard": False, "plot": False, **log},
    }


def change_record(folder: Path, step: int, **numbers: float) -> None:
    """What a run with a broken machine would have written."""
    file = folder / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        if record["step"] == step:
            record.update(numbers)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_step_is_the_same_again_and_a_wrong_record_shows(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, RUN, str(tmp_path), sections("bf16"))
    before = files(tmp_path)
    lines, *others = pool.run(2, AGAIN, str(tmp_path), 5)
    assert files(tmp_path) == before, "nothing of the run is touched"
    assert lines[0].startswith("step 5, 2 steps after ") and "step-00000003, on 2 ranks" in lines[0]
    _, loss, norm, _ = curve(tmp_path)[4]
    for row in lines[1:4]:  # recorded, again, once more
        assert row[10:] == f" loss {loss!r:<22} grad norm {norm!r}"
    exact = float(lines[4].split()[3])
    assert lines[4].startswith("in fp64") and 0 < abs(exact - loss) < 0.02 * loss
    assert lines[5] == "data: the same bits again, and nothing that fp64 would change: look with megallama explain"
    change_record(tmp_path, 5, grad_norm=math.nextafter(norm, math.inf))  # the last bit of one number
    change_record(tmp_path, 6, loss=2 * loss)
    (*_, first, verdict, _), _ = pool.run(2, AGAIN, str(tmp_path), 6)
    assert first == "the first step whose bits differ is 5"
    assert verdict == (
        "hardware: the replays agree with one another and not with the run: a machine of the run computed wrongly"
    )


def test_another_layout_cannot_decide_within_rounding(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, RUN, str(tmp_path), {**sections("fp32", interval=4), "parallel": {"tp": 2}})
    assert [step for step, *_ in curve(tmp_path)] == [4, 7], "the others are in rank 0's file"
    ((*lines, verdict, _),) = pool.run(1, AGAIN, str(tmp_path), 6)
    assert verdict.startswith("not decidable: loss is off by "), verdict
    assert lines[2].startswith("again ") and lines[3].startswith("once more ") and lines[2][10:] != lines[3][10:]
    assert (
        "other than in the run: ranks: 2, now 1" in lines
        and "other than in the run: layout: the run's, now tp=1, pp=1" in lines
    )
    loss = recorded(tmp_path)[7][0]
    change_record(tmp_path, 7, loss=loss + 0.01)
    ((*_, verdict, _),) = pool.run(1, AGAIN, str(tmp_path), 7)
    assert verdict.startswith("unexplained: loss is off by 0.01, replays by ")


def test_without_a_checkpoint_before_the_step(tmp_path: Path, pool: Pool) -> None:
    pool.run(1, RUN, str(tmp_path), sections("fp32"))
    with pytest.raises(
        ConfigError, match=r"no checkpoint before step 3 in .*\(steps there: 3, 6, 7\); checkpoint.keep_l"
    ):
        replay_command([str(tmp_path), "3"])
    with pytest.raises(ConfigError, match="has no record of step 9"):
        replay_command([str(tmp_path), "9"])


GOOD, SPIKE = (2.0, 1.0), (2.1, 40.0)


@pytest.mark.parametrize(
    ("was", "again", "second", "exact", "strict", "verdict"),
    [
        (GOOD, GOOD, GOOD, (2.001, 1.01), True, "data"),
        (SPIKE, SPIKE, SPIKE, (2.1, 39.0), True, "data"),
        (SPIKE, SPIKE, SPIKE, (2.05, 1.2), False, "numerics: the same bits again, but grad_norm does not"),
        ((math.nan, math.nan),) * 3 + (GOOD, True, "numerics: the same bits again, but loss and grad_norm does not"),
        ((math.nan, math.nan),) * 4 + (True, "data"),
        (SPIKE, GOOD, GOOD, GOOD, True, "hardware: the replays agree"),
        (GOOD, (2.0, 1.001), GOOD, GOOD, True, "hardware: two replays differ here"),
        ((2.0, 1.003), GOOD, (2.0, 1.001), GOOD, False, "not decidable"),
        ((2.0, 1.005), GOOD, (2.0, 1.001), GOOD, False, "unexplained: loss is off by 0, replays by 0, grad_norm is"),
        ((2.0, 1.003), GOOD, GOOD, (2.0, 1.001), False, "not decidable"),
        ((2.0, math.nan), GOOD, (2.0, 1.001), GOOD, False, "unexplained"),
    ],
)  # fmt: skip
def test_the_verdicts(was: Any, again: Any, second: Any, exact: Any, strict: bool, verdict: str) -> None:
    assert judge(was, again, second, exact, GOOD, strict).startswith(verdict)


def test_a_step_behind_a_rollback_has_the_data_that_it_had(pool: Pool, tmp_path: Path) -> None:
    settings = sections("fp32") | {"train": {"steps": 25, "on_spike": "rollback"}}
    pool.run(1, RUN, str(tmp_path), settings, "scale:22:0:1000")
    assert curve(tmp_path)[22][2] > 100, "data are synthetic: the spike comes again, and at last it is only said"
    assert (tmp_path / "run.log").read_text().count(" is undone (rollback ") == 3
    ((*lines, verdict, _),) = pool.run(1, AGAIN, str(tmp_path), 22)
    assert "step-00000021" in lines[0] and verdict.startswith("data: the same bits again"), [*lines, verdict]
