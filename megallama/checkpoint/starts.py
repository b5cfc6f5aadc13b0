"""Starts without a finished step are counted, but those that stop as asked (75) or refuse (2): so loops end."""

import hashlib
import json
import os
import socket
import threading
from datetime import datetime

from megallama.checkpoint import disk
from megallama.checkpoint.folder import CheckpointError, FolderLock, known, unfinished
from megallama.config.errors import counted
from megallama.config.schema import Config

RUNNING, KILLED = "running", "killed, or its machine died: it left no word"
# neither a cause nor a cure, and nothing of `log` is
_NO_CAUSE = "run.folder run.max_failed_starts checkpoint.folder train.stop_after_steps train.stop_after_minutes"


class Starts:
    """Those since the last finished step; only `begin` and `ended_early` write."""

    def __init__(self, lock: FolderLock, config: Config, ranks: int) -> None:
        self.lock, self._path, self._most = lock, lock.path.with_name("starts.json"), config.run.max_failed_starts
        self._fresh, tree = config.checkpoint.resume == "fresh", config.model_dump(mode="json")
        for key in _NO_CAUSE.split():
            del tree[(part := key.split("."))[0]][part[1]]
        self._same = hashlib.sha256(json.dumps([ranks, tree | {"log": 0}]).encode()).hexdigest()[:12]
        self._begun = False
        self._failed, self._own, self._changing = list[dict[str, str]](), dict[str, str](), threading.Lock()

    def begin(self) -> None:
        """Count this start, with the lock. Raises: CheckpointError after run.max_failed_starts."""
        self._begun = True
        found: list[dict[str, str]] = []
        try:
            starts = disk.parse_object(disk.read_file(self._path, 1 << 20))["starts"]
            found = [{key: str(s[key]) for key in ("time", "host", "config", "step", "end")} for s in starts]
        except (CheckpointError, ValueError, LookupError, TypeError) as error:
            if not isinstance(error, disk.MissingError):
                self.lock.log(f"warning: {self._path} is ignored: {type(error).__name__}: {error}")
        self._failed = [s | {"end": s["end"].replace(RUNNING, KILLED)} for s in found if s["config"] == self._same]
        if other := len(found) - len(self._failed):
            self.lock.log(f"{self._path}: {counted(other, 'start')} of another configuration, no longer counted")
        lines = [f"{s['time']} on {s['host']}, after step {s['step']}: {s['end']}" for s in self._failed]
        text = f"{counted(len(lines), 'start')} in a row ended before a step was finished"
        if 0 < self._most <= len(lines):
            cure = f"mend the cause, then delete {self._path}; another configuration or number of ranks is counted anew"
            text = f"{text} (run.max_failed_starts={self._most}; 0 starts without limit); {cure}:"
            raise CheckpointError("\n  ".join([text, *lines[-10:]]))
        if lines:
            self.lock.log(f"warning: {text}, the last at {lines[-1]}; run.max_failed_starts={self._most}")
        now, saved = datetime.now().astimezone().isoformat(timespec="seconds"), known(self._path.parent)
        step = saved[-1][0].step if saved and not self._fresh else 0
        self._own = {"time": now, "host": socket.gethostname(), "config": self._same, "step": str(step), "end": RUNNING}
        self._write([self._own])

    def over(self, why: str = "", status: int = 0) -> None:
        """This start ends so, or is asked to; with 0, or a step finished, none counts any more."""
        if self._own:
            own = [] if status in (0, 2, 75) else [self._own | {"end": why.partition("\n")[0][:500]}]
            self._own, self._failed = (self._own, self._failed) if status else ({}, [])
            self._write(own)

    def ended_early(self, why: str, status: int) -> int:
        """Count a start that ends before it has the lock, if it is free; the status, or 2."""
        if self._begun or status in (0, 2, 75):
            return status
        try:
            self.lock.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(patient=False)
            self.begin()
            self.over(why, status)
        except (OSError, CheckpointError) as error:
            self.lock.log(f"warning: this start is not counted in {self._path}: {error}")
            status = 2 if self._begun else status
        self._own = {}
        self.lock.release()
        return status

    def _write(self, own: list[dict[str, str]]) -> None:
        try:
            with self._changing:
                self.lock.check()
                if starts := [*self._failed[-99:], *own]:
                    disk.write_durably(new := unfinished(self._path), json.dumps({"starts": starts}, indent=1).encode())
                    os.rename(new, self._path)
                else:
                    self._path.unlink(missing_ok=True)
                disk.sync(self._path.parent)
        except (OSError, CheckpointError) as error:
            self.lock.log(f"warning: {self._path} cannot be written, so this start may be counted wrongly: {error}")
