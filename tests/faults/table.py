"""The 64 faults, what happens at each, and the tests that hold it; `docs/faults.md` is made from it.

    python -m tests.faults.table                        run the tests of all rows and write docs/faults.md
    python -m tests.faults.table --rows 1,14-20 -n 2    those of some rows; the others keep their results; -n: pytest's
    python -m tests.faults.table --junit FILE           take the results of a run that is over (pytest --junitxml=FILE)
    python -m tests.faults.table --collect              run nothing: does every test that is named exist?

A row counts where its tests ran and passed.  A row whose tests were skipped is not counted as held, and a row
without a test says so.  The names of tests are below tests/; `*` stands for any text.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from tests.faults.rows import ROWS, Row

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "faults.md"
NOT_RUN = "not run"
HEAD = """# 64 faults

What is done to a run, what happens then, and the tests that hold it. The table is made by
`python -m tests.faults.table`, which runs these tests; a result carries the day of its run. A row is held where all its
tests ran and passed: one that was skipped does not count. What random kills do to whole runs is measured by
`benchmarks/soak.py` ([results](../benchmarks/results/soak.md)).

All of it runs on CPUs, over gloo and shared memory, on one machine or between network namespaces of one. Faults inside
NCCL, a GPU or a switch are not among them.
"""


@cache
def _functions(file: str) -> tuple[str, ...]:
    """Names of the tests of a file below tests/."""
    path = ROOT / "tests" / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
    return tuple(n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def matching(pattern: str) -> list[str]:
    """The tests that `file.py::name` stands for, as pytest's ids without parameters."""
    file, _, name = pattern.partition("::")
    return [f"tests/{file}::{n}" for n in _functions(file) if fnmatchcase(n, name or "*")]


def lost(rows: Sequence[Row] = ROWS) -> list[str]:
    """Names of the table that stand for no test."""
    return [f"{row.number}: {pattern}" for row in rows for pattern in row.tests if not matching(pattern)]


def result(row: Row, outcomes: dict[str, list[tuple[str, str]]], day: str) -> str:
    """One cell of the table. outcomes: test without parameters -> how each of its cases ended, and why."""
    ends = [end for pattern in row.tests for test in matching(pattern) for end in outcomes.get(test, [("lost", test)])]
    count = Counter(kind for kind, _ in ends)
    parts = [f"{count[kind]} {kind}" for kind in ("passed", "skipped", "failed", "lost") if count[kind]]
    whys = sorted({why for kind, why in ends if kind != "passed"})
    why = f" ({'; '.join(whys)})" if whys else ""
    return f"{', '.join(parts)}{why}, {day}"


def held(cell: str) -> bool:
    """Whether all tests of a row ran and passed."""
    return re.match(r"[1-9]\d* passed, [\d-]+$", cell) is not None


def render(results: dict[int, str]) -> str:
    """The document. results: by number of the row; a row that is not there was not run."""
    lines = ["| # | fault | what happens | tests | result |", "|---|---|---|---|---|"]
    for row in ROWS:
        tests = "<br>".join(f"`{test}`" for test in row.tests) or f"no test: {row.without}"
        cell = results.get(row.number, NOT_RUN) if row.tests else "no test"
        lines.append(f"| {row.number} | {row.fault} | {row.what} | {tests} | {cell} |")
    cells = [results.get(row.number, NOT_RUN) for row in ROWS if row.tests]
    good, none, idle = sum(map(held, cells)), len(ROWS) - len(cells), cells.count(NOT_RUN)
    totals = [
        ("rows", len(ROWS)), ("held: all tests ran and passed", good), ("not run", idle),
        ("a test failed or was skipped", len(cells) - good - idle), ("without a test", none),
    ]  # fmt: skip
    counts = ["| total | |", "|---|---|", *(f"| {name} | {number} |" for name, number in totals)]
    return "\n".join([HEAD, *counts, "", *lines, ""])


def results_of(document: str) -> dict[int, str]:
    """The results that stand in a document."""
    found = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", document, re.M)
    return {int(number): cell for number, cell in found if cell not in (NOT_RUN, "no test")}


def _run(rows: Sequence[Row], options: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    tests = sorted({test for row in rows for pattern in row.tests for test in matching(pattern)})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *options, *tests]
        subprocess.run(command, cwd=ROOT, check=False)
        return outcomes_of(report)


def outcomes_of(report: Path) -> dict[str, list[tuple[str, str]]]:
    """Test without parameters -> how each of its cases ended, and why, from pytest's `--junitxml`."""
    outcomes: dict[str, list[tuple[str, str]]] = {}
    for case in xml.parse(report).iter("testcase"):
        name = case.get("name", "").partition("[")[0]
        test = f"{case.get('classname', '').replace('.', '/')}.py::{name}"
        kind, why = "passed", ""
        for end in case:
            if end.tag == "skipped":
                kind, why = "skipped", end.get("message", "").replace("|", "/")
            elif end.tag in ("failure", "error"):
                kind, why = "failed", case.get("name", "").replace("|", "/")
        outcomes.setdefault(test, []).append((kind, why))
    return outcomes


def _chosen(text: str) -> list[Row]:
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers |= {*range(int(first), int(last or first) + 1)}
    return [row for row in ROWS if row.number in numbers]


def main() -> int:
    """1 where a test is lost or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=f"1-{len(ROWS)}")
    parser.add_argument("--junit", type=Path)
    parser.add_argument("--collect", action="store_true")
    args, options = parser.parse_known_args()
    rows = [row for row in _chosen(args.rows) if row.tests]
    if missing := lost(rows):
        print("no such test:", *missing, sep="\n  ")
        return 1
    results = results_of(DOCUMENT.read_text(encoding="utf-8")) if DOCUMENT.exists() else {}
    if not args.collect:
        outcomes = outcomes_of(args.junit) if args.junit else _run(rows, options)
        day = time.strftime("%Y-%m-%d", time.gmtime())
        results |= {row.number: result(row, outcomes, day) for row in rows}
    DOCUMENT.write_text(render(results), encoding="utf-8")
    bad = [row.number for row in rows if not args.collect and re.search("failed|lost", results[row.number])]
    print(f"{len(rows)} rows with tests; failed: {bad or 'none'}; see {DOCUMENT.relative_to(ROOT)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
