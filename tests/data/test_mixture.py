"""Mixtures with changing weights, consumption, caps: exact shares in every phase, nothing twice, nothing forgotten."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase as Stage
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.errors import DataError
from megallama.config.load import load, resolve
from megallama.config.schema import Config
from megallama.data.loader import Loader
from megallama.data.mixture import Mixture, Phase, phases_of
from megallama.data.sources import TrainDataset, open_sources
from megallama.data.writer import IndexedWriter

NAMES = ["web", "code", "books", "wiki"]
weights = st.one_of(st.just(0.0), st.integers(1, 9), st.floats(0.05, 1))
phase = st.tuples(st.integers(1, 400), st.lists(weights, min_size=4, max_size=4).filter(any))


@settings(deadline=None, max_examples=40, phases=(Stage.explicit, Stage.generate))
@given(parts=st.lists(phase, min_size=1, max_size=4), first=st.integers(0, 10**9))
def test_every_phase_is_exact_and_no_source_skips_or_repeats(parts: list[tuple[int, list[float]]], first: int) -> None:
    at, phases = 0, []
    for number, (length, given_weights) in enumerate(parts):
        phases.append(Phase(number + 1, at, dict(zip(NAMES, given_weights, strict=True))))
        at += length if number else first + length  # also with a long first phase
    mixture = Mixture(NAMES, phases)
    counts = [0] * 4
    for begin, end in zip([p.sample for p in phases], [*(p.sample for p in phases[1:]), at], strict=True):
        before, start = mixture.counts(begin), max(begin, end - 500)
        shares = [Fraction(str(phases[number_of(phases, begin)].weights[name])) for name in NAMES]
        counts = mixture.counts(start)
        for n, (source, index) in enumerate(mixture.locate(np.arange(start, end)).T.tolist(), start):
            assert index == counts[source], n  # consecutive within the source, over the changes too
            counts[source] += 1
            for share, now, then in zip(shares, counts, before, strict=True):
                assert abs((now - then) - share / sum(shares) * (n + 1 - begin)) < 1
        assert counts == mixture.counts(end) and sum(counts) == end


def number_of(phases: list[Phase], sample: int) -> int:
    return next(i for i, p in enumerate(phases) if p.sample == sample)


def test_neither_the_order_of_the_list_nor_of_the_questions_matters() -> None:
    ours = [Phase(1, 0, {"web": 0.7, "code": 0.2, "wiki": 0.1}), Phase(9, 1000, {"web": 0.1, "code": 0.2, "wiki": 0.7})]
    one, two = Mixture(["web", "code", "wiki"], ours), Mixture(["wiki", "web", "code"], ours)
    numbers = np.random.default_rng(0).permutation(2000)
    straight = one.locate(np.arange(2000))
    shuffled = two.locate(numbers)
    assert np.array_equal(np.array([1, 2, 0])[straight[0, numbers]], shuffled[0])
    assert np.array_equal(straight[1, numbers], shuffled[1])
    assert one.counts(1500) == [700 + 50, 200 + 100, 100 + 350]


def test_seven_sources_of_a_long_run_cost_nothing_to_start() -> None:
    share = dict(zip("abcdefg", [67.0, 15.0, 4.5, 4.5, 4.5, 2.5, 2.0], strict=True))
    start = time.perf_counter()
    mixture = Mixture(list(share), [Phase(1, 0, share), Phase(250_001, 512_000_000, {**share, "a": 30.0})])
    mixture.locate(np.arange(683_000_000, 683_002_048))
    assert time.perf_counter() - start < 0.1
    assert sum(part[0]._block[1].nbytes for part in mixture._parts) < 20_000


# ---- with files ----


def corpus(prefix: Path, tokens: int, low: int = 0) -> Path:
    """Documents of 10 tokens, token i is low + i."""
    with IndexedWriter(prefix, np.dtype("<i4")) as writer:
        writer.add(np.arange(low, low + tokens), np.full(tokens // 10, 10))
    return prefix


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """a: 100 sequences of 10 tokens, b: 50, c: 30."""
    sizes = {"a": 1010, "b": 510, "c": 310}
    return {name: corpus(tmp_path / name, size, 10_000 * i) for i, (name, size) in enumerate(sizes.items())}


def config(files: dict[str, Path], shares: dict[str, float], **sections: dict[str, Any]) -> Config:
    given = sections.pop("source", {})
    train = [{"path": str(files[name]), "weight": w, **given.get(name, {})} for name, w in shares.items()]
    base: dict[str, dict[str, Any]] = {
        "batch": {"seq_length": 10, "micro_batch_size": 1, "global_batch_size": 4},
        "model": {"vocab_size": 30_000},
        "train": {"seed": 7},
        "data": {"train": train},
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}
    return resolve(Config.model_validate(merged))


def train_data(files: dict[str, Path], shares: dict[str, float], **sections: dict[str, Any]) -> TrainDataset:
    train = open_sources(config(files, shares, **sections)).train
    assert isinstance(train, TrainDataset)
    return train


def change(step: int, **shares: float) -> dict[str, Any]:
    return {"step": step, "weights": shares}


def test_a_change_repeats_no_document_of_an_unfinished_epoch(files: dict[str, Path]) -> None:
    ramp = {"ramp_start": 2, "ramp_increment": 1, "ramp_samples": 12}
    given = config(files, {"a": 0.9, "b": 0.1, "c": 0.0}, batch=ramp)
    changes = [change(11, a=0.2, b=0.8), change(26, a=0.5, b=0.25, c=0.25)]
    data = {**given.data.model_dump(), "mixture_schedule": changes}
    given = Config.model_validate(given.model_dump() | {"data": data})
    train = open_sources(given).train
    assert isinstance(train, TrainDataset)
    steps = given.batch
    firsts = [steps.samples_after(10), steps.samples_after(25)]
    assert [p.sample for p in train.mixture.phases] == [0, *firsts] and firsts[0] < 40
    total = steps.samples_after(40)
    rows = train.read(range(total)).tokens[:, 0]
    for low, sequences in ((0, 100), (10_000, 50), (20_000, 30)):
        own = rows[(rows >= low) & (rows < low + 10_000)]
        for epoch in range(0, len(own), sequences):
            part = own[epoch : epoch + sequences]
            assert len(np.unique(part)) == len(part)
    assert not (rows[: firsts[1]] >= 20_000).any() and (rows[firsts[1] :] >= 20_000).sum() in (15, 16)


@settings(deadline=None, max_examples=30)
@given(
    dp=st.sampled_from([1, 2, 3, 6]), micro=st.sampled_from([1, 2]), prefetch=st.integers(0, 3),
    start=st.integers(0, 20), length=st.integers(1, 6),
)  # fmt: skip
def test_the_order_is_the_same_for_any_ranks_workers_start_and_length(
    shared: TrainDataset, dp: int, micro: int, prefetch: int, start: int, length: int
) -> None:
    """The tokens of the global batches, put together from what every rank's loader delivers."""
    given = Config.model_validate({"batch": {"micro_batch_size": micro, "global_batch_size": 12, "seq_length": 10}})
    expected = shared.read(range(12 * start, 12 * (start + length))).tokens.reshape(length, 12, 11)
    found = np.zeros_like(expected)
    for rank in range(dp):

        def ids(step: int, rank: int = rank) -> list[range]:
            return given.batch.sample_ids(12 * step, 12, dp, rank)

        with Loader(shared.read, ids, start_step=start, stop_step=start + length, prefetch=prefetch) as loader:
            for at, batches in enumerate(loader):
                for m, batch in enumerate(batches):
                    rows = [i - 12 * (start + at) for i in ids(start + at, rank)[m]]
                    found[at, rows, :-1], found[at, rows, -1] = batch.tokens.numpy(), batch.labels[:, -1].numpy()
    assert np.array_equal(found, expected)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> TrainDataset:
    folder = tmp_path_factory.mktemp("shared")
    files = {"a": corpus(folder / "a", 1010), "b": corpus(folder / "b", 510, 10_000)}
    return train_data(files, {"a": 0.6, "b": 0.4})


