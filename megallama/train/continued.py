"""A run that goes on from a checkpoint of another one: what it takes over, what begins anew, and why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megallama.checkpoint.manager import CheckpointManager, forget_moments
from megallama.comm.group import Assembly, on_all_ranks
from megallama.config.errors import counted
from megallama.config.schema import Config, current
from megallama.data.sources import TrainDataset
from megallama.optim.update import Update
from megallama.train.progress import HighLoss, Progress, Spikes

SETTINGS = {"moments": ["optimizer.beta1", "optimizer.beta2"], "schedule": ["lr_schedule.kind"]}
LENGTHS = [f"lr_schedule.{name}_steps" for name in ("warmup", "decay", "wsd_decay")]  # may follow from train.steps


def take_over(
    config: Config, manager: CheckpointManager, progress: Progress, optimizer: Update, train: TrainDataset | None,
    group: Assembly,
) -> Iterator[str]:  # fmt: skip
    """Fill state and counters from checkpoint.continue_from; what is to be said of it. Raises: as `manager.load`."""
    other, what = Path(str(config.checkpoint.continue_from)), "cannot continue from another run"
    path = Path(on_all_ranks(group, what, lambda: "" if group.rank else str(manager.check_other(other)))[0])
    shards = optimizer.shards(owned_only=False)
    saved = manager.load(path, shards, other=True)
    assert manager.resumed is not None
    was, now = current(manager.resumed[1]), config.model_dump(mode="json")
    progress.load_state_dict(saved, was["batch"]["seq_length"])
    progress.may_lack_evaluations = False  # they are the other run's
    anew = _anew(was, now) | dict.fromkeys(config.checkpoint.continue_reset, "checkpoint.continue_reset says so")
    if "moments" in anew:
        forget_moments(shards)
        progress.updates = 0
    optimizer.loaded(progress.updates)
    progress.begun = progress.step if "schedule" in anew else progress.begun
    places = train.take_over(saved, progress.step, progress.samples, anew.get("data", "")) if train else {}
    names = [source.name for source in train.sources] if train else []
    states = {"moments and Adam's count of updates": anew.get("moments")}
    states |= {"place in the learning-rate schedule": anew.get("schedule")}
    states |= {f"place in data source {name}": places.get(name) for name in names}
    kept = ", ".join(["weights", *(text for text, why in states.items() if not why)])
    read = counted(progress.tokens_read, "token", ",")
    yield f"going on after step {progress.step} of {path}, {read} read, with its {kept}"
    yield from (f"{text} begins anew: {why}" for text, why in states.items() if why)
    if places or any(was[part] != now[part] for part in ("model", "batch")):
        progress.spikes, progress.high_loss = Spikes({}), HighLoss()
        yield "what loss is usual is learnt anew, as model, batch or data are others"


def _anew(was: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What does not go on, and why; places in data sources are compared one by one."""
    same_length, found = was["train"]["steps"] == now["train"]["steps"], dict[str, str]()
    for name, keys in (SETTINGS | {"schedule": SETTINGS["schedule"] + LENGTHS * same_length}).items():
        if changed := [f"{s}.{key}" for s, key in (k.split(".") for k in keys) if was[s][key] != now[s][key]]:
            found[name] = f"{' and '.join(changed)} changed"
    return found
