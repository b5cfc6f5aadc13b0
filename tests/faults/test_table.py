"""The table of faults names tests that exist, and the document is made from it."""

from __future__ import annotations

from tests.faults.rows import ROWS, Row
from tests.faults.table import DOCUMENT, held, lost, matching, render, result, results_of


def test_every_fault_has_tests_that_exist_or_says_why_not() -> None:
    assert [row.number for row in ROWS] == [*range(1, 65)]
    assert lost() == []
    assert [row.number for row in ROWS if bool(row.tests) == bool(row.without)] == []
    assert [row.number for row in ROWS if "|" in "".join((row.fault, row.what, *row.tests, row.without))] == []


def test_the_document_is_that_of_the_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert render(results_of(text)) == text, "run: python -m tests.faults.table --collect"


def test_names_that_stand_for_nothing_are_found() -> None:
    here = "faults/test_table.py"
    assert matching(f"{here}::test_names*") == [f"tests/{here}::test_names_that_stand_for_nothing_are_found"]
    assert len(matching(here)) == 4
    bad = Row(9, "a", "b", (f"{here}::test_nothing", "faults/test_gone.py", here))
    assert lost([bad]) == [f"9: {here}::test_nothing", "9: faults/test_gone.py"]


def test_a_row_counts_only_where_all_of_it_ran() -> None:
    here = "faults/test_table.py::test_a_row*"
    row, test = Row(1, "a", "b", (here,)), matching(here)[0]
    good = result(row, {test: [("passed", ""), ("passed", "")]}, "2026-01-02")
    assert good == "2 passed, 2026-01-02" and held(good)
    part = result(row, {test: [("passed", ""), ("skipped", "no mpirun")]}, "2026-01-02")
    assert part == "1 passed, 1 skipped (no mpirun), 2026-01-02" and not held(part)
    bad = result(row, {test: [("failed", "test_x[1]")]}, "2026-01-02")
    assert bad == "1 failed (test_x[1]), 2026-01-02" and not held(bad)
    assert not held(result(row, {}, "2026-01-02"))
    text = render({1: good, 2: part, 3: bad})
    assert "| held: all tests ran and passed | 1 |" in text and "| a test failed or was skipped | 2 |" in text
    assert results_of(text) == {1: good, 2: part, 3: bad}
