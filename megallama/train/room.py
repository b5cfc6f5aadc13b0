"""Whether the ranks of a machine have room for what a run needs, as kernel and device say."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from megallama.config.errors import ConfigError, counted

GIB = 2**30
RankNeeds = tuple[str, int, int, dict[str, int]]  # host, bytes: certain, by estimate, `room`


def room(device: torch.device, root: Path = Path("/")) -> dict[str, int]:
    """Bytes that this rank shares with others, by the name of what limits them."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return {f"{gpu.name} {gpu.uuid}": gpu.total_memory}
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"physical memory": physical, **dict(_cgroups(root))}


def _cgroups(root: Path) -> Iterator[tuple[str, int]]:
    """The limits of this process's control group and of those around it, versions 1 and 2."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
            at = top / path.lstrip("/")
            for folder in [at, *at.parents]:
                file = folder / ("memory.limit_in_bytes" if controllers else "memory.max")
                with suppress(OSError, ValueError):  # a name of the host in a container; "max"
                    if folder.is_relative_to(top):
                        yield str(file), int(file.read_text())


def check_room(needs: Sequence[RankNeeds]) -> list[str]:
    """Warnings where an estimate exceeds a limit. Raises: ConfigError where certain needs do."""
    warnings = []
    limits = {(host, name, limit) for host, _, _, has in needs for name, limit in has.items()}
    for host, name, limit in sorted(limits):
        sharing = [(bytes_, most) for there, bytes_, most, has in needs if there == host and name in has]
        certain, estimate = map(sum, zip(*sharing, strict=True))
        has = f"{name} on {host} is {limit / GIB:.4g} GiB"
        if certain > limit:
            raise ConfigError(
                f"the state of {counted(len(sharing), 'rank')} (weights, gradients, optimizer) takes exactly "
                f"{certain / GIB:.4g} GiB, but {has}; use more machines, fewer ranks on each, or a smaller model"
            )
        if estimate > limit:
            warnings.append(f"with activations {estimate / GIB:.4g} GiB are expected, but {has}: it may be killed")
    return warnings
