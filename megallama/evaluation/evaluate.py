"""One evaluation, in any layout, under any launcher: what was asked for, and a table."""

from __future__ import annotations

import hashlib
import json
import math
import re
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import megallama
from megallama.checkpoint import disk, reader
from megallama.checkpoint.folder import step_folder
from megallama.checkpoint.huggingface import TORCH_NAMES, read_model_config
from megallama.checkpoint.manager import CheckpointManager
from megallama.checkpoint.manifest import read_manifest
from megallama.comm.group import Group, on_all_ranks
from megallama.comm.launch import World, cuda_environment, detect_launch, start
from megallama.config.describe import literal
from megallama.config.errors import ConfigError, DataError, LaunchError
from megallama.config.load import load, to_toml
from megallama.config.schema import Config
from megallama.data.indexed import IndexedDataset
from megallama.data.look import document
from megallama.data.tokenizer import Tokenizer, load_tokenizer, sha256_of
from megallama.data.writer import write_whole
from megallama.evaluation.harness import Encoder, Request, Tasks, start_of
from megallama.evaluation.results import Results, aligned, table, take
from megallama.evaluation.scorer import Scorer, Text, score_texts
from megallama.inference.generate import MAX_CONTEXT, Sampling, adds_bos, find_model, generate_batch, load_llama
from megallama.plan.plan import make_plan
from megallama.text.documents import RecordReader
from megallama.text.inputs import Losses
from megallama.text.ngrams import Ngrams
from megallama.train.assemble import DTYPES, assemble, kernels_of, same_kernels

Asked = Mapping[str, Sequence[list[str]]]  # by task, the passages of each item
Say = Callable[[str], None]
Question = tuple[list[int], tuple[str, ...], int]  # a prompt, strings that end the answer, most tokens
TOKENS = 4096  # of a micro-batch, unless batch.micro_batch_size says otherwise


