"""Going on from another run's checkpoint, or in the next phase: what is taken over, what begins anew.

From phase to phase, what depends on length, frequencies, batch or data is made again; weights, moments, counters
stay.  Sources go on after the tokens that they gave.  A checkpoint at a phase's end belongs to that phase.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megallama.checkpoint.folder import begun
from megallama.checkpoint.manager import forget_moments
from megallama.comm.group import on_all_ranks
from megallama.comm.launch import World
from megallama.config.describe import literal
from megallama.config.errors import ConfigError, counted
from megallama.config.rules import check
from megallama.config.schema import IN_PHASES, Config, PhaseConfig, current
from megallama.data.sources import Data, TrainDataset, open_sources
from megallama.plan.plan import make_plan
from megallama.train.assemble import assemble, kernels_of, same_kernels
from megallama.train.progress import HighLoss, Spikes

if TYPE_CHECKING:
    from megallama.train.setup import Setup

SETTINGS = {"moments": ["optimizer.beta1", "optimizer.beta2"], "schedule": ["lr_schedule.kind"]}
LENGTHS = [f"lr_schedule.{name}_steps" for name in ("warmup", "decay", "wsd_decay")]  # may follow from train.steps


def take_over(setup: Setup) -> Iterator[str]:
    """Take state and counters from checkpoint.continue_from; what to say. Raises: as `manager.load`."""
    config, manager, progress, train = setup.config, setup.manager, setup.progress, setup.train_data
    other, what = Path(str(config.checkpoint.continue_from)), "cannot continue from another run"
    group, optimizer = setup.world.group, setup.worker.optimizer
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


def phase_at_start(config: Config, world: World) -> tuple[int, int]:
    """The phase, from 0, in which a run goes on by rank 0's checkpoints, and tokens read."""
    seen = begun(config)[2] if config.train.phases and not world.rank else 0
    tokens = world.group.gather_values(seen)[0]
    return config.train.phase_after(tokens), tokens


def enter(setup: Setup, number: int) -> Setup:
    """The same run as phase `number`, from 0, has it. Raises: ConfigError; DataError."""
    if number == setup.phase:
        return setup
    world, worker, ranks = setup.world, setup.worker, setup.plan.topology.world_size
    config = setup.config.at(number)
    if problems := check(config, ranks, need_data=False):
        raise ConfigError(f"train.phases[{number}], which is not over: {'; '.join(problems)}")
    worker.optimizer.wait()
    plan, data = make_plan(config, ranks), world.on_all("data", lambda: open_sources(config))
    kernels = world.on_all("kernels", lambda: kernels_of(config, world.device, setup.named))
    same_kernels(world.group, kernels)
    again = partial(assemble, plan, worker.groups, world.device, kernels, record=world.record)
    worker = world.on_all("model", partial(again, kept=worker))
    setup.manager.use(config)
    setup.progress.enter(config, number)
    tasks = setup.tasks
    if tasks_of := setup.tasks_of:
        tasks = world.on_all("eval.tasks", partial(tasks_of, config, data, setup.log.info))
    return replace(setup, config=config, plan=plan, data=data, worker=worker, tasks=tasks, phase=number)


def next_phase(setup: Setup) -> Setup:
    """Where one phase has ended, the next one. Raises: as `enter`."""
    was, progress, old, ledger = setup.config, setup.progress, setup.train_data, setup.progress.ledger
    setup = enter(setup, setup.phase + 1)
    new, samples = setup.train_data, progress.samples
    places = new.take_over(old.state(samples), progress.step, samples) if new and old else {}
    progress.go_on(ledger)
    now, b = setup.config, setup.config.batch
    setup.log.info(
        f"phase {setup.phase + 1} of {len(now.train.phases)} begins after step {progress.step}, "
        f"{counted(progress.tokens_read, 'token', ',')} read: {b.global_batch_size} samples of {b.seq_length} tokens"
    )
    if places or (was.model, was.batch) != (now.model, now.batch):
        progress.spikes, progress.high_loss = Spikes({}), HighLoss()
        setup.log.info("what loss is usual is learnt anew, as model, batch or data are others")
    return with_end(setup)


def with_end(setup: Setup) -> Setup:
    """Knowing after which step this phase ends, or the data, and whether another follows."""
    config, progress, number = setup.config, setup.progress, setup.phase
    at = progress.step, progress.samples, progress.tokens_read
    last, why = setup.world.on_all("data", lambda: end_of_data(config, setup.data, number, *at))
    if why:
        setup.log.info(f"the data end after step {last} of {config.train.steps}: {why}")
    return replace(setup, last_step=last, goes_on=not why and number + 1 < len(config.train.phases))


def end_of_data(
    config: Config, data: Data, number: int = 0, step: int = 0, samples: int = 0, tokens: int = 0
) -> tuple[int, str]:
    """The last step of a phase that has data, and why. Raises: DataError, also for later ones."""
    end, b = (config.train.phase_ends(step, tokens) or [config.train.steps])[number], config.batch
    if not isinstance(data.train, TrainDataset):
        return end, ""
    last, why = data.train.last_step(end)
    if not why and number + 1 < len(config.train.phases):
        ahead, count = config.at(number + 1), (end - step) * b.global_batch_size
        at, then = samples + count, open_sources(ahead)
        if isinstance(then.train, TrainDataset):
            then.train.take_over(data.train.state(at), end, at)
        end_of_data(ahead, then, number + 1, end, at, tokens + count * b.seq_length)
    return last, why


def phase_of(saved: Mapping[str, Any], config: Config) -> int:
    """The phase, from 0, of the last step of these counters; without phases the first."""
    return (saved.get("ledger") or [{}])[-1].get("phase", 1) - 1 if config.train.phases else 0


def check_past(saved: Mapping[str, Any], config: Config, number: int) -> None:
    """That phases up to `number`, under way, are as in the checkpoint. Raises: ConfigError."""
    was = Config.model_validate(saved)
    was = was if was.train.phases else was.changed(train={"phases": (PhaseConfig(until_tokens=1),)}).filled()
    both = (c.train.phases[: number + 1] for c in (was, config))
    for n, pair in enumerate(zip_longest(*both) if config.train.phases else ()):
        now = n == number and all(pair)  # its end and its batch may change
        settings = ["seq_length", "weights", *IN_PHASES["model"]] if now else [*PhaseConfig.model_fields]
        for name in settings:
            old, new = (_said(getattr(phase, name, None)) for phase in pair)
            if old != new:
                use = "what is past cannot change: write it as it was, and what is to be new in the phases that follow"
                raise ConfigError(f"train.phases[{n}].{name} was {literal(old)} and is {literal(new)}; {use}")


def _said(value: Any) -> Any:
    """Of weights without sources that are not read."""
    return {name: value[name] for name in sorted(value) if value[name]} if isinstance(value, dict) else value