# ---- resuming ----


def saved(train: TrainDataset, samples: int) -> dict[str, Any]:
    return json.loads(json.dumps(train.state(samples)))  # type: ignore[no-any-return]


def refused(train: TrainDataset, state: dict[str, Any], step: int = 10) -> str:
    with pytest.raises(DataError) as error:
        train.resume(state, step, 4 * step)
    return str(error.value)


def with_changes(files: dict[str, Path], shares: dict[str, float], *changes: dict[str, Any]) -> TrainDataset:
    data = config(files, shares).data.model_dump()
    return train_data(files, shares, data={**data, "mixture_schedule": changes})


def test_a_resumed_run_goes_on_in_the_same_order(files: dict[str, Path]) -> None:
    first = with_changes(files, {"a": 0.7, "b": 0.3}, change(5, a=0.3, b=0.7))
    state = saved(first, 40)
    assert [(s["name"], s["samples"], s["epochs"]) for s in state["sources"]] == [("a", 18, 0.18), ("b", 22, 0.44)]
    assert state["mixture"] == [
        {"step": 1, "sample": 0, "weights": {"a": 0.7, "b": 0.3}},
        {"step": 5, "sample": 16, "weights": {"a": 0.3, "b": 0.7}},
    ]
    again = with_changes(files, {"b": 0.3, "a": 0.7}, change(5, a=0.3, b=0.7), change(11, a=1.0))
    again.resume(state, 10, 40)
    assert [p.sample for p in again.mixture.phases] == [0, 16, 40]
    assert np.array_equal(again.read(range(40)).tokens, first.read(range(40)).tokens)
    assert again.consumption(40) == first.consumption(40)


