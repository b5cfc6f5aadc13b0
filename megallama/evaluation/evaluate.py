"""One evaluation: what was asked for, on all ranks; a table, and a file of results."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime

import megallama
from megallama.config.errors import DataError
from megallama.data.tokenizer import Tokenizer, load_tokenizer, sha256_of
from megallama.evaluation.harness import run_tasks
from megallama.evaluation.items import Encoder, read_items, score_items, start_of
from megallama.evaluation.ranks import Opened, opened
from megallama.evaluation.request import Request
from megallama.evaluation.results import Results, aligned, table, take, write_results
from megallama.evaluation.texts import read_texts, score_texts
from megallama.inference.generate import adds_bos


def evaluate(request: Request, show: Callable[[str], None], say: Callable[[str], None]) -> Results:
    """Score all that was asked for and `show` the table; on every rank the same results. Raises: MegallamaError."""
    request.check()
    items = {path.stem: read_items(path)[: request.limit] for path in request.items}
    with opened(request.checkpoint, request.settings, request.context, say) as model:
        first = model.world.rank == 0
        tell = say if first else lambda text: None
        tokenizer = _tokenizer(request, model)
        results = _about(request, model, tokenizer)
        if request.data:
            texts = read_texts(request.data, tokenizer, request.json_key, request.limit, tell)
            results["texts"] = score_texts(model.scorer, texts, start_of(tokenizer))
        if items or request.tasks:
            if tokenizer is None:
                raise DataError(f"{model.folder} has no tokenizer; give --tokenizer")
            encoder = Encoder(tokenizer, model.scorer.longest, adds_bos(model.folder, tokenizer.path))
            for name, own in items.items():
                began = time.monotonic()
                values = score_items(model.scorer, encoder, own)
                take(results, name, values, 0, time.monotonic() - began)
                results["task_hashes"][name] = hashlib.sha256(str(own).encode()).hexdigest()
            if request.tasks:
                run_tasks(results, request, model, encoder, tell)
        if first:
            _show(results, show)
            if request.output:
                write_results(request.output, results)
                say(f"results are in {request.output}")
    return results


def _tokenizer(request: Request, model: Opened) -> Tokenizer | None:
    if request.tokenizer:
        return load_tokenizer(request.tokenizer)
    with suppress(DataError):
        return load_tokenizer(model.folder)
    return None


def _about(request: Request, model: Opened, tokenizer: Tokenizer | None) -> Results:
    """The head of the results, by lm-evaluation-harness's names where it has one."""
    config, keys = model.config, ("n-shot", "n-samples", "task_hashes", "items", "texts", "seconds")
    settings, parallel = list(request.settings), config.parallel.model_dump(mode="json")
    about: Results = {"model": "megallama", "model_args": str(model.folder), "limit": request.limit}
    about |= {"seed": request.seed, "settings": settings, "parallel": parallel, "dtype": config.precision.dtype}
    about |= {"ranks": model.world.world_size, "context": model.scorer.longest}
    about |= {"tokenizer_sha256": sha256_of(tokenizer.path) if tokenizer else None}
    head = {"config": about, "megallama_version": megallama.__version__, "date": datetime.now().timestamp()}
    return {name: {} for name in ("results", "configs", "versions", *keys)} | head


def _show(results: Results, show: Callable[[str], None]) -> None:
    if texts := results["texts"]:
        heads = ["text", "loss", "perplexity", "bits per byte", "tokens", "documents"]  # loss: nats per token
        keys = ["loss", "perplexity", "bits_per_byte"]
        rows = [[name, *("-" if own[k] is None else f"{own[k]:.4f}" for k in keys)] for name, own in texts.items()]
        for row, own in zip(rows, texts.values(), strict=True):
            row += [f"{own['tokens']:,}", f"{own['documents']:,}"]
        show("\n".join(aligned([heads, *rows])))
        buckets = list(dict.fromkeys(bucket for own in texts.values() for bucket in own["loss_by_position"]))
        rows = [
            [name, *(f"{at[b]:.3f}" if b in (at := own["loss_by_position"]) else "" for b in buckets)]
            for name, own in texts.items()
        ]
        show("\n".join(aligned([["loss by tokens before", *buckets], *rows])))
    if results["results"]:
        show("\n".join(table(results)))
