"""A TOML file that a user wrote, as a tree; what is wrong with it, with its line."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from megallama.config.errors import ConfigError


def read_toml(file: Path, what: str) -> dict[str, Any]:
    """Read `file`, which is `what` in words. Raises: ConfigError with the line where the file is no TOML."""
    text = ""
    try:
        text = file.read_text(encoding="utf-8-sig")
        return tomllib.loads(text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot read {what} {file}: {reason}; give the path of a TOML file") from None
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
        wrong = f"{file} is not valid TOML: {error}; write lines like tp = 2 under [parallel]"
        raise ConfigError(wrong + _line_of(text, error)) from None


def _line_of(text: str, error: Exception) -> str:
    """On a line of its own, the line of `text` that a parser's error names; empty if it names none."""
    if isinstance(error, UnicodeDecodeError):
        text = error.object.decode(errors="replace")
        number = error.object.count(b"\n", 0, error.start) + 1
    elif found := re.search(r"at line (\d+)|at end of document", str(error)):
        number = int(found[1] or len(text.rstrip().splitlines()))
    else:
        return ""
    line = [*text.split("\n"), ""][number - 1].strip()
    return f"\n  line {number}: {line if len(line) <= 100 else line[:100] + '...'}"
