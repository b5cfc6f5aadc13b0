"""What a run decides from numbers, at the very bounds: no rank, no process, no disk."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megallama.checkpoint.memory import MemoryCopies
from megallama.comm.flight_record import COPIED, FlightRecord
from megallama.comm.group import Solo
from megallama.config.errors import ConfigError, CorruptionError
from megallama.config.schema import Config, LrScheduleConfig
from megallama.plan.plan import make_plan
from megallama.train import setup as set_up
from megallama.train import watch
from megallama.train.loop import TrainingLoop
from megallama.train.progress import HighLoss, Progress, Spikes
from megallama.train.setup import changes, check_room
from megallama.train.step import RankStatus, StepConsensus
from megallama.train.watch import SAID, Watch
from tests.small import small_config, solo_rank

QUIET = dict.fromkeys(RankStatus().counts(), 0.0)


class Lines:
    """A log that keeps its lines."""

    def __init__(self) -> None:
        self.rank, self.said, self.noted = 0, list[str](), list[str]()

    def info(self, text: str) -> None:
        self.said.append(text)

    def note(self, text: str) -> None:
        self.noted.append(text)


class Gathered(Solo):
    """A group whose other ranks have given `others`."""

    def __init__(self, others: list[float]) -> None:
        super().__init__("world")
        self.others = others

    def gather_values(self, value: Any, summary: Any = list) -> Any:
        return summary([value, *self.others])


def result(loss: float = 1.0, norm: float = 1.0, **sums: float) -> StepConsensus:
    return StepConsensus({"loss": loss, "norm_squared": norm**2, **QUIET, **sums})


def watching(others: list[float] = [], own: float = 1.0, **train: Any) -> tuple[Watch, Lines]:  # noqa: B006
    """What looks at a run of 1 + len(others) replicas, whose gradients of the step had these norms."""
    config, log = small_config(train=train, batch={"global_batch_size": 12}), Lines()
    plan = make_plan(config, 1 + len(others))
    sync = SimpleNamespace(norms=[torch.tensor(own)])
    documents = lambda ids: [f"text {i}" for i in ids]  # noqa: E731
    setup: Any = SimpleNamespace(
        config=config, progress=Progress(config), log=log, plan=plan,
        worker=SimpleNamespace(optimizer=SimpleNamespace(syncs=[sync]), groups=SimpleNamespace(dp=Solo("dp"))),
        world=SimpleNamespace(group=Gathered(others), hosts=[f"node{r}" for r in range(1 + len(others))]),
        manager=SimpleNamespace(saved_step=None, finish=lambda: None),
        data=SimpleNamespace(train=SimpleNamespace(documents=documents)),
    )  # fmt: skip
    return Watch(setup), log


@pytest.mark.parametrize(("own", "named"), [(20.0, False), (20.5, True), (math.nan, True), (math.inf, True)])
def test_twenty_times_the_gradient_of_its_peers_is_wrong(own: float, named: bool) -> None:
    looks, log = watching([1.0, 1.0], own)
    looks.step(result(bad_ranks=1.0), range(8), overflow=False)
    norm = f"norm {(own if own < math.inf else math.inf):.4g} before the reduction, those of the same weights 1"
    text = f"warning: step 0: the gradient of rank 0 (node0) had {norm}; if that host does it again, take it out"
    assert log.said == [text] * named


def test_of_two_replicas_the_smaller_is_typical_and_of_nothing_nobody_is() -> None:
    looks, log = watching([50.0], 1.0)
    looks.step(result(bad_ranks=1.0), range(8), overflow=False)
    assert len(log.said) == 1 and "of rank 1 (node1)" in log.said[0]
    looks, log = watching([0.0, 0.0], 5.0)
    looks.step(result(bad_ranks=1.0), range(8), overflow=False)
    assert log.said == []


@pytest.mark.parametrize(("norm", "compared"), [(4.9, False), (5.1, True)])
def test_gradients_are_compared_where_the_norm_is_five_times_the_median(norm: float, compared: bool) -> None:
    looks, log = watching([1.0, 1.0], 100.0)
    looks.step(result(norm=norm), range(8), overflow=False)
    assert log.said == [], "there is no median yet"
    looks, log = watching([1.0, 1.0], 100.0)
    looks._progress.spikes.windows["grad_norm"].extend([1.0] * 5)
    looks.step(result(norm=norm), range(8), overflow=False)
    assert len(log.said) == compared


def test_an_overflow_compares_nothing() -> None:
    looks, log = watching([1.0, 1.0], math.nan)
    looks.step(result(bad_ranks=1.0), range(8), overflow=True)
    assert log.said == []


def test_the_first_samples_are_said_and_all_of_a_rank_noted() -> None:
    looks, log = watching(on_spike="skip")
    looks._progress.spikes.windows["grad_norm"].extend([1.0] * 20)
    looks._progress.step = 24
    step = result(norm=3.0)
    assert looks.refuses(step)
    step.applied = False
    looks.step(step, range(100, 112), overflow=False)
    begins, own = ", ".join(f"{i} (text {i})" for i in range(100, 108)), range(100, 112)
    assert log.said == [
        "warning: step 24: grad_norm 3 stands out, typically 1; its update is left out",
        f"step 24 begins with the samples {begins}",
    ]
    assert log.noted == ["step 24 has on this rank the samples " + ", ".join(f"{i} (text {i})" for i in own)]
    assert not watching(on_spike="warn")[0].refuses(step), "a look is no refusal"


def test_of_many_wrong_pieces_eight_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, more in ((SAID, ""), (SAID + 1, "; and 1 more piece"), (SAID + 3, "; and 3 more pieces")):
        found = [(f"w{n}", [0]) for n in range(count)]
        monkeypatch.setattr(watch, "wrong_copies", lambda optimizer, groups, found=found: found)
        looks, _ = watching(check_replicas=3)
        for done in (0, 1, 3):
            looks._progress.step = done
            looks.check_replicas()  # before step 1, 2 and 4
        looks._progress.step = 5
        with pytest.raises(CorruptionError) as caught:
            looks.check_replicas()
        said = "; ".join(f"w{n} on rank 0 (node0)" for n in range(8))
        assert str(caught.value).startswith(
            f"step 6: weights have other bits than their masters or copies: {said}{more}. "
        )
        looks, _ = watching(check_replicas=0)
        looks.check_replicas()


def test_it_goes_back_as_often_as_it_may_and_where_something_is_saved() -> None:
    for saved, rollbacks, back in ((7, 0, True), (7, 1, True), (7, 2, False), (None, 0, False)):
        looks, _ = watching(on_spike="rollback", max_rollbacks=2)
        looks._progress.spikes.windows["loss"].extend([1.0] * 20)
        looks._setup.manager.saved_step, looks._progress.rollbacks = saved, rollbacks
        assert looks.refuses(result(loss=3.0)) is back and looks.goes_back is back


def spikes(loss: list[float], norm: list[float]) -> Spikes:
    return Spikes({"loss": loss, "grad_norm": norm})


def test_what_stands_out_lies_ten_deviations_above_the_median() -> None:
    flat = spikes([2.0] * 20, [4.0] * 20)
    assert flat.found({"loss": 2.4, "grad_norm": 8.0}) == {}
    assert flat.found({"loss": 2.41, "grad_norm": 8.01}) == {"loss": 2.0, "grad_norm": 4.0}
    wide = spikes([1.0, 3.0] * 10, [3.0, 5.0] * 10)  # the median deviation is 1
    assert wide.found({"loss": 16.82, "grad_norm": 18.82}) == {}
    assert wide.found({"loss": 16.83, "grad_norm": 18.83}) == {"loss": 2.0, "grad_norm": 4.0}
    assert spikes([2.0] * 19, [4.0] * 19).found({"loss": 99.0, "grad_norm": 99.0}) == {}
    long = spikes([1.0] * 150 + [9.0] * 150, [])
    assert len(long.windows["loss"]) == 200 and list(long.windows["loss"]).count(1.0) == 50


def test_the_tenth_in_a_row_is_the_new_level() -> None:
    seen, values = spikes([2.0] * 20, [4.0] * 20), {"loss": 9.0, "grad_norm": 4.0}
    assert [seen.seen(values, {"loss": 2.0}) for _ in range(10)] == [False] * 9 + [True]
    assert [*seen.windows["loss"]] == [*seen.windows["grad_norm"]] == []
    assert not seen.seen(values, {}) and [*seen.windows["loss"]] == [9.0]


def test_a_loss_is_high_two_percent_above_the_first() -> None:
    high = HighLoss(10.0)
    assert [high.seen(10.21) is not None for _ in range(22)] == [False] * 19 + [True] + [False] * 2
    high = HighLoss(10.0)
    assert not any(high.seen(10.2) for _ in range(30)) and HighLoss().seen(1.0) is None


# ---- the loop ----


def loop(step: int = 0, **sections: dict[str, Any]) -> tuple[Any, Lines]:
    """A loop without parts, before its next step; what is saved is in `saved`."""
    made: Any = TrainingLoop.__new__(TrainingLoop)
    config, log = small_config(**sections), Lines()
    made.progress = Progress(config)
    made.progress.step = step
    made._config, made._log, made._missing, made._save_owed = config, log, [], False
    made.saved = []
    made._save = lambda leaving: made.saved.append((made.progress.step, leaving))
    data = SimpleNamespace(valid=["v"], test=["t"])
    made.setup = SimpleNamespace(
        last_step=20,
        goes_on=False,
        data=data,
        tasks=["k"],
        copies=None,
        train_data=None,
        named={},
        computes_with="",
        signals=SimpleNamespace(received=None),
    )
    record = FlightRecord()
    made._world = SimpleNamespace(record=record, patient=lambda seconds: nullcontext(), rank=0, group=Solo("world"))
    made._timers = SimpleNamespace(phase=lambda name: nullcontext())
    made._manager = SimpleNamespace(lineage="a", saved_step=2, begun=4)
    return made, log


def test_minutes_are_enough_at_the_bound() -> None:
    made, _ = loop(train={"stop_after_minutes": 2.0})
    for passed, late in ((119.0, False), (120.5, True)):
        made.progress.started = time.monotonic() - passed
        assert made._status(False) == RankStatus(None, late, False)
    assert not loop()[0]._status(True).late


def test_a_save_that_was_due_in_bad_steps_is_made_in_the_first_good_one() -> None:
    made, log = loop(checkpoint={"interval": 4})
    for step, bad in ((3, 0), (4, 0), (5, 0), (8, 1), (9, 2), (10, 0), (11, 0), (12, 0)):
        made.progress.step, made.progress.guard.in_a_row = step, bad
        made._save_if_due(leaving=False)
    assert made.saved == [(4, False), (10, False), (12, False)]
    assert log.said == ["step 8 is not saved before a step is good again; nothing is deleted meanwhile"]
    made.progress.step, made.progress.guard.in_a_row = 13, 1
    made._save_if_due(leaving=True)
    assert made.saved[3:] == [(13, True)]
    made, _ = loop(8, checkpoint={"interval": 0})
    made._save_if_due(leaving=False)
    assert made.saved == []


def test_evaluations_are_due_at_their_interval_and_at_the_end() -> None:
    made, _ = loop(eval={"interval": 5})

    def due(step: int) -> list[tuple[str, str]]:
        made.progress.step = step
        return made._due()

    end = [("task", "k"), ("test", "t")]
    assert [due(step) for step in (0, 4, 5)] == [[], [], [("valid", "v")]]
    assert due(20) == [("valid", "v"), *end]
    made.setup.last_step = 18
    assert due(18) == [("valid", "v"), *end] and due(19) == []
    made.setup.goes_on = True
    assert due(18) == [("valid", "v")], "of a phase that is not the last"
    made, _ = loop(20)
    assert made._due() == end, "without an interval only tasks and the test set"
    made, _ = loop(eval={"interval": 10, "tasks_interval": 4})
    assert [due(step) for step in (4, 10, 12)] == [[("task", "k")], [("valid", "v")], [("task", "k")]]
    assert due(20) == [("valid", "v"), *end]


def test_what_an_earlier_start_has_evaluated_is_not_made_again(tmp_path: Path) -> None:
    source = lambda name: SimpleNamespace(name=name)  # noqa: E731
    made, _ = loop(20, eval={"interval": 5}, run={"folder": str(tmp_path)})
    made.setup.data = SimpleNamespace(valid=[source("a"), source("b")], test=[source("a")])
    made.setup.tasks = [source("b")]
    assert made._never_made() == [], "nothing is known of what an earlier version made"
    made.progress.may_lack_evaluations = True
    names = lambda: [(kind, one.name) for kind, one in made._never_made()]  # noqa: E731
    assert names() == [("valid", "a"), ("valid", "b"), ("task", "b"), ("test", "a")]
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "valid", "name": "a", "step": 20}\n{"kind": "valid", "name": "b", "step": 15}\n'
    )
    assert names() == [("valid", "b"), ("task", "b"), ("test", "a")]


def test_the_counters_say_up_to_which_step_all_is_evaluated() -> None:
    made, _ = loop(7)
    assert made._counters()["evaluated"] == 7
    made._missing = [("valid", "v")]
    assert made._counters()["evaluated"] == 6


class Copies:
    """Copies in memory that only remember their steps."""

    def __init__(self) -> None:
        self.kept, self.ends = list[tuple[int, list[int]]](), []

    def keep(self, step: int, counters: dict[str, Any], saved: list[int]) -> None:
        assert counters["lineage"] == "a"
        self.kept.append((step, saved))


def test_copies_are_made_at_their_interval_of_good_steps() -> None:
    made, _ = loop(checkpoint={"memory_interval": 2})
    made.setup.copies, waits = copies, [] = Copies(), list[float]()
    report = SimpleNamespace(catch_up=waits.append)
    for step, bad in ((1, 0), (2, 0), (4, 1), (6, 0)):
        made.progress.step, made.progress.guard.in_a_row = step, bad
        made._copy_if_due(report)
    assert copies.kept == [(2, [2, 4]), (6, [2, 4])] and waits == [1.0, 1.0]
    assert made._world.record.words[COPIED] == 7, "of step 6"


# ---- what a resumed run is told ----


def resumed(step: int, saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    before, after = (
        Config(lr_schedule=LrScheduleConfig(**own), train={"steps": 4000})  # type: ignore[arg-type]
        for own in ({"decay_steps": 4000, "wsd_decay_steps": 400} | given for given in (saved, now))
    )
    return [line for line in changes(before.model_dump(mode="json"), after, step, 0) if "curve" in line]


def test_the_first_step_with_another_learning_rate_is_named() -> None:
    base = {"kind": "wsd", "warmup_steps": 10}
    assert resumed(100, base, base) == []
    (line,) = resumed(100, base, base | {"decay_steps": 3000})
    found = int(line.split("step ")[1].split()[0])
    assert 2601 < found <= 2606 and line.endswith("; write lr_schedule.decay_steps=4000 to keep its end where it was")
    (line,) = resumed(100, base, base | {"min_ratio": 0.5})
    assert 3601 < int(line.split("step ")[1].split()[0]) <= 3605 and "to keep its end" not in line
    (line,) = resumed(3999, base, base | {"min_ratio": 0.5})
    assert "step 4000 has" in line
    assert resumed(4000, base, base | {"min_ratio": 0.5}), "the step after the last is one, too"


def test_why_a_run_cannot_go_on_with_fewer_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"device": "cpu", "min_replicas": 1, "max_replacements": 9}
    config = small_config(batch={"global_batch_size": 6}, parallel={"tp": 2}, run=run)
    plan = make_plan(config, 6)
    world: Any = SimpleNamespace(rank=0, hosts=[*"aaabbb"], device=torch.device("cpu"))
    need = plan.memory(0).persistent
    for limit, texts in ((1 << 40, ["no replica is whole", "", "", ""]), (need, ["no replica is whole", *"xx", ""])):
        monkeypatch.setattr(set_up, "room", lambda device, limit=limit: {"memory": limit})
        found = set_up._replicas(plan, world)
        assert ["x" if "the state of" in text else text for text in found] == texts
    assert "the state of 2 ranks " in found[1] and "the state of 3 ranks " in found[2]
    plan = make_plan(small_config(batch={"global_batch_size": 9}, run=run), 3)
    monkeypatch.setattr(set_up, "room", lambda device: {"memory": 1 << 40})
    world.hosts = ["a", "b", "c"]
    found = set_up._replicas(plan, world)
    assert "batch.global_batch_size=9 is not a multiple of" in found[2] and [found[1], found[3]] == ["", ""]


def test_going_back_is_counted_and_leaves_the_samples_between_out(monkeypatch: pytest.MonkeyPatch) -> None:
    config, log = small_config(train={"rollback_skip_steps": 2, "max_rollbacks": 3}), Lines()
    progress, untils = Progress(config), list[int | None]()
    progress.step, progress.samples, progress.first_step = 24, 192, 22

    def restore(setup: Any, until: int | None = None) -> Any:
        untils.append(until)
        progress.step, progress.left_out, progress.samples = 20, {"20": 48}, 208
        return SimpleNamespace(last_step=19, log=setup.log)

    monkeypatch.setattr(set_up, "_restore", restore)
    setup: Any = SimpleNamespace(
        config=config, progress=progress, log=log, worker=SimpleNamespace(optimizer=SimpleNamespace(wait=lambda: None))
    )
    assert set_up.go_back(setup).last_step == 19 and untils == [208]
    assert (progress.rollbacks, progress.first_step) == (1, 20), "steps from there on are this start's"
    assert log.said == [
        "warning: step 24 is undone (rollback 1 of at most 3): the run goes on after step 20; "
        "samples 160 to 207 are left out"
    ]


def test_groups_are_opened_for_the_heads_that_the_model_has() -> None:
    config = small_config(model={"num_kv_heads": 2}, parallel={"tp": 4})
    plan, asked = make_plan(config, 8), list[tuple[Any, int]]()

    def groups(topology: Any, heads: int) -> None:
        asked.append((topology, heads))
        raise EOFError

    world: Any = SimpleNamespace(notes=[], groups=groups)
    with pytest.raises(EOFError):
        set_up._build(plan, world, Lines(), None, None)  # type: ignore[arg-type]
    assert asked == [(plan.topology, 2)]


def test_what_is_too_large_is_said_in_gibibytes() -> None:
    gib = 1 << 30
    with pytest.raises(ConfigError, match="takes exactly 3 GiB, but memory on a is 2 GiB; use more machines"):
        check_room([("a", 3 * gib, 0, {"memory": 2 * gib})])
    assert check_room([("a", 2 * gib, 3 * gib, {"memory": 2 * gib})]) == [
        "with activations 3 GiB are expected, but memory on a is 2 GiB: it may be killed"
    ]


class Asked:
    """A flight record whose supervisor refuses, and remembers the questions."""

    watched = True

    def __init__(self) -> None:
        self.questions = list[dict[str, Any]]()

    def ask(self, **question: Any) -> dict[str, Any]:
        self.questions.append(question)
        return {"problem": "no room"}


def test_copies_in_memory_hold_what_this_rank_needs_and_are_not_made_where_there_is_no_room() -> None:
    config = small_config(checkpoint={"memory_interval": 3, "buddy_rate": 1.0})
    real, log, asked, owned = solo_rank(config), Lines(), Asked(), list[bool]()
    shards = lambda owned_only: (owned.append(owned_only), real.optimizer.shards(owned_only=owned_only))[1]  # noqa: E731
    worker: Any = SimpleNamespace(optimizer=SimpleNamespace(shards=shards), plan=real.plan, groups=real.groups)
    world: Any = SimpleNamespace(
        record=asked, world_size=1, rank=0, hosts=["a"], device=torch.device("cpu"), group=Solo("world")
    )
    assert set_up._memory_copies(config, world, worker, log) is None  # type: ignore[arg-type]
    assert owned == [False], "also what another rank saves"
    need = MemoryCopies.need(real.optimizer.shards(owned_only=False))
    opened, dropped = asked.questions
    assert (opened["do"], opened["size"], opened["listens"]) == ("open", need, False), "one host has no buddy"
    assert dropped == {"do": "drop"} and log.said == [
        "warning: no copies in memory: rank 0 on a: no room; they take twice the optimizer's state"
    ]
    key = {name: value for name, value in opened["key"].items() if name != "config"}
    assert key == {"folder": str(Path(config.run.folder).resolve()), "ranks": 1, "rank": 0}
    world.hosts = ["a", "b"]
    set_up._memory_copies(config, world, worker, log)  # type: ignore[arg-type]
    assert asked.questions[2]["listens"] and asked.questions[2]["key"] == opened["key"]
    for text, other in (
        ({"stop_after_steps": 5}, True), ({"stop_after_minutes": 5.0}, True), ({"seed": 8}, False),
    ):  # fmt: skip
        changed = small_config(checkpoint={"memory_interval": 3, "buddy_rate": 1.0}, train=text)
        set_up._memory_copies(changed, world, worker, log)  # type: ignore[arg-type]
        assert (asked.questions[-2]["key"] == opened["key"]) == other, text
    world.record = SimpleNamespace(watched=False)
    assert set_up._memory_copies(config, world, worker, log) is None  # type: ignore[arg-type]
    world.record = asked
    assert set_up._memory_copies(small_config(checkpoint={"memory_interval": 0}), world, worker, log) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("rank", "left"), [(0, False), (1, True)], ids=["rank 0", "rank 1"])
def test_a_start_without_copies_voids_those_of_earlier_starts(tmp_path: Path, rank: int, left: bool) -> None:
    """Rank 0 does, and once: the folder is everybody's."""
    chain = tmp_path / "memory"
    chain.write_text("x")
    manager, world = SimpleNamespace(chain=chain), SimpleNamespace(rank=rank)
    setup: Any = SimpleNamespace(copies=None, world=world, manager=manager, config=small_config())
    for rollback in (False, True):  # the second time nothing is there, which is no error
        assert set_up._from_memory(setup, rollback=rollback) is None
        assert chain.exists() == left
