"""Settings of earlier versions that are gone.

A file that gives one its default is read as ever: earlier versions wrote every setting into the files of a run.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, model_validator

REMOVED: dict[str, tuple[Any, str]] = {  # dotted key -> (its default, why no other value is possible any more)
    "precision.min_loss_scale": (1.0, "the loss scale of fp16 never falls below 1"),
    "run.cuda_graphs": (False, "micro-batches are no longer recorded as CUDA graphs"),
}


class OfAnyVersion(BaseModel):
    """A configuration that is read without the settings that are gone: checkpoints remember the one they came from."""

    @model_validator(mode="before")
    @classmethod
    def _without_removed(cls, tree: Any) -> Any:
        out = dict(tree) if isinstance(tree, dict) else tree
        for key in REMOVED if isinstance(tree, dict) else ():
            section, _, name = key.partition(".")
            if isinstance(out.get(section), dict):
                out[section] = {k: v for k, v in out[section].items() if k != name}
        return out
