"""How a run is: what its supervisors have written, read from any host, while it lives and after."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megallama.checkpoint import disk
from megallama.config.errors import MegallamaError, counted
from megallama.recovery.doctor import waits_for, where
from megallama.recovery.goodput import KINDS
from megallama.recovery.node import STATUS_PERIOD
from megallama.train.log import human_duration

OLD = 3 * STATUS_PERIOD  # seconds after which a host's file says that its supervisors have gone


def read(folder: Path) -> dict[str, Any]:
    """Everything that is known of the run in `folder`: `end`, `goodput`, `members`, `hosts`. Raises: MegallamaError."""
    files = {"end": "exit.json", "goodput": "goodput.json", "members": "status/members.json"}
    found: dict[str, Any] = {name: _json(folder / file) for name, file in files.items()}
    found["hosts"] = [host for host in map(_json, sorted((folder / "status").glob("*.json"))) if "ranks" in host]
    if not (found["end"] or found["goodput"] or found["hosts"]):
        raise MegallamaError(
            f"{folder} holds no status of a run; give the folder that run.folder named. Supervisors write it "
            f"every {STATUS_PERIOD:g} s, where run.supervisor is true"
        )
    return found


def _json(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return disk.parse_object(file.read_bytes())
    return {}


def lines(found: Mapping[str, Any], now: float) -> Iterator[str]:
    """What is printed."""
    end, goodput = found["end"], found["goodput"]
    newest = max((host["time"] for host in found["hosts"]), default=0.0)
    if end:
        ended = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(end["time"]))
        yield f"ended {ended} with status {end['status']} in step {end['step']}"
        yield f"cause: {end['cause']}" + ("" if end["status"] in (0, 75) else f"\n(rank {end['rank']}, {end['host']})")
    elif now - newest > OLD:
        yield f"no news for {human_duration(now - newest)}: all its processes have been killed, or the folder is stuck"
    else:
        yield "running"
    if goodput:
        total = sum(goodput["seconds"].values()) or 1.0
        parts = [f"{kind} {human_duration(goodput['seconds'][kind])}" for kind in KINDS]
        share = f"{100 * goodput['seconds']['productive'] / total:.1f} % productive"
        yield f"{share}: {', '.join(parts)}; {counted(goodput['restarts'], 'restart')}"
    for host in found["hosts"]:
        age = now - host["time"]
        old = f"; nothing since {human_duration(age)}" if not end and age > OLD else ""
        yield f"{host['host']}: {counted(len(host['ranks']), 'rank')}{old}"
        for rank, report in host["ranks"].items():
            launched = report.get("launched", int(rank))
            yield f"  rank {rank}{f' (launched as {launched})' * (launched != int(rank))}: {_rank(report)}"
    for launched, host in found["members"].get("waiting", {}).items():
        yield f"launched rank {launched} waits without work on {host}"
    yield from (f"launched rank {launched} is lost" for launched in found["members"].get("lost", ()))


def _rank(report: Mapping[str, Any]) -> str:
    if report["process"] == "X":
        cause = report["cause"] or {"text": "it has left without a word"}
        return f"has left in {where(report)}: {cause['text'].splitlines()[0]}"
    parts = [where(report)]
    if wait := report.get("wait"):
        parts.append(f"waits for {wait['seconds']:.1f} s in {waits_for(wait)}")
    elif report["seconds"] > STATUS_PERIOD:
        parts.append(f"nothing new for {report['seconds']:.1f} s")
    parts += ["its process is stopped"] * (report["process"] in "Tt")
    parts += ["its supervisor is silent"] * report["supervisor_silent"]
    if (own := report["own_seconds_per_step"]) is not None:
        parts.append(f"own work {own:.3g} s a step")
    return "; ".join(parts)
