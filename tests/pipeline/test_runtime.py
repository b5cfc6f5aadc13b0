"""The interpreter: every schedule gives one rank's numbers, holds no more than it says, frees what it has sent."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from megallama.pipeline.runtime import Observer, StageWork, _last_gradients
from megallama.plan.schedule import Action, Kind, parse_action
from megallama.train.assemble import Worker
from tests.small import curve, deviation, micro_batches, on_threads, small_config, solo_rank, tokens, train

OWN = Path(__file__).parents[1] / "parity" / "own.csv"
SCHEDULES: list[tuple[int, dict[str, Any]]] = [
    (2, {"pp": 2, "schedule": "gpipe"}),
    (2, {"pp": 2}),
    (4, {"pp": 4}),
    (2, {"pp": 2, "chunks": 2}),
    (2, {"pp": 2, "schedule": "gpipe", "chunks": 2}),
    (2, {"pp": 2, "schedule": "zb-h1"}),
    (4, {"pp": 4, "schedule": "zb-h1"}),
    (1, {"schedule": "zb-h1"}),
    (1, {"schedule": "gpipe"}),
    (2, {"pp": 2, "stage_layers": [3, 1]}),
    (2, {"pp": 2, "stage_layers": [4, 0]}),
    (2, {"pp": 2, "stage_layers": [0, 4]}),
    (4, {"pp": 4, "stage_layers": [2, 0, 2, 0]}),
    (4, {"pp": 4, "stage_layers": [2, 0, 2, 0], "schedule": "zb-h1"}),
    (2, {"pp": 2, "schedule": "zb-h2"}),
    (2, {"pp": 2, "schedule": "zb-v", "chunks": 2}),
    (4, {"pp": 4, "schedule": "zb-v", "chunks": 2, "stage_layers": [0, 1, 1, 0, 1, 0, 1, 0]}),
    (3, {"pp": 3, "schedule": "v-half", "chunks": 2}),
    (2, {"pp": 2, "schedule": "dualpipe-v", "chunks": 2}),
    (4, {"pp": 4, "schedule": "dualpipe-v", "chunks": 2}),
]


@pytest.mark.parametrize(("ranks", "parallel"), SCHEDULES, ids=lambda x: str(x))
def test_every_schedule_gives_one_ranks_numbers(ranks: int, parallel: dict[str, Any]) -> None:
    config = small_config()
    data = tokens(config, 3)
    want = curve(train(solo_rank(config), data))
    for own in on_threads(small_config(parallel=parallel), ranks, lambda rank: curve(train(rank, data))):
        assert deviation(own, want) <= 1e-12


@pytest.mark.parametrize("microbatches", [1, 3, 5])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_any_number_of_micro_batches(schedule: str, microbatches: int) -> None:
    config = small_config(batch={"global_batch_size": microbatches})
    data = tokens(config, 2)
    want = curve(train(solo_rank(config), data))
    parallel = {"pp": 2, "schedule": schedule}
    piped = small_config(batch={"global_batch_size": microbatches}, parallel=parallel)
    for own in on_threads(piped, 2, lambda rank: curve(train(rank, data))):
        assert deviation(own, want) <= 1e-12


class LiveGraphs:
    """Counts the forwards whose saved tensors are alive."""

    def __init__(self) -> None:
        self.alive: dict[int, weakref.WeakSet[torch.Tensor]] = {}
        self.peak = 0
        self.forward = -1

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.detach()  # a new object per saved tensor: it dies with its graph
        self.alive.setdefault(self.forward, weakref.WeakSet()).add(kept)
        self.peak = max(self.peak, sum(len(s) > 0 for s in self.alive.values()))
        return kept

    def next_forward(self) -> None:
        gc.collect()
        self.forward += 1


class Held(Observer):
    """The most forwards whose backward was not over."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._now = 0, 0

    def ended(self) -> None:
        kind = self.action.kind if self.action else None
        self._now += (kind is Kind.F) - (kind in (Kind.B, Kind.W))
        self.peak = max(self.peak, self._now)
        super().ended()


@pytest.mark.parametrize(
    ("ranks", "parallel"), [s for s in SCHEDULES if "stage_layers" not in s[1]], ids=lambda x: str(x)
)
def test_live_activations_are_the_schedules_own_count(ranks: int, parallel: dict[str, Any]) -> None:
    config = small_config(parallel=parallel)
    data = tokens(config, 1)

    gc.freeze()  # what `next_forward` collects is then what the ranks have made, not the half million objects of torch

    def measure(rank: Worker) -> tuple[int, int, int]:
        live = LiveGraphs()
        _call_before(rank, live.next_forward)
        schedule = rank.plan.schedule_for(len(micro_batches(rank, data[0])))
        rank.runtime.observer = held = Held()
        with saved_tensors_hooks(live.pack, lambda tensor: tensor):
            train(rank, data)
        return live.peak, held.peak, schedule.peak_in_flight(rank.groups.pp.rank)

    for graphs, counted, promised in on_threads(config, ranks, measure):
        assert counted == promised
        if parallel.get("schedule", "gpipe") != "gpipe":  # an input gradient frees the graph, the queue keeps operands
            assert graphs <= promised
        else:
            assert graphs == promised


