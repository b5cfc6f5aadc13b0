"""One evaluation: what was asked for, on all ranks; a table, and a file of results."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import megallama
from megallama.config.errors import ConfigError, DataError
from megallama.data.tokenizer import Tokenizer, load_tokenizer, sha256_of
from megallama.evaluation.items import Encoder, read_items, score_items
from megallama.evaluation.ranks import Opened, opened
from megallama.evaluation.results import Results, aligned, table, take, write_results
from megallama.evaluation.texts import read_texts, score_texts
from megallama.inference.generate import adds_bos

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What `megallama evaluate` was asked for; its options have the same names."""

    checkpoint: Path
    settings: tuple[str, ...] = ()
    data: tuple[Path, ...] = ()
    items: tuple[Path, ...] = ()
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    shots: int | None = None
    limit: int | None = None
    context: int = 0
    json_key: str = "text"
    tokenizer: Path | None = None
    seed: int = 1234
    output: Path | None = None

    def check(self) -> None:
        """Raises: ConfigError, before anything is loaded."""
        if not (self.data or self.items or self.tasks):
            raise ConfigError("nothing to evaluate on; give --data, --items or --tasks")
        for name, value, least in (("limit", self.limit, 1), ("shots", self.shots, 0), ("context", self.context, 0)):
            if value is not None and value < least:
                raise ConfigError(f"--{name}={value} is too small; write {least} or more")
        stems = [path.stem for path in self.items]
        if twice := next((stem for stem in stems if stems.count(stem) > 1 or stem in self.tasks), None):
            raise ConfigError(f"two tasks would be called {twice!r}; rename one of the files of --items")
        for path in (*self.data, *self.items):
            if not (path.exists() or Path(f"{path}.idx").exists() or "*" in str(path)):
                raise DataError(f"{path} does not exist; name files that are there")


def evaluate(request: Request, show: Say, say: Say) -> Results:
    """Score all that was asked for and `show` the table; on every rank the same results. Raises: MegallamaError."""
    request.check()
    items = {path.stem: read_items(path)[: request.limit] for path in request.items}
    with opened(request.checkpoint, request.settings, request.context, say) as model:
        first = model.world.rank == 0
        tokenizer = _tokenizer(request, model)
        results = _about(request, model, tokenizer)
        if request.data:
            _texts(results, request, model, tokenizer, say if first else lambda text: None)
        if items or request.tasks:
            if tokenizer is None:
                raise DataError(f"{model.folder} has no tokenizer; give --tokenizer")
            encoder = Encoder(tokenizer, model.scorer.longest, adds_bos(model.folder, tokenizer.path))
            for name, own in items.items():
                began = time.monotonic()
                values = score_items(model.scorer, encoder, own)
                take(results, name, values, 0, time.monotonic() - began)
                text = json.dumps([[i.context, i.choices, i.gold] for i in own])
                results["task_hashes"][name] = hashlib.sha256(text.encode()).hexdigest()
            if request.tasks:
                from megallama.evaluation.harness import run_tasks

                run_tasks(results, request, model.scorer, encoder, say if first else lambda text: None)
        if first:
            _show(results, show)
            if request.output:
                write_results(request.output, results)
                say(f"results are in {request.output}")
    return results


def _tokenizer(request: Request, model: Opened) -> Tokenizer | None:
    try:
        return load_tokenizer(request.tokenizer or model.folder)
    except DataError:
        if request.tokenizer:
            raise
        return None


def _about(request: Request, model: Opened, tokenizer: Tokenizer | None) -> Results:
    """The head of the results, by lm-evaluation-harness's names where it has one."""
    config = model.config
    return {
        "results": {}, "configs": {}, "versions": {}, "n-shot": {}, "n-samples": {}, "task_hashes": {}, "items": {},
        "texts": {}, "seconds": {},
        "config": {
            "model": "megallama", "model_args": str(model.folder), "limit": request.limit, "seed": request.seed,
            "settings": list(request.settings), "dtype": config.precision.dtype, "ranks": model.world.world_size,
            "parallel": config.parallel.model_dump(mode="json"), "context": model.scorer.longest,
            "tokenizer_sha256": sha256_of(tokenizer.path) if tokenizer else None,
        },
        "megallama_version": megallama.__version__, "date": time.time(),
    }  # fmt: skip


def _texts(results: Results, request: Request, model: Opened, tokenizer: Tokenizer | None, say: Say) -> None:
    ends = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None] if tokenizer else []
    texts = read_texts(request.data, tokenizer, request.json_key, request.limit, say)
    results["texts"] = score_texts(model.scorer, texts, ends[0] if ends else None)


def _show(results: Results, show: Say) -> None:
    if texts := results["texts"]:
        heads = ["text", "loss", "perplexity", "bits per byte", "tokens", "documents"]  # loss: nats per token
        keys = ["loss", "perplexity", "bits_per_byte"]
        rows = [
            [
                name,
                *("-" if own[k] is None else f"{own[k]:.4f}" for k in keys),
                f"{own['tokens']:,}",
                f"{own['documents']:,}",
            ]
            for name, own in texts.items()
        ]
        show("\n".join(aligned([heads, *rows])))
        buckets = list(dict.fromkeys(bucket for own in texts.values() for bucket in own["loss_by_position"]))
        rows = [
            [name, *(f"{at[b]:.3f}" if b in (at := own["loss_by_position"]) else "" for b in buckets)]
            for name, own in texts.items()
        ]
        show("\n".join(aligned([["loss by tokens before", *buckets], *rows])))
    if results["results"]:
        show("\n".join(table(results)))
