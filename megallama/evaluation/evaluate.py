"""One evaluation: what was asked for, on all ranks; a table, and a file of results."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import datetime

import megallama
from megallama.config.errors import DataError
from megallama.data.tokenizer import Tokenizer, load_tokenizer, sha256_of
from megallama.evaluation.contamination import check, trained_on
from megallama.evaluation.harness import Request, Tasks
from megallama.evaluation.items import Encoder, start_of
from megallama.evaluation.ranks import Opened, opened
from megallama.evaluation.results import Results, aligned, table, write_results
from megallama.evaluation.texts import read_texts, score_texts
from megallama.inference.generate import adds_bos


def evaluate(request: Request, show: Callable[[str], None], say: Callable[[str], None]) -> Results:
    """Score all that was asked for and `show` the table; on every rank the same results. Raises: MegallamaError."""
    request.check()
    with opened(request.checkpoint, request.settings, request.context, say) as model:
        first, tokenizer = model.world.rank == 0, None
        tell = say if first else lambda text: None
        with nullcontext() if request.tokenizer else suppress(DataError):
            tokenizer = load_tokenizer(request.tokenizer or model.folder)
        searched = request.check_contamination
        searched = trained_on(model.folder) if searched == () else searched
        results = _about(request, model, tokenizer)
        if request.data:
            encode = tokenizer.encode if tokenizer else None
            texts = read_texts(request.data, encode, request.json_key, request.limit, tell)
            results["texts"] = score_texts(model.scorer, texts, start_of(tokenizer))
        if request.items or request.tasks:
            if tokenizer is None:
                raise DataError(f"{model.folder} has no tokenizer; give --tokenizer")
            bos = adds_bos(model.folder, tokenizer.path)
            encoder = Encoder(tokenizer, model.scorer.longest, bos, start_of(tokenizer))
            tasks = Tasks(request, encoder, tell)
            tasks.run(results, model.scorer, model.answers)
            if searched and tasks.asked:
                documents = read_texts(searched, str, request.json_key, None, tell)
                results["contamination"] = check(results, tasks.asked, documents, tokenizer, model.world.group)
        if first:
            _show(results, show)
            if request.output:
                write_results(request.output, results)
                say(f"results are in {request.output}")
    return results


def _about(request: Request, model: Opened, tokenizer: Tokenizer | None) -> Results:
    """The head of the results, by lm-evaluation-harness's names where it has one."""
    config, keys = model.config, ("n-shot", "n-samples", "task_hashes", "items", "texts", "seconds")
    about: Results = {"model": "megallama", "model_args": str(model.folder), "limit": request.limit}
    about |= {"seed": request.seed, "settings": [*request.settings], "dtype": config.precision.dtype}
    about |= {"parallel": config.parallel.model_dump(mode="json"), "ranks": model.world.world_size}
    about |= {"context": model.scorer.longest, "tokenizer_sha256": tokenizer and sha256_of(tokenizer.path)}
    head = {"config": about, "megallama_version": megallama.__version__, "date": datetime.now().timestamp()}
    return {name: {} for name in ("results", "configs", "versions", *keys)} | head


def _show(results: Results, show: Callable[[str], None]) -> None:
    if texts := results["texts"]:
        rows = [["text", "loss", "perplexity", "bits per byte", "tokens", "documents"]]  # loss: nats per token
        form = {"loss": ".4f", "perplexity": ".4f", "bits_per_byte": ".4f", "tokens": ",", "documents": ","}
        for name, own in texts.items():
            rows.append([name, *("-" if own[key] is None else format(own[key], as_) for key, as_ in form.items())])
        show("\n".join(aligned(rows)))
        by = {name: own["loss_by_position"] for name, own in texts.items()}
        buckets = [*dict.fromkeys(bucket for at in by.values() for bucket in at)]
        rows = [[name, *(f"{at[b]:.3f}" if b in at else "" for b in buckets)] for name, at in by.items()]
        show("\n".join(aligned([["loss by tokens before", *buckets], *rows])))
    for own in (results, results.get("contamination", {})):
        if own.get("results"):
            show("\n".join(table(own)))
