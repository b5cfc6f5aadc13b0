"""Programs that fit together are accepted, and every fault put into one rank's program is found and named."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from megallama.analysis.agreement import Disagreement, Program, prove
from megallama.analysis.dryrun import dry_run
from megallama.analysis.recording import Call, Wait
from megallama.comm.group import partitions
from megallama.plan.plan import make_plan
from tests.parity.matrix import Layout

PAIR = {"pp": [(0, 1)], "world": [(0, 1)]}


def program(*words: str) -> Program:
    """Calls like ``send:1`` (to member 1), ``recv:0``, ``pp:sum`` (a collective), and waits ``wait:2`` (for call 2)."""
    calls: list[Call] = []
    waits: list[Wait] = []
    for word in words:
        op, _, rest = word.partition(":")
        if op == "wait":
            waits.append(Wait(len(calls), int(rest)))
        elif op in ("send", "recv"):
            calls.append(Call(op, "pp", (2,), torch.float32, 8, int(rest)))
        else:
            calls.append(Call("all_reduce", op, (2,), torch.float32, 8, label=rest))
    return Program(tuple(calls), tuple(waits))


def test_two_ranks_that_send_before_they_receive_fit_and_those_that_wait_first_do_not() -> None:
    first = program("send:1", "recv:1", "wait:0", "wait:1")
    assert prove([first, program("send:0", "recv:0", "wait:0", "wait:1")], PAIR)
    late = [program(f"recv:{peer}", "wait:0", f"send:{peer}", "wait:1") for peer in (1, 0)]
    with pytest.raises(Disagreement) as found:
        prove(late, PAIR)
    assert str(found.value) == (
        "ranks wait for one another for ever: "
        "rank 0 waits for recv from member 1 (2,) float32 of group pp, which rank 1 does not reach; "
        "rank 1 waits for recv from member 0 (2,) float32 of group pp, which rank 0 does not reach"
    )


def test_waiting_crosswise_on_two_groups_is_a_deadlock() -> None:
    one, other = program("pp:", "wait:0", "world:", "wait:1"), program("world:", "wait:0", "pp:", "wait:1")
    with pytest.raises(Disagreement, match="rank 0 waits for all_reduce .* of group pp, which rank 1 does not reach"):
        prove([one, other], PAIR)


def test_collectives_that_must_be_under_way_at_once_are_told_apart() -> None:
    one, other = program("pp:", "world:", "wait:0", "wait:1"), program("world:", "pp:", "wait:0", "wait:1")
    assert prove([one, one], PAIR) is True
    assert prove([one, other], PAIR) is False


def test_a_disagreement_reads_as_a_sentence() -> None:
    with pytest.raises(Disagreement) as found:
        prove([program("world:", "world:a"), program("world:", "world:b")], PAIR)
    assert str(found.value) == (
        "group world of ranks 0, 1, call 1: rank 0 says all_reduce (2,) float32 in a, "
        "rank 1 says all_reduce (2,) float32 in b"
    )
    with pytest.raises(Disagreement, match=r"message 0 from rank 0 to rank 1: rank 0 says send to .*, rank 1 says not"):
        prove([program("send:1"), program()], PAIR)


LAYOUTS = (
    Layout(tp=2, pp=2, chunks=2, dp=2, tied=True, accumulation=4),
    Layout(tp=2, sequence_parallel=False, pp=4, schedule="zb-h1", kv_heads=1),
    Layout(tp=4, dp=2, kv_heads=1, vocab=61, documents=True),
)


Job = tuple[list[Program], dict[str, list[tuple[int, ...]]]]


@cache
def job(layout: Layout) -> Job:
    """The programs of all ranks of a job, and its groups."""
    plan = make_plan(layout.config("fp32"), layout.ranks)
    return list(dry_run(plan).programs), partitions(plan.topology, layout.kv_heads)


def without(program: Program, at: int) -> Program:
    """The program without call `at` and the waits for it."""
    waits = [Wait(w.before - (w.before > at), w.call - (w.call > at)) for w in program.waits if w.call != at]
    return Program(program.calls[:at] + program.calls[at + 1 :], tuple(waits))


def with_call(program: Program, at: int, call: Call) -> Program:
    return Program((*program.calls[:at], call, *program.calls[at + 1 :]), program.waits)


def swapped(program: Program, a: int, b: int) -> Program:
    first, second = program.calls[a], program.calls[b]
    return with_call(with_call(program, a, second), b, first)


def collective(rng: random.Random, program: Program) -> int:
    return rng.choice([i for i, c in enumerate(program.calls) if c.op not in ("send", "recv")])


def message(rng: random.Random, program: Program, op: str) -> int:
    return rng.choice([i for i, c in enumerate(program.calls) if c.op == op])


def skip(rng: random.Random, program: Program) -> tuple[Program, str]:
    at = collective(rng, program)
    return without(program, at), program.calls[at].group


def swap(rng: random.Random, program: Program) -> tuple[Program, str]:
    """Two calls of one group in the other order."""
    while True:
        a, b = sorted((collective(rng, program), collective(rng, program)))
        first, second = program.calls[a], program.calls[b]
        if first.group == second.group and first != second:
            return swapped(program, a, b), first.group


def other_format(rng: random.Random, program: Program) -> tuple[Program, str]:
    at = rng.randrange(len(program.calls))
    call = program.calls[at]
    return with_call(program, at, replace(call, dtype=torch.bfloat16)), call.group


def other_shape(rng: random.Random, program: Program) -> tuple[Program, str]:
    at = rng.randrange(len(program.calls))
    call = program.calls[at]
    return with_call(program, at, replace(call, shape=(*call.shape, 2))), call.group


def other_reduction(rng: random.Random, program: Program) -> tuple[Program, str]:
    at = rng.choice([i for i, c in enumerate(program.calls) if c.op == "all_reduce"])
    call = program.calls[at]
    return with_call(program, at, replace(call, reduce="sum" if call.reduce == "max" else "max")), call.group


def no_receive(rng: random.Random, program: Program) -> tuple[Program, str]:
    return without(program, message(rng, program, "recv")), "pp"


def no_send(rng: random.Random, program: Program) -> tuple[Program, str]:
    return without(program, message(rng, program, "send")), "pp"


def wrong_peer(rng: random.Random, program: Program) -> tuple[Program, str]:
    at = message(rng, program, "send")
    peer = program.calls[at].peer
    assert peer is not None
    return with_call(program, at, replace(program.calls[at], peer=1 - peer if peer < 2 else 0)), "pp"


Mutation = Callable[[random.Random, Program], tuple[Program, str]]
COLLECTIVE: tuple[Mutation, ...] = (skip, swap, other_format, other_shape, other_reduction)
MESSAGE: tuple[Mutation, ...] = (no_receive, no_send, wrong_peer)


CASES = [(layout, m) for layout in LAYOUTS for m in (*COLLECTIVE, *(MESSAGE if layout.pp > 1 else ()))]


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize(("layout", "mutate"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_every_fault_is_found_and_named(layout: Layout, mutate: Mutation, seed: int) -> None:
    programs, groups = list(job(layout)[0]), job(layout)[1]
    rng = random.Random(seed)
    rank = rng.randrange(len(programs))
    programs[rank], group = mutate(rng, programs[rank])
    with pytest.raises(Disagreement) as found:
        prove(programs, groups)
    text = str(found.value)
    assert text.startswith(f"group {group} of ranks "), text
    assert f"rank {rank} says " in text, text


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.pp > 1], ids=str)
def test_a_rank_that_sends_last_is_a_deadlock(layout: Layout) -> None:
    """All sends of rank 0 after everything else, in their order: all agree, and nothing moves."""
    programs, groups = list(job(layout)[0]), job(layout)[1]
    calls = programs[0].calls
    order = sorted(range(len(calls)), key=lambda i: calls[i].op == "send")
    place = {old: new for new, old in enumerate(order)}
    waits = [
        Wait(sum(c.op != "send" for c in calls[: w.before]), place[w.call])
        for w in programs[0].waits
        if calls[w.call].op != "send"
    ]
    programs[0] = Program(tuple(calls[i] for i in order), tuple(waits))
    with pytest.raises(Disagreement, match="^ranks wait for one another for ever: rank 0 waits for recv"):
        prove(programs, groups)
