"""What copies in memory take: bytes of the fullest rank, seconds at the rates, and how often a buddy's can be made."""

from __future__ import annotations

import pytest

from megallama.config.load import load
from megallama.plan.copies import COPY_RATE, copies
from megallama.plan.plan import make_plan

WORDS = ["model.preset=llama-7b", "parallel.tp=2", "parallel.pp=2", "checkpoint.memory_interval=5"]


def lines(per_node: int, step_seconds: float, *words: str) -> list[str]:
    plan = make_plan(load(None, [*WORDS, *words], need_data=False), 4)
    return [text for _, text in copies(plan, per_node, step_seconds)]


def test_bytes_are_two_states_of_the_fullest_rank_and_seconds_follow_from_the_rate() -> None:
    plan = make_plan(load(None, WORDS, need_data=False), 4)
    state = max(plan.memory(rank).state for rank in range(2))
    seconds, gib = state / 10e9, 2 * state / 2**30
    assert COPY_RATE == 10 and seconds > 1
    of_two = f"in memory every 5 steps, two of them: {gib:.3g} GiB per rank, {2 * gib:.3g} GiB on a node of 2 ranks"
    share = seconds / (seconds + 5 * 2.0)
    assert lines(2, 2.0)[:2] == [of_two, f"each takes {seconds:.2g} s at 10 GB/s (assumed), {share:.1%} of the time"]
    assert lines(8, 2.0)[0].endswith(f"{4 * gib:.3g} GiB on a node of 4 ranks")
    assert lines(2, 2.0, "checkpoint.memory_interval=0") == []


@pytest.mark.parametrize(("steps_a_copy", "least"), [(0.5, 1), (1.5, 2), (3.01, 4)])
def test_a_buddys_copy_takes_as_many_steps_as_its_rate_says(steps_a_copy: float, least: int) -> None:
    plan = make_plan(load(None, WORDS, need_data=False), 4)
    seconds = max(plan.memory(rank).state for rank in range(2)) / 2e9
    far = lines(2, seconds / steps_a_copy, "checkpoint.buddy_rate=2")
    assert far[2:] == [
        f"as much again for another node's copies; each is there after {seconds:.2g} s at 2 GB/s, for which "
        f"checkpoint.memory_interval={least} leaves the time"
    ]
    assert len(lines(4, 1.0, "checkpoint.buddy_rate=2")) == 2, "one node has no buddy"
