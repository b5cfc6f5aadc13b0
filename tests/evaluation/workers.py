"""What the ranks of a pool do to evaluate a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megallama.comm.launch import World
from megallama.data.tokenizer import load_tokenizer
from megallama.evaluation.evaluate import check, evaluation_config, open_on, read_texts
from megallama.evaluation.harness import Encoder, read_items, score_items


def score(world: World, folder: Path, words: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Of the items in the folder, log p [nats] of every choice, and the metrics by item."""
    model = open_on(world, folder, evaluation_config(folder, words, world.world_size), lambda text: None)
    encoder = Encoder(load_tokenizer(folder), model.scorer.longest, False, None)
    items = read_items(folder / "items.jsonl")
    rows = [encoder.row(item.context, choice) for item in items for choice in item.choices]
    log_probs = np.array([s.log_prob for s in model.scorer(rows)])
    return log_probs, score_items(model.scorer, encoder, items, answer=True)


def contaminated(world: World, folder: Path, data: Sequence[str]) -> dict[str, Any]:
    """What `check` says of the folder's items and these files."""
    items, tokenizer = read_items(folder / "items.jsonl"), load_tokenizer(folder)
    asked = {"items": [[f"{item.context}{item.choices[item.gold]}"] for item in items]}
    results: dict[str, Any] = {"items": {"items": {"acc": [0.0] * len(items)}}, "n-shot": {"items": 0}}
    texts = read_texts([folder / name for name in data], str, "text", None, lambda text: None)
    return dict(check(results, asked, texts, tokenizer, world.group))
