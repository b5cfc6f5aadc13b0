"""One evaluation: the weights on all ranks, in any layout, under any launcher; what was asked for; a table."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import megallama
from megallama.checkpoint import disk, reader
from megallama.checkpoint.huggingface import read_model_config
from megallama.checkpoint.manager import CheckpointManager
from megallama.comm.group import on_all_ranks
from megallama.comm.launch import World, cuda_environment, detect_launch, start
from megallama.config.describe import literal
from megallama.config.errors import ConfigError, DataError, LaunchError
from megallama.config.load import load, to_toml
from megallama.config.schema import Config
from megallama.data.tokenizer import Tokenizer, load_tokenizer, sha256_of
from megallama.evaluation.harness import Encoder, Request, Tasks, start_of
from megallama.evaluation.results import Results, aligned, table, write_results
from megallama.evaluation.scorer import Scorer
from megallama.evaluation.texts import check, read_texts, score_texts, trained_on
from megallama.inference.generate import MAX_CONTEXT, Sampling, adds_bos, find_model, generate_batch, load_llama
from megallama.plan.plan import make_plan
from megallama.train.assemble import DTYPES, assemble, kernels_of, same_kernels

Question = tuple[list[int], tuple[str, ...], int]  # a prompt, strings that end the answer, most tokens
TOKENS = 4096  # of a micro-batch, unless batch.micro_batch_size says otherwise
FORMATS = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Opened(NamedTuple):
    """A model that all ranks have before them."""

    scorer: Scorer
    world: World
    folder: Path  # a Hugging Face folder
    config: Config

    def answers(self, asked: Sequence[Question], tokenizer: Tokenizer) -> list[str]:
        """What the model says to each prompt, greedily, up to a stop string; each rank has the whole model for it."""
        llama, said = load_llama(self.folder, DTYPES[self.config.precision.dtype], self.world.device), dict[int, str]()
        own = sorted(range(self.world.rank, len(asked), self.world.group.size), key=lambda i: asked[i][1:])
        for (stop, most), alike in groupby(own, key=lambda i: asked[i][1:]):
            chosen, room = list(alike), min(most, self.scorer.longest // 2)
            prompts = [asked[i][0][room - self.scorer.longest :] for i in chosen]  # the end of what is too long
            rows = generate_batch(llama, prompts, room, Sampling(temperature=0), tokenizer=tokenizer, stop=stop)
            said |= {i: row.text for i, row in zip(chosen, rows, strict=True)}
        everyone = [pair for part in self.world.group.gather_values([*said.items()]) for pair in part]
        return [text for _, text in sorted(everyone)]


def evaluation_config(folder: Path, words: Sequence[str], ranks: int, context: int = 0) -> Config:
    """The model with these settings, else its own format and longest context. Raises: ConfigError; CheckpointError."""
    raw = disk.read_json(folder / "config.json")
    model = read_model_config(folder)
    with reader.open_folder(folder) as files:
        model, _ = reader.head_of(folder, files, model)
    longest = raw.get("max_position_embeddings")
    if type(longest) is not int or not 0 < longest <= MAX_CONTEXT:
        raise ConfigError(f"{folder}/config.json has max_position_embeddings={longest}; give --context [tokens]")
    if context > longest:
        raise ConfigError(f"--context={context} is more than the {longest} tokens that the model was made for")
    if own := [word for word in words if word.removeprefix("--").startswith(("model.", "data."))]:
        raise ConfigError(f"{own[0]}: the checkpoint says what the model is, and --data what is read; leave it out")
    length = context or longest
    sizes = [re.fullmatch(r"(?:--)?batch\.micro_batch_size=(\d+)", word) for word in words]
    size = next((int(found[1]) for found in reversed(sizes) if found), max(1, TOKENS // length))
    dtype = FORMATS.get(str(raw.get("dtype") or raw.get("torch_dtype")), "fp32")
    fixed = [f"model.{name}={literal(value)}" for name, value in model if value is not None and name != "preset"]
    given = [f"precision.dtype={dtype}", f"batch.micro_batch_size={size}", f"batch.seq_length={length}"]
    given += [f"batch.global_batch_size={max(1, size) * ranks}", "data.synthetic=true"]
    return load(None, [*fixed, *given, *words], ranks=ranks, need_data=False)


def open_on(world: World, folder: Path, config: Config, say: Callable[[str], None]) -> Opened:
    """Its weights on the ranks of `world`. Raises: MegallamaError."""
    kernels = kernels_of(config, world.device)
    same_kernels(world.group.gather_values([(c.operation, c.selected) for c in kernels.choices]))
    plan = make_plan(config, world.world_size)
    groups = world.groups(plan.topology, config.model.num_kv_heads or 1)
    worker = assemble(plan, groups, world.device, kernels, trains=False)
    manager = CheckpointManager(config, folder, world.group, None, say)
    manager.load_weights(folder, worker.optimizer.shards(owned_only=False))
    on_all_ranks(world.group, "weights", lambda: worker.optimizer.loaded(steps=0))
    worker.optimizer.wait()
    return Opened(Scorer(worker), world, folder, config)


@contextmanager
def opened(
    checkpoint: Path, words: Sequence[str], context: int = 0, log: Callable[[str], None] = lambda text: None
) -> Iterator[Opened]:
    """Launch, meet the other ranks, load the weights. Raises: MegallamaError."""
    launch = detect_launch()
    say = log if launch.rank == 0 else lambda text: None
    problem, config, folder, cuda = "", Config(), Path(), {}
    try:
        folder = find_model(checkpoint, say)
        config = evaluation_config(folder, words, launch.world_size, context)
        cuda = cuda_environment(config)
    except Exception as error:
        if launch.world_size == 1:
            raise
        problem = str(error)
    same = hashlib.sha256(f"{folder} {to_toml(config)}".encode()).hexdigest()[:12]
    with start(launch, config.run, same, problem=problem, cuda=cuda) as world:
        try:
            yield open_on(world, folder, config, say)
        except RuntimeError as error:
            if (first := world.failed(error)) is not None:
                raise LaunchError(f"this rank stopped because {first[0]}") from error
            raise


def evaluate(request: Request, show: Callable[[str], None], say: Callable[[str], None]) -> Results:
    """Score all that was asked for and `show` the table; on every rank the same results. Raises: MegallamaError."""
    request.check()
    with opened(request.checkpoint, request.settings, request.context, say) as model:
        first, tokenizer = model.world.rank == 0, None
        tell = say if first else lambda text: None
        with nullcontext() if request.tokenizer else suppress(DataError):
            tokenizer = load_tokenizer(request.tokenizer or model.folder)
        searched = trained_on(model.folder) if request.check_contamination == () else request.check_contamination
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
