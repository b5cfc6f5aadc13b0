"""How many files a rank will have open, and how many it may: every connection is a file.

Beyond the limit gloo ends the process from C++ without a word that helps, so it is counted before.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, Sequence


def raised_limit() -> int:
    """The most files this process may have open, after the soft limit was raised to the hard one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 62


def files_needed(
    ranks: int, groups: Sequence[int], files: int, *, first: bool, store_host: bool, cuda: bool, shared: bool
) -> dict[str, int]:
    """Open files of a rank, by what they are for.

    groups: sizes of its process groups; files: of data and checkpoint; first: it is rank 0; store_host: of the store.
    """
    groups = [size for size in groups if size > 1]
    return {
        "open already": len(os.listdir("/proc/self/fd")),
        "the store": 4 + ranks * (1 + cuda) * store_host,  # NCCL's groups connect with it once more
        "connections with rank 0": 8 + (ranks if first else 1),
        "NCCL, about": 64 * len(groups) * cuda,
        "gloo": sum(size + 3 for size in groups) * (not cuda),
        "shared memory": 2 * sum(groups) * (shared and not cuda),  # mmap keeps a second one
        "data, checkpoints and logs": 8 + files,
    }


def too_many(need: Mapping[str, int], limit: int, where: str) -> str:
    """What to do where the limit does not suffice; empty where it does."""
    if (total := sum(need.values())) <= limit:
        return ""
    parts = ", ".join(f"{what} {count:,}" for what, count in need.items() if count)
    return (
        f"{where} will have {total:,} files open ({parts}), but its limit is {limit:,}; raise the hard limit of open "
        f"files (ulimit -Hn; LimitNOFILE of the service that starts the ranks) to {total:,} or more"
    )
