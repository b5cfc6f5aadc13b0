"""The plan of a run: everything that follows from the configuration and the number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from megallama.config.schema import Config
from megallama.plan.check import build_forward, build_schedule
from megallama.plan.memory import RankMemory, rank_memory
from megallama.plan.partition import Stages, partition
from megallama.plan.report import page
from megallama.plan.schedule import Schedule
from megallama.plan.topology import Topology


@dataclass(frozen=True)
class Plan:
    """What will happen; ``print(plan)`` is a page."""

    config: Config
    topology: Topology
    stages: Stages  # layer numbers of each stage, in model order
    schedule: Schedule  # of a step with the full global batch, lowered and checked
    _schedules: dict[tuple[object, int], Schedule] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_stages(self) -> int:
        """Pipeline stages of the whole model."""
        return len(self.stages)

    def schedule_for(self, num_microbatches: int) -> Schedule:
        """The schedule of a training step with this many micro-batches (it varies while the batch ramps up)."""
        if num_microbatches == self.schedule.num_microbatches:
            return self.schedule
        return self._once(build_schedule, self.config.parallel, num_microbatches)

    def forward_schedule(self, num_microbatches: int) -> Schedule:
        """The schedule of an evaluation."""
        return self._once(build_forward, self.schedule, num_microbatches)

    def memory(self, pp_rank: int) -> RankMemory:
        """Bytes of the ranks at one pipeline position."""
        return rank_memory(self.config, self.stages, self.schedule, self.topology.dp_cp, pp_rank)

    def _once(self, build: Callable[[Any, int], Schedule], base: object, num_microbatches: int) -> Schedule:
        key = build, num_microbatches
        if key not in self._schedules:
            self._schedules[key] = build(base, num_microbatches)
        return self._schedules[key]

    def __str__(self) -> str:
        return page(self.config, self.topology, self.stages, self.schedule)


def make_plan(config: Config, ranks: int) -> Plan:
    """The plan of a configuration that `config.rules` finds no fault with.

    Raises: ConfigError if the ranks cannot be cut into tp x pp, ScheduleError if the schedule cannot run the batch.
    """
    p = config.parallel
    topology = Topology.fill(ranks, tp=p.tp, pp=p.pp, order=p.rank_order)
    count = config.batch.num_microbatches(config.batch.global_batch_size, topology.dp)
    schedule = build_schedule(p, count)
    topology = replace(topology, ends=(schedule.owners[0], schedule.owners[-1]))
    return Plan(config, topology, partition(config), schedule)
