"""Can this job hang?  ``python tools/dryrun.py [CONFIG.toml] ranks=N [section.key=value ...]``.

Builds every distinct rank of the job on this CPU, without memory for weights, executes what a few steps communicate,
and proves over all ranks that it fits together: every collective has all its members in one order with the same
shapes and formats, every send its receive, and no rank waits for ever.

Exit status 0 if so, 1 with the first disagreement, 2 if the configuration has errors; all of them are printed.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megallama.config.errors import ConfigError, MegallamaError  # noqa: E402
from megallama.config.load import load  # noqa: E402
from megallama.plan.plan import make_plan  # noqa: E402

USAGE = "usage: python tools/dryrun.py [CONFIG.toml] ranks=N [section.key=value ...]"


def main(argv: Sequence[str]) -> int:
    """Print the report; 0, 1 with the disagreement or 2 with the errors on stderr."""
    try:
        files = [a for a in argv if "=" not in a and not a.startswith("-")]
        counts = [a.partition("=")[2] for a in argv if a.removeprefix("--").startswith("ranks=")]
        if len(files) > 1:
            raise ConfigError(f"two configuration files, {files[0]} and {files[1]}; give one\n{USAGE}")
        if len(counts) != 1 or not counts[0].isdecimal() or int(counts[0]) < 1:
            said = f", not {' '.join(f'ranks={c}' for c in counts)}" if counts else ""
            raise ConfigError(f"a dry run needs one number of ranks{said}; write for example ranks=8\n{USAGE}")
        ranks = int(counts[0])
        overrides = [a for a in argv if a not in files and not a.removeprefix("--").startswith("ranks=")]
        config = load(Path(files[0]) if files else None, overrides, ranks=ranks, need_data=False)
        plan = make_plan(config, ranks)
    except MegallamaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from megallama.comm.agreement import Disagreement
    from megallama.train.dryrun import dry_run

    try:
        print(dry_run(plan))
    except Disagreement as error:
        print(f"this job can hang: {error}", file=sys.stderr)
        return 1
    print(f"memory      {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB at most")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
