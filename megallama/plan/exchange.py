"""Context parallelism, without tensors: a rank's share of a sequence, how attention gets the rest.

A sequence is 2 cp chunks, of which rank r has r and 2 cp - 1 - r: then causal attention is equal work.  Of the two ways
the one is taken that moves less: docs/how_it_works.md has both, their papers, and the bound that `exchange` computes.
"""

from dataclasses import dataclass
from math import lcm

from megallama.config.schema import Config
from megallama.plan.params import heads


@dataclass(frozen=True)
class Share:
    """What rank `rank` of `size` context-parallel ranks has of a sequence; `gathers`: how it exchanges."""

    rank: int = 0
    size: int = 1
    gathers: bool = True

    def chunks(self, length: int) -> tuple[tuple[int, int], ...]:
        """First token and end of its chunks. Raises: ValueError if `length` cannot be cut."""
        if self.size == 1:
            return ((0, length),)
        chunk, rest = divmod(length, 2 * self.size)
        if rest:
            raise ValueError(f"samples of {length} tokens: give a multiple of 2 x parallel.cp={self.size}")
        return tuple((i * chunk, (i + 1) * chunk) for i in (self.rank, 2 * self.size - 1 - self.rank))


WHOLE = Share()


def local_heads(config: Config) -> tuple[int, int]:
    """n', k': query and key/value heads of a tensor-parallel rank, which may share the latter."""
    n, k, _ = heads(config.model)
    return n // config.parallel.tp, max(1, k // config.parallel.tp)


def kv_copies(kv_heads: int, cp: int) -> int:
    """How often `heads` copies each key/value head, so that cp divides them."""
    return lcm(kv_heads, cp) // kv_heads


def exchange(config: Config) -> tuple[str, str]:
    """Which of "gather" and "heads", and why."""
    p, (n, k) = config.parallel, local_heads(config)
    if p.cp_exchange != "auto":
        return p.cp_exchange, f'parallel.cp_exchange="{p.cp_exchange}"'
    if n % p.cp:
        return "gather", f"cp={p.cp} does not divide the {n} heads of a rank"
    kept, again = config.memory.cp_keep_kv, config.memory.recompute == "full"
    g, words = (1.0, "1") if kept else (0.75, "3/4") if again else (2 / 3, "2/3")
    copies = kv_copies(k, p.cp)
    bound = g * (copies + n / k)
    least = f"{words} x ({copies} + {n} / {k}) = {bound:.3g}"
    return ("heads", f"cp={p.cp} is above {least}") if p.cp > bound else ("gather", f"cp={p.cp} is not above {least}")


def share(config: Config, rank: int) -> Share:
    """Of context-parallel rank `rank`."""
    return Share(rank, config.parallel.cp, exchange(config)[0] == "gather")