def test_a_change_at_the_very_step_of_the_checkpoint_is_made_once(files: dict[str, Path]) -> None:
    """Step 10 is the last one made and the first with new weights; step 11 is still to come."""
    for step, firsts in ((10, [0, 36]), (11, [0, 40])):
        again = with_changes(files, {"a": 0.7, "b": 0.3}, change(step, a=0.1))
        again.resume(saved(again, 40), 10, 40)
        assert [p.sample for p in again.mixture.phases] == firsts


def test_a_new_source_joins_with_a_change(files: dict[str, Path]) -> None:
    first = train_data(files, {"a": 0.7, "b": 0.3})
    again = with_changes(files, {"a": 0.7, "b": 0.3, "c": 0.0}, change(11, a=0.5, c=0.2))
    again.resume(saved(first, 40), 10, 40)
    assert again.consumption(40)["c"]["samples"] == 0 and again.consumption(140)["c"]["samples"] == 20
    assert np.array_equal(again.read(range(40)).tokens, first.read(range(40)).tokens)


def test_another_batch_size_moves_only_the_changes_to_come(files: dict[str, Path]) -> None:
    """Resumed with batches of 8 instead of 4: what was is kept, step 13 begins 16 samples later."""
    first = with_changes(files, {"a": 0.7, "b": 0.3}, change(5, a=0.3, b=0.7), change(13, a=1.0))
    data = first._config.model_dump()
    again = train_data(files, {}, data=data, batch={"seq_length": 10, "micro_batch_size": 1, "global_batch_size": 8})
    again.resume(saved(first, 40), 10, 40)
    assert [p.sample for p in again.mixture.phases] == [0, 16, 56]
    assert again.consumption(40) == first.consumption(40)


