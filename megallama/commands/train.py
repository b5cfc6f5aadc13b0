"""What `megallama train --help` says; the training itself is `megallama.pretrain`."""

from __future__ import annotations

from collections.abc import Sequence

from megallama import pretrain
from megallama.commands.parser import Parser, section_table


def run(argv: Sequence[str]) -> int:
    """Print the help, of all or of a section of the configuration."""
    about = (pretrain.__doc__ or "").replace("python -m megallama.pretrain", "megallama train")
    parser = Parser("train", about, config=True)
    parser.epilog = f"sections (megallama train --help SECTION explains the settings of one):\n{section_table()}"
    if not argv:
        parser.print_help()
        return 2
    parser.read(argv)  # it asks for help, and leaves
    return 0
