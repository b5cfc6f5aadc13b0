"""The `megallama` command: a table of commands, each a module of `megallama.commands`.

What a command needs is imported when it is called: a run must listen for signals before anything that takes time.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence

from megallama.commands.exit import exit_status
from megallama.config.errors import MegallamaError

COMMANDS = {
    "train": "train a model: alone, or as one rank under torchrun, srun or mpirun",
    "plan": "what a run will do, need and cost, before it starts; --search for layouts, --data for its sources",
    "dryrun": "prove that a job cannot hang, by executing every distinct rank without data or GPUs",
    "draw": "draw a pipeline schedule: chart, SVG, PNG, trace",
    "curate": "raw pages to a corpus: filter, remove duplicates, report what was dropped",
    "prepare": "tokenize text into a .bin/.idx pair",
    "merge": "join .bin/.idx pairs",
    "tokenizer": "train a SentencePiece tokenizer",
    "inspect": "look into a checkpoint or a .bin/.idx pair, verify or compare it",
    "explain": "which documents a step trains on",
    "status": "how a run is: where its ranks stand, how it ended, what it did with its time",
    "replay": "run a step again: was it the data, the numbers, or the machine?",
    "generate": "continue a text with a trained model",
    "evaluate": "how good a checkpoint is: texts, items of your own, the paper's tasks",
    "compare": "are the differences between evaluations more than noise?",
    "average": "the mean of checkpoints of one model, as a checkpoint",
    "convert": "convert a checkpoint to or from Hugging Face, Meta's and Megatron's formats",
    "from-megatron": "a Megatron-LM command line or log as a configuration",
    "preflight": "which GPUs, nodes and links are slow, before a large run",
    "doctor": "what this machine can train with, and what to install for more",
}
USAGE = "usage: megallama COMMAND [ARGUMENTS]; megallama --help lists the commands"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status. 2 where there is no such command."""
    return exit_status(lambda: run(list(sys.argv[1:] if argv is None else argv)))


def run(words: list[str]) -> int:
    """Run a command. Raises: MegallamaError where there is none of this name."""
    name, *rest = words or ["--help"]
    if name in ("-h", "--help", "help"):
        rows = [f"  {command:<14}{about}" for command, about in COMMANDS.items()]
        print(USAGE.partition(";")[0], "", *rows, "", "megallama COMMAND --help says what it needs.", sep="\n")
        return 0 if words else 2
    if name == "--version":
        from megallama import __version__

        print(f"megallama {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise MegallamaError(f"there is no command {name!r}{hint}\n{USAGE}")
    if name == "train" and rest and not {"-h", "--help"} & set(rest):
        sys.argv[1:] = rest
        from megallama.pretrain import process

        return process()
    return command(name)(rest)


def command(name: str) -> Callable[..., int]:
    """One command as a function: from its arguments (without: the process's) to its exit status."""

    def main(argv: Sequence[str] | None = None) -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        module = importlib.import_module(f"megallama.commands.{name.replace('-', '_')}")
        return exit_status(lambda: module.run(words))

    return main


if __name__ == "__main__":
    sys.exit(main())
