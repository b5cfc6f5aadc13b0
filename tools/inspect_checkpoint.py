"""`megallama inspect checkpoint` under the name it had before there was one command."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megallama.cli import command  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(command("inspect")())
