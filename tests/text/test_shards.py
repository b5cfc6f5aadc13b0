"""Parts on disk: what one process writes is what the first one reads, in small pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megallama.config.errors import DataError
from megallama.text import shards as module
from megallama.text.documents import Record
from megallama.text.shards import ShardWriter, WorkFolder

JOBS = st.lists(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=5), min_size=1, max_size=4)
U16 = np.dtype("<u2")


def write(folder: Path, name: str, jobs: list[list[list[list[int]]]], *, sync: bool = False) -> None:
    """Jobs of blocks of documents, each document's size in bytes ten times that in tokens."""
    writer = ShardWriter(folder, name, sync=sync)
    for number, job in enumerate(jobs):
        part = writer.begin(number)
        for block in job:
            rows = np.array([(len(ids), 10 * len(ids)) for ids in block], "<i4").reshape(-1, 2)
            writer.add(np.array(sum(block, []), U16), rows)
        for line in range(30 * number):
            part.text(Record("f", line, b"", ("kind", "why"), 7), "text")
        writer.end()
    writer.begin(99)  # and one that is never finished
    writer.add(np.array([1, 2], U16), np.array([[2, 5]], "<i4"))


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(JOBS, min_size=1, max_size=3), st.integers(1, 8), st.integers(1, 3), st.booleans())
def test_what_was_written_is_read(
    tmp_path: Path, jobs: list[list[list[list[int]]]], span: int, rows: int, sync: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch, WorkFolder(str(tmp_path / "o"), {"a": 1}) as work:
        patch.setattr(module, "SPAN", span)
        patch.setattr(module, "ROWS", rows)
        write(work.path, "000-00000", jobs, sync=sync)
        with pytest.raises(DataError, match="another process is writing"):
            WorkFolder(str(tmp_path / "o"), {"a": 1})
        work._journals = sorted(work.path.glob("*.journal"))
        found = work.finished()
        assert sorted(found) == list(range(len(jobs)))
        for number, job in enumerate(jobs):
            part, documents = found[number], [ids for block in job for ids in block]
            pieces = list(work.read(part, U16))
            assert all(len(r) <= rows and t.dtype == U16 for t, r in pieces)
            assert [x for t, _ in pieces for x in t.tolist()] == sum(documents, [])
            assert [x for _, r in pieces for x in r.tolist()] == [[len(ids), 10 * len(ids)] for ids in documents]
            assert part.skipped == ({"kind": 30 * number} if number else {}) and len(part.examples) <= 20
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_part_is_removed_after_an_error_and_one_with_a_part_stays(tmp_path: Path) -> None:
    for jobs, left in (([], []), ([[[[1, 2]]]], ["o.parts"])):
        with pytest.raises(KeyboardInterrupt), WorkFolder(str(tmp_path / "o"), {}) as work:
            assert work.start == 0
            write(work.path, "000-00000", jobs)
            raise KeyboardInterrupt
        assert [p.name for p in tmp_path.iterdir()] == left
    with WorkFolder(str(tmp_path / "o"), {}) as work:  # the next start has names of its own
        assert work.start == 1 and list(work.finished()) == [0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["tokens", "documents"])
def test_a_part_at_the_end_of_its_files_is_whole_until_a_byte_is_missing(tmp_path: Path, kind: str) -> None:
    with pytest.raises(KeyboardInterrupt), WorkFolder(str(tmp_path / "o"), {}) as work:
        writer = ShardWriter(work.path, "000-00000", sync=False)
        writer.begin(0)
        writer.add(np.array([1, 2], U16), np.array([[2, 5]], "<i4"))
        writer.end()
        raise KeyboardInterrupt
    path = work.path / f"000-00000.{kind}"
    for raw, found in ((path.read_bytes(), [0]), (path.read_bytes()[:-1], [])):
        path.write_bytes(raw)
        with pytest.raises(KeyboardInterrupt), WorkFolder(str(tmp_path / "o"), {}) as work:
            assert list(work.finished()) == found
            raise KeyboardInterrupt
