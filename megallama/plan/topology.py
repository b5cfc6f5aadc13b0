"""Where every rank stands: arithmetic on rank numbers.

`order`: the axes from fastest to slowest varying, as in Megatron: what talks most comes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from megallama.config.errors import ConfigError, counted
from megallama.config.rules import AXES


@dataclass(frozen=True)
class Topology:
    """The size of each parallel axis and the order in which ranks fill the grid."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    order: str = "tp-cp-dp-pp"
    ends: tuple[int, int] = (0, -1)  # pipeline ranks of the first and the last stage; -1: pp - 1

    def __post_init__(self) -> None:
        assert sorted(self.order.split("-")) == sorted(AXES) and min(map(self.size, AXES)) > 0, self
        object.__setattr__(self, "ends", (self.ends[0], self.ends[1] % self.pp))

    @classmethod
    def fill(cls, ranks: int, *, tp: int = 1, pp: int = 1, cp: int = 1, order: str = "tp-cp-dp-pp") -> Topology:
        """The topology whose dp uses up `ranks`. Raises: ConfigError if they cannot be cut."""
        unit = tp * pp * cp
        dp, rest = divmod(ranks, unit)
        if rest or not dp:
            use = f"use a multiple of {unit} ranks or smaller sizes"
            raise ConfigError(f"ranks={ranks} cannot be cut into tp={tp} x pp={pp} x cp={cp} = {unit}; {use}")
        return cls(tp=tp, pp=pp, dp=dp, cp=cp, order=order)

    @cached_property
    def strides(self) -> dict[str, int]:
        """Distance in ranks between neighbours along each axis, in their order."""
        axes = self.order.split("-")
        return {axis: self.size(*axes[:i]) for i, axis in enumerate(axes)}

    @property
    def world_size(self) -> int:
        return self.size(*AXES)

    def size(self, *axes: str) -> int:
        return prod(getattr(self, a) for a in axes)

    def coords(self, rank: int) -> dict[str, int]:
        """Global rank -> its index on every axis."""
        assert 0 <= rank < self.world_size, (rank, self.world_size)
        return {axis: rank // stride % self.size(axis) for axis, stride in self.strides.items()}

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """Groups of ranks that differ only along `axes`, in creation order; ranks ascend."""
        steps, found = [(self.strides[a], self.size(a)) for a in axes], dict[int, list[int]]()
        for rank in range(self.world_size):
            first = rank - sum(rank // stride % size * stride for stride, size in steps)
            found.setdefault(first, []).append(rank)
        return [*map(tuple, found.values())]

    def __str__(self) -> str:
        axes = [a for a in ("tp", "cp", "pp", "dp") if a != "cp" or self.cp > 1]
        return " x ".join(f"{a}={self.size(a)}" for a in axes) + f" = {counted(self.world_size, 'rank')}"
