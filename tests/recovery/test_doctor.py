"""Who is said to hold up a run, from where its ranks stand."""

from __future__ import annotations

from typing import Any

import pytest

from megallama.recovery.doctor import hung, waits_for, where
from megallama.recovery.straggler import STEPS_COMPARED, TIMES, Stragglers

HOSTS = ["a", "a", "b", "b"]


def report(wait: tuple[str, int, list[int]] | None = None, peer: int = -1, **more: Any) -> dict[str, Any]:
    """A rank in a backward, or that waits: group, number, ranks."""
    found = {
        "step": 5, "phase": "forward_backward", "action": "B", "stage": 0, "microbatch": 1, "layer": 3, "seconds": 8.0,
        "process": "S", "saving": False, "counts": {},
    }  # fmt: skip
    if wait is not None:
        group, number, ranks = wait
        call = {"group": group, "number": number, "ranks": ranks, "operation": "all_reduce", "rows": 8, "bytes": 64}
        found |= {"wait": call | {"peer": peer, "seconds": 8.1}, "counts": {group: number}}
    return found | more


def test_where_a_rank_stands() -> None:
    assert where(report()) == "step 5, backward of micro-batch 1 in stage 0, layer 3"
    assert where(report(action="recv_F", layer=-1)) == "step 5, recv_F of micro-batch 1 in stage 0"
    assert where(report(action="last sends")) == "step 5, last sends"
    assert where(report(action="", step=0, phase="setting up")) == "setting up"
    wait = report(("tp", 17, [0, 1]))["wait"]
    assert waits_for(wait) == "all_reduce 17 of group tp (ranks 0-1, 8 rows, 64 bytes)"
    assert waits_for(wait | {"ranks": [0, 2], "peer": 2, "operation": "recv"}) == (
        "recv from rank 2 of group tp (ranks [0, 2], 8 rows, 64 bytes)"
    )


def test_a_host_that_nothing_is_heard_from() -> None:
    ranks, text = hung({0: report(("world", 3, [0, 1, 2, 3])), 1: report(("world", 3, [0, 1, 2, 3]))}, HOSTS)
    assert ranks == [2, 3]
    assert text.splitlines()[0] == (
        "rank 2 (b) holds up the others: nothing is heard from its supervisor: its host is gone, or cut off from "
        "the others"
    )
    assert text.splitlines()[2].startswith("  rank 0 (a) waits for 8.1 s in all_reduce 3 of group world (ranks 0-3")


@pytest.mark.parametrize(
    ("letter", "text"),
    [("T", "is stopped (SIGSTOP)"), ("t", "a debugger holds"), ("D", "a call of the kernel that does not return")],
)
def test_a_process_that_stands_still_even_where_it_waits_itself(letter: str, text: str) -> None:
    """Rank 0 waits for 1 in tp, 2 for 0 in dp: 1 stands still, in a wait of its own that is not over for it."""
    reports = {
        0: report(("tp", 9, [0, 1])), 1: report(("tp", 9, [0, 1]), process=letter),
        2: report(("dp", 4, [0, 2])), 3: report(("dp", 4, [1, 3])),
    }  # fmt: skip
    ranks, said = hung(reports, HOSTS)
    assert ranks == [1] and text in said.splitlines()[0]


def test_a_rank_that_computes_while_the_others_wait() -> None:
    reports = {0: report(("tp", 9, [0, 1])), 1: report(), 2: report(("dp", 4, [0, 2])), 3: report(("tp", 9, [2, 3]))}
    ranks, said = hung(reports, HOSTS)
    assert ranks == [1]
    assert said.splitlines()[0] == (
        "rank 1 (a) holds up the others: it is not where the others wait for it; step 5, backward of micro-batch 1 in "
        "stage 0, layer 3, nothing new for 8.0 s"
    )


def test_a_rank_that_has_left_one_out() -> None:
    everyone = [0, 1, 2, 3]
    reports: dict[int, Any] = {rank: report(("world", 7, everyone)) for rank in (0, 1, 3)}
    reports[2] = report(("dp", 4, [0, 2]), counts={"world": 6, "dp": 4})
    ranks, said = hung(reports, HOSTS)
    assert ranks == [2]
    assert "it has begun 6 communications of group world where others have 7: it has left one out" in said


def test_a_rank_that_is_in_another_communication() -> None:
    reports: dict[int, Any] = {rank: report(("world", 7, [0, 1, 2, 3])) for rank in range(4)}
    reports[3]["wait"]["operation"] = "all_gather"
    ranks, said = hung(reports, HOSTS)
    assert ranks == [3] and "another communication of group world" in said