class Opened(NamedTuple):
    """A model that all ranks have before them."""

    scorer: Scorer
    world: World
    folder: Path  # a Hugging Face folder
    config: Config

    def answers(self, asked: Sequence[Question], tokenizer: Tokenizer) -> list[str]:
        """What follows each prompt, greedily, up to a stop string; each rank has the whole model."""
        llama, said = load_llama(self.folder, DTYPES[self.config.precision.dtype], self.world.device), dict[int, str]()
        own = sorted(range(self.world.rank, len(asked), self.world.group.size), key=lambda i: asked[i][1:])
        for (stop, most), alike in groupby(own, key=lambda i: asked[i][1:]):
            chosen, room = list(alike), min(most, self.scorer.longest // 2)
            prompts = [asked[i][0][room - self.scorer.longest :] for i in chosen]  # their ends
            rows = generate_batch(llama, prompts, room, Sampling(temperature=0), tokenizer=tokenizer, stop=stop)
            said |= {i: row.text for i, row in zip(chosen, rows, strict=True)}
        everyone = [pair for part in self.world.group.gather_values([*said.items()]) for pair in part]
        return [text for _, text in sorted(everyone)]


def evaluation_config(folder: Path, words: Sequence[str], ranks: int, context: int = 0) -> Config:
    """Its own format and longest context, or as set. Raises: ConfigError; CheckpointError."""
    raw = disk.read_json(folder / "config.json")
    model = read_model_config(folder)
    with reader.open_folder(folder) as files:
        model, _ = reader.head_of(folder, files, model)
    longest = raw.get("max_position_embeddings")
    if type(longest) is not int or not 0 < longest <= MAX_CONTEXT:
        raise ConfigError(f"{folder}/config.json has max_position_embeddings={longest}; write the longest [tokens]")
    if context > longest:
        raise ConfigError(f"--context={context} is more than the {longest} tokens that the model was made for")
    if own := [word for word in words if word.removeprefix("--").startswith(("model.", "data."))]:
        raise ConfigError(f"{own[0]}: the checkpoint says what the model is, and --data what is read; leave it out")
    length = context or longest
    sizes = [re.fullmatch(r"(?:--)?batch\.micro_batch_size=(\d+)", word) for word in words]
    size = next((int(found[1]) for found in reversed(sizes) if found), max(1, TOKENS // length))
    saved = raw.get("dtype") or raw.get("torch_dtype")
    dtype = next((own for own, theirs in TORCH_NAMES.items() if theirs == saved), "fp32")
    # MKL's sums of fp32 are of blocks, and so nearer to the exact ones than oneDNN's
    given = ['run.without_kernels=["matrix product: oneDNN"]', f"precision.dtype={dtype}"]
    fixed = [f"model.{name}={literal(value)}" for name, value in model if value is not None and name != "preset"]
    given += [f"batch.micro_batch_size={size}", f"batch.seq_length={length}"]
    given += [f"batch.global_batch_size={max(1, size) * ranks}", "data.synthetic=true"]
    return load(None, [*fixed, *given, *words], ranks=ranks, need_data=False)


def open_on(world: World, folder: Path, config: Config, say: Say) -> Opened:
    """Its weights on the ranks of `world`. Raises: MegallamaError."""
    kernels = kernels_of(config, world.device)
    same_kernels(world.group, kernels)
    plan = make_plan(config, world.world_size)
    groups = world.groups(plan.topology, config.model.num_kv_heads or 1)
    worker = assemble(plan, groups, world.device, kernels, trains=False)
    manager = CheckpointManager(config, folder, world.group, None, say)
    manager.load_weights(folder, worker.optimizer.shards(owned_only=False))
    on_all_ranks(world.group, "weights", lambda: worker.optimizer.loaded(steps=0))
    worker.optimizer.wait()
    return Opened(Scorer(worker), world, folder, config)


@contextmanager
def opened(checkpoint: Path, words: Sequence[str], context: int = 0, log: Say = lambda text: None) -> Iterator[Opened]:
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


def evaluate(request: Request, show: Say, say: Say) -> Results:
    """Score, and `show` the table; the same results on every rank. Raises: MegallamaError."""
    request.check()
    with opened(request.checkpoint, request.settings, request.context, say) as model:
        first, tokenizer = model.world.rank == 0, None
        tell = say if first else lambda text: None
        with nullcontext() if request.tokenizer or request.items or request.tasks else suppress(DataError):
            tokenizer = load_tokenizer(request.tokenizer or model.folder)
        searched = trained_on(model.folder) if request.check_contamination == () else request.check_contamination
        config, keys = model.config, ("n-shot", "n-samples", "task_hashes", "items", "texts", "seconds")
        results: Results = {name: {} for name in ("results", "configs", "versions", *keys)}  # lm-eval's names
        about: Results = {"model": "megallama", "model_args": str(model.folder), "limit": request.limit}
        about |= {"seed": request.seed, "settings": [*request.settings], "dtype": config.precision.dtype}
        about |= {"parallel": config.parallel.model_dump(mode="json"), "ranks": model.world.world_size}
        about |= {"context": model.scorer.longest, "tokenizer_sha256": tokenizer and sha256_of(tokenizer.path)}
        results |= {"config": about, "megallama_version": megallama.__version__, "date": datetime.now().timestamp()}
        place = request.output
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        try:
            if request.data:
                encode = tokenizer and tokenizer.encode
                texts = read_texts(request.data, encode, request.json_key, request.limit, tell)
                results["texts"] = score_texts(model.scorer, texts, start_of(tokenizer))
            if tokenizer and (request.items or request.tasks):
                bos, longest = adds_bos(model.folder, tokenizer.path), model.scorer.longest
                tasks = Tasks(request, Encoder(tokenizer, longest, bos, start_of(tokenizer)), tell)
                tasks.run(results, model.scorer, model.answers)
                if searched and tasks.asked:
                    documents = read_texts(searched, str, request.json_key, None, tell)
                    results["contamination"] = check(results, tasks.asked, documents, tokenizer, model.world.group)
        except BaseException:
            place = place and place.with_name(f"{place.name}.part")
            raise
        finally:  # what was done before an error, too
            signal.signal(signal.SIGTERM, before)
            if first and (place == request.output or results["texts"] or results["results"]):
                _show(results, show)
                if place:
                    finite = json.loads(json.dumps(results), parse_constant=lambda number: None)  # else null
                    old = ", in place of older ones" if place.exists() else ""
                    write_whole(place, json.dumps(finite, indent=1).encode() + b"\n")
                    say(f"results are in {place}{old}")
    return results


def _show(results: Results, show: Say) -> None:
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
    for own in [r for r in (results, results.get("contamination", {})) if r.get("results")]:
        show("\n".join(table(own)))


def read_texts(inputs: Sequence[Path], encode: Any, json_key: str, limit: int | None, say: Say) -> Iterator[Text]:
    """The first `limit` documents of each file and .bin/.idx pair; `encode` texts. Raises: DataError."""
    prefixes = {path: re.sub(r"\.(bin|idx|json|sums)$", "", str(path)) for path in inputs}  # a pattern names them all
    pairs = dict.fromkeys(prefix for prefix in prefixes.values() if Path(f"{prefix}.idx").is_file())
    losses, files = Losses(), [path for path, prefix in prefixes.items() if prefix not in pairs]
    if files and encode is None:
        raise DataError("texts need a tokenizer, and the checkpoint has none; give --tokenizer")
    found = losses.find(files, say) if files else []
    paths = [*map(Path, pairs), *found]
    alike = Counter(path.name for path in paths)
    names = {path: path.name if alike[path.name] == 1 else str(path) for path in paths}
    for data in map(IndexedDataset, pairs):
        size, tokens = data.metadata.get("bytes"), data.metadata.get("tokens")  # of the mean token; nan: not known
        for number in range(data.num_documents)[:limit]:
            ids = document(data, number).tolist()
            yield names[Path(data.prefix)], ids, len(ids) * size / tokens if size else math.nan
    for file in found:
        for _, text in islice(losses.texts(RecordReader([file], json_key=json_key)), limit):
            yield names[file], encode(text), float(len(text.encode()))
    losses.check()
    for line in losses.lines() if losses.bad or losses.faults else ():
        say(line)


def trained_on(folder: Path) -> tuple[Path, ...]:
    """The corpora of the run that saved it. Raises: DataError if not known, or not there."""
    step = step_folder(folder)
    paths = tuple(Path(source["path"]) for source in (read_manifest(step).config["data"]["train"] if step else ()))
    lost = [f"{path} is not here" for path in paths if not Path(f"{path}.idx").is_file()]
    if why := lost if paths else ["it does not say so"]:
        raise DataError(f"what {folder} was trained on: {why[0]}; name it: --check-contamination FILE ...")
    return paths


def check(results: Results, asked: Asked, documents: Iterable[Text], tokenizer: Tokenizer, group: Group) -> Results:
    """Which n-grams of every item are there; results of clean items, and of those that have any."""
    of = [(task, i) for task, items in asked.items() for i, item in enumerate(items) for _ in item]  # of a passage
    index = Ngrams([passage for items in asked.values() for item in items for passage in item])
    places, number = dict[int, list[object]](), count()  # of an n-gram: its first document
    own = islice(zip(number, documents, strict=False), group.rank, None, group.size)
    while batch := list(islice(own, 32)):  # documents
        texts = [text if isinstance(text, str) else tokenizer.decode(text) for _, (_, text, _) in batch]
        for place, gram in index.find(texts).T.tolist():
            places.setdefault(gram, [batch[place][0], batch[place][1][0]])
    for gram, where in (pair for part in group.gather_values([*places.items()]) for pair in part):
        places[gram] = min(where, places.get(gram, where))
    seen = np.isin(np.arange(index.size), [*places])
    shares = {task: np.full(len(items), np.nan) for task, items in asked.items()}
    for (task, i), share in zip(of, index.shares(seen), strict=True):
        shares[task][i] = np.fmax(shares[task][i], share)  # of the passage of which most is there
    out: Results = defaultdict(dict, documents=next(number) - 1)
    for passage, gram, words in index.examples(seen):
        out["examples"].setdefault(of[passage][0], {})[of[passage][1]] = [words, *places[gram]]
    for task, part in shares.items():
        out["shares"][task] = part.tolist()
        for kind, chosen in (("clean", part == 0), ("dirty", part > 0), ("too short", np.isnan(part))):
            values = {name: np.array(own)[chosen] for name, own in results["items"][task].items()}
            if chosen.any():
                take(out, f"{task}: {chosen.sum()} of {len(part)} {kind}", values, results["n-shot"][task], 0.0)
    return out
