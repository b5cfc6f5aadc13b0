"""What a run will do, before it starts: ``python tools/plan.py [CONFIG.toml] ranks=N [section.key=value ...]``.

Prints the plan: layers and parameters per stage, batch arithmetic, memory per rank, the pipeline's bubble, and the
predicted time, speed, length, energy and CO2 on a kind of GPU.  ``--json`` prints it for programs, ``--search`` looks
for the fastest layout, ``--rows`` prices a table of layouts.  Needs neither torch nor a GPU.  Exit status 2 if the
configuration has errors; all of them are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megallama.config.errors import ConfigError, exit_status  # noqa: E402
from megallama.config.load import load  # noqa: E402
from megallama.plan.forecast import as_dict, forecast, text  # noqa: E402
from megallama.plan.hardware import load_machine  # noqa: E402
from megallama.plan.plan import make_plan  # noqa: E402
from megallama.plan.rows import predict_rows  # noqa: E402
from megallama.plan.search import search, table  # noqa: E402

USAGE = "usage: python tools/plan.py [CONFIG.toml] ranks=N [hardware=KIND] [section.key=value ...]"


def main(argv: Sequence[str]) -> int:
    """Print what was asked for; 0, or 2 with the errors on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="CONFIG.toml, ranks=N, hardware=a100-80g|h100|h200|FILE.toml, "
                        "kernel=flash1|flash2|flash3, section.key=value")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the whole plan as JSON")
    parser.add_argument("--search", action="store_true", help="the ten fastest layouts of this model and batch")
    parser.add_argument("--rows", metavar="FILE", help="predict every row of a CSV with validate.csv's columns")
    parser.add_argument("-o", metavar="FILE", dest="out", help="where --rows writes; default standard output")
    args = parser.parse_intermixed_args([a.removeprefix("--") if "=" in a else a for a in argv])
    if args.rows:
        return rows(Path(args.rows), args.out)
    return plan(args)


def plan(args: argparse.Namespace) -> int:
    """Print one plan, or the layouts that a search finds."""
    files = [a for a in args.words if "=" not in a]
    own = {k: [a.partition("=")[2] for a in args.words if a.startswith(f"{k}=")] for k in ("ranks", "hardware", "kernel")}
    if len(files) > 1:
        raise ConfigError(f"two configuration files, {files[0]} and {files[1]}; give one\n{USAGE}")
    if len(own["ranks"]) != 1 or not own["ranks"][0].isdecimal() or int(own["ranks"][0]) < 1:
        said = f", not {' '.join(f'ranks={c}' for c in own['ranks'])}" if own["ranks"] else ""
        raise ConfigError(f"the plan needs one number of ranks{said}; write for example ranks=8\n{USAGE}")
    ranks = int(own["ranks"][0])
    machine = load_machine((own["hardware"] or ["a100-80g"])[-1])
    kernel = (own["kernel"] or ["flash3" if machine.gpu.peak_tflops > 400 else "flash2"])[-1]
    if kernel not in machine.kernels:
        raise ConfigError(f"kernel={kernel} is unknown; use {', '.join(machine.kernels)}")
    overrides = [a for a in args.words if a not in files and a.partition("=")[0] not in own]
    config = load(Path(files[0]) if files else None, overrides, ranks=None if args.search else ranks, need_data=False)
    if args.search:
        found, legal, full = search(config, ranks, machine, kernel)
        print(f"{legal:,} legal layouts of {ranks} ranks on {machine.name}, {full:,} of them too large; the best:")
        print(table(found))
        return 0
    made = make_plan(config, ranks)
    outlook = forecast(made, machine, kernel)
    print(json.dumps(as_dict(outlook), indent=1) if args.json else f"{made}\n\n{text(outlook)}")
    return 0


def rows(path: Path, out: str | None) -> int:
    """Predict a table; rows that cannot be predicted are named on standard error, and the status is 1."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--rows {path} cannot be read: {error}") from None
    written, bad, good = predict_rows(content)
    if out:
        Path(out).write_text(written, encoding="utf-8")
    else:
        sys.stdout.write(written)
    for b in bad:
        print(f"line {b.line} is not predicted: {b.reason}", file=sys.stderr)
    print(f"{len(good)} rows predicted, {len(bad)} not", file=sys.stderr)
    return 1 if bad and not good else 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
