"""One checkpoint in six layouts: log-likelihoods to 1e-10, and every decision the same."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.test_evaluate import named_byte_tokenizer
from tests.inference.test_generate import reference
from tests.pool import Pool

WORDS = "a the one two cat dog sat ran barks flies over under mat sky blue green".split()
LAYOUTS = {
    "tp2": (2, ["parallel.tp=2"]),
    "pp2-chunks": (2, ["parallel.pp=2", "parallel.chunks=2"]),
    "zero-bubble": (2, ["parallel.pp=2", "parallel.schedule=zb-h1"]),
    "dp2": (2, []),
    "tp2-pp2": (4, ["parallel.tp=2", "parallel.pp=2"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, draw = tmp_path_factory.mktemp("layouts"), random.Random(4)
    reference(path, vocab_size=258, bos_token_id=256, eos_token_id=257, num_hidden_layers=4)
    named_byte_tokenizer(path)

    def text(most: int) -> str:
        return "".join(f" {draw.choice(WORDS)}" for _ in range(draw.randint(1, most)))

    items = [{"context": text(7)[1:], "choices": [text(3) for _ in "abcd"], "gold": i % 4} for i in range(40)]
    (path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_six_layouts_agree(pool: Pool, folder: Path) -> None:
    fp64 = ["precision.dtype=fp64"]
    ((want, metrics),) = pool.run(1, "tests.evaluation.workers:score", folder, fp64)
    assert len(want) == 160 and len(np.unique(want)) > 150
    assert 0 < metrics["acc"].mean() < 1 and set(metrics) == {"acc", "acc_norm", "acc_answer", "bits_per_byte"}
    for name, (ranks, words) in LAYOUTS.items():
        for found, own in pool.run(ranks, "tests.evaluation.workers:score", folder, [*fp64, *words]):
            assert np.abs(found - want).max() <= 1e-10, name
            for metric in ("acc", "acc_norm", "acc_answer"):
                assert (own[metric] == metrics[metric]).all(), (name, metric)
            np.testing.assert_allclose(own["bits_per_byte"], metrics["bits_per_byte"], rtol=0, atol=1e-10)
