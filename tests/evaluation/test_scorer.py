"""The scorer: one rank's numbers and those of plain logits in every layout, for rows of any length in any order."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch

from megallama.config.errors import ConfigError
from megallama.evaluation.scorer import Interrupted, Row, Score, Scorer
from megallama.train.assemble import Worker
from tests.small import logits, on_threads, small_config, solo_rank

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"tp": 2}),
    (2, {"tp": 2, "sequence_parallel": False}),
    (2, {"pp": 2, "chunks": 2}),
    (2, {"pp": 2, "schedule": "zb-h1"}),
    (2, {}),
    (4, {"tp": 2, "pp": 2}),
    (2, {"pp": 2, "schedule": "dualpipe-v", "chunks": 2}),
    (2, {"cp": 2, "cp_exchange": "gather"}),
    (4, {"cp": 4, "cp_exchange": "heads"}),
    (8, {"cp": 2, "tp": 2, "pp": 2}),
]


def rows(seed: int = 3, count: int = 21) -> list[Row]:
    """Of 2 to 17 ids, each scored from a place of its own on; and some that begin alike, to two depths."""
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(61) for _ in range(length)]

    alone = [ids(length) for length in (2, 17, *(draw.randint(2, 17) for _ in range(count - 2)))]
    root, item, other = ids(5), ids(4), ids(3)
    ends = [(item, 1), (item, 1), (item, 4), (item, 3), (other, 5), (other, 1), ([], 4), ([], 1), (item, 8)]
    alike = [[*root, *middle, *ids(count)] for middle, count in ends]
    out = [Row(own, draw.randint(1, len(own) - 1)) for own in [*alone, *alike]]
    draw.shuffle(out)
    return [*out, out[0], out[3]]


def plain(rank: Worker, row: Row) -> Score:
    """From all logits of the row alone."""
    table = logits(rank, torch.tensor(row.ids[:-1])[None]).double()
    wanted = torch.tensor(row.ids[row.first :])
    picked = table[row.first - 1 :]
    log_probs = picked.log_softmax(1).gather(1, wanted[:, None])[:, 0]
    return Score(log_probs.detach().numpy(), (picked.argmax(1) == wanted).numpy())


def same(scores: list[Score], want: list[Score]) -> None:
    assert len(scores) == len(want)
    for one, other in zip(scores, want, strict=True):
        np.testing.assert_allclose(one.token_log_probs, other.token_log_probs, rtol=0, atol=1e-12)
        assert (one.token_greedy == other.token_greedy).all()


def short_context(rank: Worker, row: Row) -> Score:
    """Logits need rows of the full length: what is behind does not matter."""
    longest = rank.plan.config.batch.seq_length
    padded = Row([*row.ids, *[0] * (longest + 1 - len(row.ids))], row.first)
    full, count = plain(rank, padded), len(row.ids) - row.first
    return Score(full.token_log_probs[:count], full.token_greedy[:count])


@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS, ids=lambda x: str(x))
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_every_layout_gives_what_plain_logits_give(ranks: int, parallel: dict[str, Any], micro_batch: int) -> None:
    alone = solo_rank(small_config())
    want = [short_context(alone, row) for row in rows()]
    assert any(score.greedy for score in want[1:]) or any(s.token_greedy.any() for s in want)
    config = small_config(parallel=parallel, batch={"micro_batch_size": micro_batch})
    for scores in on_threads(config, ranks, lambda rank: Scorer(rank)(rows())):
        same(scores, want)


def test_order_and_company_do_not_matter() -> None:
    scorer = Scorer(solo_rank(small_config(batch={"micro_batch_size": 4})))
    given = rows()
    order = [*range(len(given))]
    random.Random(1).shuffle(order)
    together = scorer([given[i] for i in order])
    same([together[order.index(i)] for i in range(len(given))], [scorer([row])[0] for row in given])


def test_of_equal_logits_the_first_is_the_likeliest() -> None:
    config = small_config(parallel={"tp": 2})

    def tie(rank: Worker) -> list[Score]:
        for stage in rank.stages.values():
            for layer in stage.layers:
                layer.o_proj.param.weight.zero_()
            if stage.head:
                stage.head.param.weight.zero_()  # all logits are 0
        return Scorer(rank)([Row([5, 0, 1, 0], 1), Row([5, 0], 1), Row([5, 40], 1)])

    for scores in on_threads(config, 2, tie):
        assert [list(s.token_greedy) for s in scores] == [[True, False, True], [True], [False]]
        np.testing.assert_allclose(scores[0].token_log_probs, -np.log(61), rtol=1e-12)
        assert [s.greedy for s in scores] == [False, True, False]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (Row([1], 0), "row 0 has 1 ids, from 1 to 1, and scores those from 0 on"),
        (Row([1, 2], 2), "scores those from 2 on"),
        (Row([1] * 18, 1), "row 0 has 18 ids, from 1 to 1, .* and 16 fit before the last"),
        (Row([1, 61], 1), "row 0 has 2 ids, from 1 to 61, .* the model has 0 to 60"),
        (Row([-1, 3], 1), "from -1 to 3"),
    ],
    ids=["one id", "nothing scored", "too long", "above", "below"],
)
def test_rows_that_cannot_be_scored(row: Row, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Scorer(solo_rank(small_config()))([row])


def test_a_stop_on_one_rank_ends_it_on_all() -> None:
    asked = itertools.count()

    def run(rank: Worker) -> str:
        stop = (lambda: next(asked) >= 1) if rank.groups.world.rank == 1 else lambda: False
        with pytest.raises(Interrupted) as error:
            Scorer(rank, stop)(rows())
        return str(error.value)

    said = on_threads(small_config(), 2, run)
    assert said == ["evaluation stopped after 15 of 32 rows"] * 2
