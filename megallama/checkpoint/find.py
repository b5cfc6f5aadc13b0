"""Which checkpoint a path means: the same for every tool, and for checkpoint.weights_from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megallama.checkpoint import disk, manifest
from megallama.checkpoint.errors import CheckpointError
from megallama.checkpoint.folder import newest_step
from megallama.checkpoint.reader import step_folder
from megallama.config.schema import Config


def find_checkpoint(path: Path, tell: Callable[[str], None] = lambda text: None) -> Path:
    """The step folder that `path` is, or is the model/ of; of a folder of steps or a run folder the one saved last.

    Any other path is returned as it is: the weights of another program, or nothing. `tell` hears of
    damaged steps.
    """
    if (step := step_folder(path)) is not None:
        return step
    found = (newest_step(folder, tell) for folder in (path, path / "checkpoints"))
    return next((step for step in found if step is not None), path)


def find_model(path: Path, tell: Callable[[str], None] = lambda text: None) -> Path:
    """The Hugging Face folder that `path` means: one itself, or the model/ of the step that `find_checkpoint` finds.

    Raises: CheckpointError if there is none.
    """
    for folder in (path, path / "model"):
        if disk.exists(folder / "config.json"):
            return folder
    if (step := find_checkpoint(path, tell)) != path:
        return step / "model"
    what = "has no complete checkpoint in it" if path.is_dir() else "is not a folder"
    raise CheckpointError(f"{path} {what}; give a step folder, a folder of steps, a run or a Hugging Face folder")


def samples_before(config: Config) -> int:
    """How many samples lie behind the checkpoint that a run would resume; 0 where none can be read (yet)."""
    if config.checkpoint.resume == "fresh" or config.checkpoint.folder is None:
        return 0
    with suppress(CheckpointError, KeyError):
        step = newest_step(Path(config.checkpoint.folder), lambda text: None)
        return int(manifest.read_manifest(step).body["counters"]["samples"]) if step else 0
    return 0