def test_a_schedule_of_ones_own_holds_what_it_says() -> None:
    """Whole and split backwards of one stage, W in any order, stages 0 and 3 on the second rank."""
    parallel = {"pp": 2, "chunks": 2, "schedule": "csv", "schedule_file": str(OWN)}
    config = small_config(batch={"global_batch_size": 4}, parallel=parallel)
    data = tokens(config, 2)
    want = curve(train(solo_rank(small_config(batch={"global_batch_size": 4})), data))

    def measure(rank: Worker) -> tuple[float, int, tuple[int, ...]]:
        rank.runtime.observer = held = Held()
        own = curve(train(rank, data))
        return deviation(own, want), held.peak, tuple(rank.stages)

    (first, peak0, stages0), (second, peak1, stages1) = on_threads(config, 2, measure)
    assert max(first, second) <= 1e-12
    assert (stages0, stages1) == ((1, 2), (0, 3)) and (peak0, peak1) == (4, 6)


def test_gradients_that_are_the_last() -> None:
    """Of the small parameters in the last I, of the weights in the last W; a B before that W announces none."""
    line = "F0.0 F0.1 F0.2 I0.0 W0.0 B0.1 I0.2 W0.2".split()
    assert _last_gradients([parse_action(word) for word in line]) == {6, 7}
    assert _last_gradients([parse_action(word) for word in "F0.0 F0.1 B0.0 B0.1".split()]) == {3}
    assert _last_gradients([parse_action(word) for word in "F0.0 F0.1 I0.0 B0.1 W0.0".split()]) == {4}
    assert _last_gradients([parse_action(word) for word in "F1.0 F0.0 I0.0 B1.0 W0.0".split()]) == {2, 3, 4}


def _call_before(rank: Worker, hook: Any) -> None:
    """Call `hook` before every forward of a stage."""

    def wrapped(stage: Any, *args: Any) -> Any:
        hook()
        return stage(*args)

    _wrap(rank, wrapped)


def _wrap(rank: Worker, wrapped: Any) -> None:
    work: dict[int, StageWork] = rank.runtime._work  # type: ignore[assignment]
    for number, part in work.items():
        work[number] = replace(part, stage=partial(wrapped, part.stage))


def test_an_output_is_freed_once_it_has_been_sent() -> None:
    """A stage that waits for its backward keeps the graph of its forward, not the tensor it handed on."""
    config = small_config(parallel={"pp": 2, "schedule": "gpipe"})
    data = tokens(config, 1)

    def measure(rank: Worker) -> int:
        if rank.groups.pp.rank == 1:
            train(rank, data)
            return 0
        outputs: list[StorageWeakRef] = []
        alive = []

        def wrapped(stage: Any, *args: Any) -> torch.Tensor:
            while not all(send.done() for send in rank.runtime._sends):
                time.sleep(0.001)
            alive.append(sum(not ref.expired() for ref in outputs))
            out: torch.Tensor = stage(*args)
            outputs.append(StorageWeakRef(out.untyped_storage()))
            return out

        _wrap(rank, wrapped)
        train(rank, data)
        assert len(alive) == 8
        return max(alive)

    assert on_threads(config, 2, measure)[0] == 0


class Noted(Observer):
    """What an observer is told."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def started(self, action: Action | None) -> None:
        super().started(action)
        self.seen.append(str(self.action))

    def arrived(self) -> None:
        self.seen.append(f"input of {self.action}")

    def ended(self) -> None:
        self.seen.append(f"end of {self.action}")
        super().ended()


def test_an_observer_is_told_of_every_action_and_its_input() -> None:
    config = small_config(batch={"global_batch_size": 1}, parallel={"pp": 2})

    def body(rank: Worker) -> list[str]:
        rank.runtime.observer = noted = Noted()
        train(rank, tokens(config, 1))
        assert noted.action is None
        return noted.seen

    first, second = on_threads(config, 2, body)
    assert first[:4] == ["F0.0", "end of F0.0", "send_F0.0", "end of send_F0.0"]
    assert first[-5:] == ["B0.0", "input of B0.0", "end of B0.0", "None", "end of None"]
    assert second[2:5] == ["F1.0", "input of F1.0", "end of F1.0"]


def test_the_action_that_failed_is_known() -> None:
    rank = solo_rank(small_config())

    def broken(stage: Any, *args: Any) -> Any:
        raise RuntimeError("planted")

    _wrap(rank, broken)
    with pytest.raises(RuntimeError, match="planted"):
        train(rank, tokens(rank.plan.config, 1))
    assert str(rank.runtime.observer.action) == "F0.0"
