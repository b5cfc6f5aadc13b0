"""Draw the rooms of the package and who imports whom: `python tools/draw_rooms.py [FILE.svg]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megallama.analysis.rooms import draw, read_rooms  # noqa: E402
from megallama.commands.exit import exit_status  # noqa: E402
from megallama.config.errors import ConfigError  # noqa: E402


def run() -> None:
    """Write the picture. Raises: MegallamaError where rooms import one another or the file cannot be written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", default=ROOT / "docs" / "rooms.svg", type=Path, metavar="FILE.svg")
    target = parser.parse_args().file
    picture = draw(read_rooms(ROOT / "megallama"))
    try:
        target.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}; name a file in a folder that exists") from None


if __name__ == "__main__":
    raise SystemExit(exit_status(run))