def test_weights_edited_without_a_change_are_refused_with_what_to_write(files: dict[str, Path]) -> None:
    state = saved(with_changes(files, {"a": 0.7, "b": 0.3}, change(5, a=0.6, b=0.4)), 40)
    edited = with_changes(files, {"a": 0.5, "b": 0.5, "c": 0.25}, change(20, c=0.1))
    text = refused(edited, state)
    assert text == (
        "the weights of data.train and data.mixture_schedule are not those of the 10 steps that were made: they were "
        "{a = 0.7, b = 0.3} from step 1, {a = 0.6, b = 0.4} from step 5, now they say {a = 0.5, b = 0.5, c = 0.25} "
        "from step 1. What is past cannot change; keep in data.train the weights {a = 0.7, b = 0.3, c = 0.0} and write "
        "data.mixture_schedule=[{step = 5, weights = {a = 0.6, b = 0.4, c = 0.0}}, "
        "{step = 11, weights = {a = 0.5, b = 0.5, c = 0.25}}, {step = 20, weights = {a = 0.5, b = 0.5, c = 0.1}}]"
    )
    advice = text.rpartition("write ")[2]
    names = [f'{{path="{files[n]}", weight={w}}}' for n, w in {"a": 0.7, "b": 0.3, "c": 0.0}.items()]
    loaded = load(None, [f"data.train=[{', '.join(names)}]", advice, "batch.seq_length=10", "batch.global_batch_size=4",
                         "train.seed=7", "model.vocab_size=30000"])  # fmt: skip
    train = open_sources(loaded).train
    assert isinstance(train, TrainDataset)
    train.resume(state, 10, 40)  # what it says to write is accepted
    assert [p.step for p in train.mixture.phases] == [1, 5, 11, 20]


def test_a_past_change_that_was_removed_or_moved_is_refused(files: dict[str, Path]) -> None:
    state = saved(with_changes(files, {"a": 0.7, "b": 0.3}, change(5, a=0.6, b=0.4)), 40)
    hint = "write data.mixture_schedule=[{step = 5, weights = {a = 0.6, b = 0.4}}"
    assert refused(train_data(files, {"a": 0.7, "b": 0.3}), state).endswith(
        f"{hint}, {{step = 11, weights = {{a = 0.7, b = 0.3}}}}]"
    )
    moved = with_changes(files, {"a": 0.7, "b": 0.3}, change(6, a=0.6, b=0.4))
    assert refused(moved, state).endswith(f"{hint}]")


def test_a_source_that_was_used_must_stay(files: dict[str, Path]) -> None:
    state = saved(train_data(files, {"a": 0.7, "b": 0.3}), 40)
    assert refused(train_data(files, {"a": 1.0}), state) == (
        f'data.train has no source "b" ({files["b"]}), of which this run used 12 samples; keep it, and take no more of '
        "it with data.mixture_schedule=[{step = 11, weights = {b = 0.0}}]"
    )


def test_files_that_were_replaced_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    state = saved(train_data(files, {"a": 0.7, "b": 0.3}), 40)
    corpus(files["b"], 510, 5)  # as large, other tokens
    text = refused(train_data(files, {"a": 0.7, "b": 0.3}), state)
    assert text.startswith(f'data.train source "b": {files["b"]}.bin/.idx is not what this run was trained on (sha256 ')
    corpus(files["b"], 510, 10_000)
    train_data(files, {"a": 0.7, "b": 0.3}).resume(state, 10, 40)  # put back
    moved = {"a": corpus(tmp_path / "elsewhere" / "a", 1010), "b": files["b"]}
    train_data(moved, {"a": 0.7, "b": 0.3}).resume(state, 10, 40)  # another place, the same content
    part = train_data(files, {"a": 0.7, "b": 0.3}, source={"a": {"documents": (0.0, 0.5)}})
    assert "(used documents 101, now 50)" in refused(part, state)


@pytest.mark.parametrize("key, sections", [
    ("train.seed=8", {"train": {"seed": 8}}),
    ("batch.seq_length=20", {"batch": {"seq_length": 20, "global_batch_size": 4}}),
])  # fmt: skip
def test_what_would_change_the_order_is_refused(files: dict[str, Path], key: str, sections: dict[str, Any]) -> None:
    state = saved(train_data(files, {"a": 0.7, "b": 0.3}), 40)
    name = key.partition("=")[0]
    was = {"train.seed": 7, "batch.seq_length": 10}[name]
    assert refused(train_data(files, {"a": 0.7, "b": 0.3}, **sections), state) == (
        f"{key} would change the order of the samples, 40 of which were used with {name}={was}; write {name}={was}, or "
        "begin another run from these weights with checkpoint.weights_from and a new run.folder"
    )


