"""What to run after every edit: ``make check``, or ``python -m tests.check``; within a minute on two cores.

Lint of the files that differ from the last commit, and the tests of the rooms that need no other processes.
Two of the commands run at a time; what a failing one printed is shown at the end.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Paths of tests, one pytest each. Whoever adds a room without torch adds its tests here.
QUICK: tuple[tuple[str, ...], ...] = (
    ("tests/layers", "tests/data/test_indexed.py", "tests/data/test_samples.py", "tests/data/test_blend.py"),
    ("tests/plan", "tests/forecast"),
    ("tests/test_architecture.py", "tests/config", "tests/analysis/test_rooms.py", "tests/commands/test_cli.py"),
)


def changed() -> list[str]:
    """Python files that differ from the last commit, new ones included; all of them where git does not know."""
    found: list[str] = []
    edited, new = ("diff", "--name-only", "--diff-filter=d", "HEAD"), ("ls-files", "--others", "--exclude-standard")
    for arguments in (edited, new):
        done = subprocess.run(["git", *arguments, "--", "*.py"], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            return ["."]
        found += done.stdout.splitlines()
    return found


def commands(files: Sequence[str]) -> list[list[str]]:
    """The commands of a check where these files have changed, the longest first."""
    tests = [["pytest", "-q", "--no-header", "--durations=0", "--durations-min=5", *paths] for paths in QUICK]
    typed = ["megallama", "tools"] if files == ["."] else [f for f in files if f.startswith(("megallama/", "tools/"))]
    lint = [["ruff", "check", "--quiet", *files]] if files else []
    return [*tests, *lint, *([["mypy", "--no-error-summary", *typed]] if typed else [])]


def main() -> int:
    """Run everything; 1 if anything failed."""
    begin = time.monotonic()

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)

    todo = commands(changed())
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(run, todo))
    failed = [d for d in done if d.returncode]
    for result in failed:
        print(" ".join(result.args[1:]), result.stdout, result.stderr, sep="\n")
    print(f"check: {len(todo) - len(failed)} of {len(todo)} commands passed, {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
