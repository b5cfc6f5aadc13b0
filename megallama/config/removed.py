"""Settings of earlier versions: those with another name now, and those that are gone.

Files are read under both names always, and a setting that is gone is no error where it has its default: earlier
versions wrote every setting into the files of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, model_validator

RENAMED = {"data.at_max_epochs": "data.on_exhausted", "data.changes": "data.mixture_schedule"}
REMOVED: dict[str, tuple[Any, str]] = {  # dotted key -> (its default, why no other value is possible any more)
    "precision.min_loss_scale": (1.0, "the loss scale of fp16 never falls below 1"),
    "run.cuda_graphs": (False, "micro-batches are no longer recorded as CUDA graphs"),
}
LINEAR = {"kind": "wsd", "wsd_decay_steps": 0}
"""What lr_schedule.kind="linear" is now: the same curve to the bit, whatever its wsd_decay_steps said."""


def current(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that an earlier version recorded, by section, as this one names them."""
    out = {section: dict(values) if isinstance(values, Mapping) else values for section, values in tree.items()}
    for key in (*RENAMED, *REMOVED):
        section, _, name = key.partition(".")
        values, new = out.get(section), RENAMED.get(key, "").partition(".")[2]
        if isinstance(values, dict) and name in values and new not in values:
            value = values.pop(name)
            values |= {new: value} if new else {}
    schedule = out.get("lr_schedule")
    if isinstance(schedule, dict) and schedule.get("kind") == "linear":
        schedule |= LINEAR
    return out


class OfAnyVersion(BaseModel):
    """A configuration that is read under the names of any version: checkpoints remember the one they came from."""

    @model_validator(mode="before")
    @classmethod
    def _current(cls, tree: Any) -> Any:
        return current(tree) if isinstance(tree, Mapping) else tree