def test_a_ledger_that_does_not_add_up_is_refused(files: dict[str, Path]) -> None:
    state = saved(train_data(files, {"a": 0.7, "b": 0.3}), 40)
    state["sources"][1]["samples"] = 13
    assert 'says that source "b" gave 13 samples, its weights give 12' in refused(
        train_data(files, {"a": 0.7, "b": 0.3}), state
    )


def test_a_checkpoint_without_a_ledger_is_taken_as_it_is(files: dict[str, Path]) -> None:
    train_data(files, {"a": 0.5, "b": 0.5}).resume({"step": 3}, 10, 40)


# ---- caps ----


def test_the_step_at_which_a_cap_would_be_passed(files: dict[str, Path]) -> None:
    """b gives 2 of 4 samples of a step: 1.5 epochs are 75 samples; step 38 would be the first with 76."""
    given = {"source": {"b": {"max_epochs": 1.5}}}
    train = train_data(files, {"a": 0.5, "b": 0.5}, **given)
    assert train.last_step(37) == (37, "")
    assert train.consumption(4 * 37)["b"]["samples"] == 74
    with pytest.raises(DataError) as error:
        train.last_step(100)
    assert str(error.value) == (
        'step 38 would take source "b" to 1.52 epochs, over max_epochs=1.5 (all of train.steps=100: 4); '
        'use train.steps=37, data.on_exhausted="stop", a larger max_epochs, or a smaller weight (from some step on: '
        "data.mixture_schedule)"
    )
    data = {**config(files, {"a": 0.5, "b": 0.5}, **given).data.model_dump(), "on_exhausted": "stop"}
    stopping = train_data(files, {}, data=data)
    assert stopping.last_step(100) == (37, 'step 38 would take source "b" to 1.52 epochs, over max_epochs=1.5')
    assert stopping.last_step(37) == (37, "")


def test_a_cap_reached_to_the_sample_is_not_passed_and_the_first_of_two_counts(files: dict[str, Path]) -> None:
    """Each gives 2 samples of a step: a may give 60, b 50."""
    train = train_data(files, {"a": 0.5, "b": 0.5}, source={"a": {"max_epochs": 0.6}, "b": {"max_epochs": 1.0}})
    assert train.last_step(25) == (25, "") and train.consumption(4 * 25)["b"]["epochs"] == 1
    with pytest.raises(DataError, match=r'^step 26 would take source "b" to 1.04 epochs, over max_epochs=1 '):
        train.last_step(100)


def test_a_cap_below_the_first_step_is_an_error_either_way(files: dict[str, Path]) -> None:
    data = config(files, {"a": 0.5, "c": 0.5}, source={"c": {"max_epochs": 0.01}}).data.model_dump()
    with pytest.raises(DataError, match=r"^step 1 would take .*; use a larger max_epochs, or a smaller weight"):
        train_data(files, {}, data={**data, "on_exhausted": "stop"}).last_step(5)


def test_caps_count_over_changes(files: dict[str, Path]) -> None:
    data = config(files, {"a": 0.5, "b": 0.5}, source={"b": {"max_epochs": 1.0}}).data.model_dump()
    train = train_data(files, {}, data={**data, "mixture_schedule": [change(21, b=0.0)], "on_exhausted": "stop"})
    assert train.last_step(500) == (500, "") and train.consumption(2000)["b"]["epochs"] == 0.8


def test_phases_follow_the_ramp() -> None:
    given = load(None, ["data.train=['a', 'b']", "data.mixture_schedule=[{step=3, weights={a=2}}]",
                        "batch.global_batch_size=32", "batch.ramp_start=8", "batch.ramp_increment=8",
                        "batch.ramp_samples=30"])  # fmt: skip
    assert [(p.sample, dict(p.weights)) for p in phases_of(given.data, given.batch.samples_after)] == [
        (0, {"a": 1.0, "b": 1.0}), (16, {"a": 2.0, "b": 1.0})
    ]  # fmt: skip