def test_ranks_that_wait_for_one_another() -> None:
    reports = {
        0: report(("pp", 1, [0, 1]), peer=1), 1: report(("pp", 1, [0, 1]), peer=0),
        2: report(("pp", 1, [2, 3]), peer=3), 3: report(("pp", 1, [2, 3]), peer=2),
    }  # fmt: skip
    ranks, said = hung(reports, HOSTS)
    assert ranks == [0, 1, 2, 3] and "all ranks wait for one another" in said


def test_of_thousands_of_ranks_a_few_are_said() -> None:
    everyone = [*range(2048)]
    reports: dict[int, Any] = {rank: report(("world", 7, everyone)) for rank in range(1000)}
    ranks, said = hung(reports, ["h"] * 2048)
    assert len(ranks) == 1048 and len(said.splitlines()) == 17
    assert "and 1040 more ranks: [1008, " in said


def test_a_wait_in_a_group_that_is_not_known_any_more() -> None:
    """The next trainer has begun between two looks."""
    ranks, said = hung({0: report(("?", 7, [])), 1: report(("?", 7, []))}, ["h"] * 2)
    assert ranks == [0, 1] and "of group ? (ranks [], " in said


def busy(steps: int, *milliseconds: float) -> dict[int, tuple[int, list[int]]]:
    return {rank: (steps, [int(1e6 * ms)] * 64) for rank, ms in enumerate(milliseconds)}


def test_a_slow_rank_is_found_once_and_again_after_it_was_well() -> None:
    watch, found = Stragglers([0, 0, 0, 0]), []
    for n in range(1, 12):
        slow = 111.0 if n != 7 else 100.0
        found.append(watch.look(busy(n * STEPS_COMPARED, 100.0, 100.5, slow, 99.5)))
    said = [n for n, ranks in enumerate(found) if ranks]
    assert said[0] == TIMES and len(said) == 2 and said[1] == 7 + TIMES - 1
    assert found[said[0]][0][0] == 2 and found[said[0]][0][1] == pytest.approx(1.11, abs=0.005)
    assert watch.slowest is not None and watch.slowest[0] == 2


def test_stages_have_work_of_their_own() -> None:
    watch = Stragglers([0, 0, 1, 1])
    assert not any(watch.look(busy(n * STEPS_COMPARED, 100.0, 101.0, 150.0, 151.0)) for n in range(1, 20))
    alone = Stragglers([0, 1])
    assert not any(alone.look(busy(n * STEPS_COMPARED, 100.0, 300.0)) for n in range(1, 20))
    assert alone.slowest is None


def test_noise_is_no_straggler() -> None:
    """1,000 steps with 30 % of noise, and every fiftieth step of one rank twice as long."""
    import random

    draw = random.Random(3)
    times = {rank: [int(1e8 * (1 + 0.3 * draw.random())) for _ in range(1000)] for rank in range(8)}
    for step in range(0, 1000, 50):
        times[3][step] *= 2
    watch = Stragglers([0] * 8)
    for steps in range(1, 1001):
        state = {rank: (steps, own[max(0, steps - 64) : steps]) for rank, own in times.items()}
        assert watch.look(state) == []


@pytest.mark.parametrize(("by", "found"), [(1.1, [2]), (1.0, [])])
def test_a_rank_slower_by_a_tenth_is_found_in_noise(by: float, found: list[int]) -> None:
    """As measured with two ranks to a core: 6 % of noise in a step."""
    import random

    draw, watch, said = random.Random(5), Stragglers([0] * 4), []
    times = {rank: [int(1e7 * draw.gauss(1.0, 0.06)) for _ in range(1000)] for rank in range(4)}
    times[2] = [int(by * ns) for ns in times[2]]
    for steps in range(1, 1001):
        said += watch.look({rank: (steps, own[max(0, steps - 64) : steps]) for rank, own in times.items()})
    assert sorted({rank for rank, _ in said}) == found


def test_a_comparison_waits_for_all_ranks_and_takes_the_same_steps_of_each() -> None:
    watch = Stragglers([0, 0])
    assert watch.look(busy(STEPS_COMPARED, 100.0)) == [] and watch.slowest is None
    ahead = {0: (25, [100] * 20 + [900] * 5), 1: (20, [100] * 20)}
    watch.look({0: (0, []), 1: (0, [])})
    watch.look(ahead)
    later = {0: (45, [100] * 40 + [900] * 5), 1: (40, [100] * 40)}
    watch.look(later)
    assert watch.slowest is not None and watch.slowest[1] == 1.0
