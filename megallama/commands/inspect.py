"""Look into a checkpoint or a .bin/.idx pair: `megallama inspect PATH`, which decides by what PATH is.

megallama inspect runs/x [--verify] [OTHER]                                      a checkpoint
megallama inspect PREFIX [--tokenizer PATH] [--document N] [--verify]            a .bin/.idx pair
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from megallama.commands.parser import Parser
from megallama.config.errors import exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0: as it should be, 1: damaged or different, 2: neither a checkpoint nor a pair."""
    words = list(sys.argv[1:] if argv is None else argv)
    paths = [word for word in words if not word.startswith("-")]
    if not paths:
        about = "\n\n".join(str(_module(kind).__doc__).strip() for kind in ("checkpoint", "data"))
        parser = Parser("inspect", f"{__doc__}\n{about}")
        parser.add_argument("path", help="a checkpoint, a run folder, or a pair with or without .bin or .idx")
        return exit_status(lambda: print(parser.read(words), end=""))
    pair = any(_is_pair(path) for path in paths)
    if not pair and not Path(paths[0]).exists():
        sys.stderr.write(f"error: {paths[0]} does not exist; name a checkpoint, a run folder or a .bin/.idx pair\n")
        return 2
    status: int = _module("data" if pair else "checkpoint").main(words)
    return status


def _is_pair(path: str) -> bool:
    return path.endswith((".bin", ".idx")) or (Path(f"{path}.idx").exists() and not Path(path).is_dir())


def _module(kind: str) -> ModuleType:
    return importlib.import_module(f"megallama.commands.inspect_{kind}")
