"""What a run will do, before it starts: ``python tools/plan.py [CONFIG.toml] ranks=N [section.key=value ...]``.

Prints the plan: layers and parameters per stage, batch arithmetic, memory per rank, the pipeline's bubble.
Needs neither torch nor a GPU. Exit status 2 if the configuration has errors; all of them are printed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megallama.config.errors import ConfigError, MegallamaError  # noqa: E402
from megallama.config.load import load  # noqa: E402
from megallama.plan.plan import make_plan  # noqa: E402

USAGE = "usage: python tools/plan.py [CONFIG.toml] ranks=N [section.key=value ...]"


def main(argv: Sequence[str]) -> int:
    """Print the plan; 0, or 2 with the errors on stderr."""
    try:
        files = [a for a in argv if "=" not in a and not a.startswith("-")]
        counts = [a.partition("=")[2] for a in argv if a.removeprefix("--").startswith("ranks=")]
        if len(files) > 1:
            raise ConfigError(f"two configuration files, {files[0]} and {files[1]}; give one\n{USAGE}")
        if len(counts) != 1 or not counts[0].isdecimal() or int(counts[0]) < 1:
            said = f", not {' '.join(f'ranks={c}' for c in counts)}" if counts else ""
            raise ConfigError(f"the plan needs one number of ranks{said}; write for example ranks=8\n{USAGE}")
        ranks = int(counts[0])
        overrides = [a for a in argv if a not in files and not a.removeprefix("--").startswith("ranks=")]
        config = load(Path(files[0]) if files else None, overrides, ranks=ranks, need_data=False)
        print(make_plan(config, ranks))
    except MegallamaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
