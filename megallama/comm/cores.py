"""A rank keeps to the CPU cores near its GPU; memory follows the thread that first writes."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from megallama.config.errors import counted, ranges


def _numbers(file: Path) -> list[int]:
    """What Linux writes as 0-3,8; none where it writes nothing, or -1."""
    with suppress(OSError, ValueError):
        runs = [[int(end) for end in run.split("-")] for run in file.read_text().split(",")]
        return [cpu for run in runs for cpu in range(run[0], run[-1] + 1)]
    return []


def cores_near(device: torch.device, sys: Path = Path("/sys")) -> list[int]:
    """The CPUs near this GPU that this process may use; none where /sys does not know them."""
    gpu = torch.cuda.get_device_properties(device)
    parts = [getattr(gpu, f"pci_{part}_id", -1) for part in ("domain", "bus", "device")]
    node = _numbers(sys / "bus/pci/devices" / "{:04x}:{:02x}:{:02x}.0".format(*parts) / "numa_node")
    cpus = _numbers(sys / f"devices/system/node/node{node[0]}/cpulist") if node else []
    return sorted({*cpus} & os.sched_getaffinity(0))


def keep_near(
    near: Sequence[int] | None, rank: int, here: Mapping[int, tuple[str, str]], sys: Path = Path("/sys")
) -> tuple[int, str]:
    """Bind this process to its part of `near`, if any: how many share its CPUs, what was done.

    here: of each rank of the machine the identity of the CPUs it may use, and those near its GPU. Who may use others
    than its neighbours, or alone not all, was bound by its launcher. Threads of a core stay together; few are shared.
    """
    may = sorted(os.sched_getaffinity(0))
    alike = [other for other in here if here[other][0] == here[rank][0]]
    if near is None:
        return len(alike), ""
    as_it_was = f"CPU cores {ranges(may)}, as it was started"
    if not near or len(alike) < len(here) or (len(here) == 1 and len(may) < (os.cpu_count() or 0)):
        return len(alike), f"{as_it_was}; {len(near) or 'none'} of these {len(may)} known to be near its GPU"
    sharing = [other for other in alike if here[other][1] == here[rank][1]]
    at, count = sharing.index(rank), len(sharing)
    cpus = sys / "devices/system/cpu"
    first = {cpu: min(_numbers(cpus / f"cpu{cpu}/topology/thread_siblings_list"), default=cpu) for cpu in near}
    cores = sorted({*first.values()})
    part = {*cores[len(cores) * at // count : len(cores) * (at + 1) // count]} if len(cores) >= count else {*cores}
    mine = [cpu for cpu in near if first[cpu] in part]
    try:
        for thread in os.listdir("/proc/self/task"):  # later ones inherit it
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), mine)
    except OSError as error:
        return len(alike), f"{as_it_was}, and not bound to {ranges(mine)} near its GPU: {error}"
    of = f"{'shared by' if len(mine) == len(near) else 'its part of those of'} {counted(count, 'rank')}"
    return count if len(mine) == len(near) else 1, f"CPU cores {ranges(mine)} near its GPU, {of}; memory by first use"
