"""What an evaluation was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megallama.config.errors import ConfigError, DataError
from megallama.evaluation.items import Item, read_items


@dataclass(frozen=True)
class Request:
    """What `megallama evaluate` was asked for; its options have the same names."""

    checkpoint: Path
    settings: tuple[str, ...] = ()
    data: tuple[Path, ...] = ()
    items: tuple[Path, ...] = ()
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    shots: int | None = None
    limit: int | None = None
    context: int = 0
    json_key: str = "text"
    tokenizer: Path | None = None
    seed: int = 1234
    output: Path | None = None

    def check(self) -> dict[str, list[Item]]:
        """The items by name of their file. Raises: MegallamaError, before anything is loaded."""
        if not (self.data or self.items or self.tasks):
            raise ConfigError("nothing to evaluate on; give --data, --items or --tasks")
        for name, value, least in (("limit", self.limit, 1), ("shots", self.shots, 0), ("context", self.context, 0)):
            if value is not None and value < least:
                raise ConfigError(f"--{name}={value} is too small; write {least} or more")
        names = [*self.tasks, *(path.stem for path in self.items)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"two tasks would be called {twice[0]!r}; rename one of the files")
        for path in (*self.data, *self.items):
            if not (path.exists() or Path(f"{path}.idx").exists() or "*" in str(path)):
                raise DataError(f"{path} does not exist; name files that are there")
        return {path.stem: read_items(path)[: self.limit] for path in self.items}
