"""A run that is killed, anywhere, and started again: the same bytes, and no job done twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megallama.config.errors import DataError
from megallama.text import preprocess as module
from megallama.text.preprocess import preprocess
from megallama.text.shards import WorkFolder
from tests.words import text_of

ROOT = Path(__file__).resolve().parents[2]
PLACES = [("add", 1), ("add", 17), ("end", 1), ("end", 9), ("join", 1), ("join", 13),
          ("commit", 1), ("commit", 2), ("replace", 1), ("replace", 2), ("replace", 4), ("replace", 5), ("replace", 6),
          ("remove", 1)]  # fmt: skip


def mpirun(ranks: int) -> list[str]:
    """The command that starts that many ranks; skips where there is no MPI."""
    found = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip("no mpirun found: pip install mpi4py mpich (or any MPI) to run this test")
    pytest.importorskip("mpi4py", reason="pip install mpi4py to run this test")
    return [found, "-n", str(ranks)]


def run(before: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """die.py with some launcher before it; what a killed job has left in /dev/shm is removed."""
    command = [*before, sys.executable, str(ROOT / "tests" / "text" / "die.py"), *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr, done.stderr
    for name in re.findall(r"/dev/shm/\S+", done.stderr):
        Path(name).unlink(missing_ok=True)
    return done


def digests(prefix: Path) -> dict[str, str]:
    return {p.name.removeprefix(prefix.name): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in prefix.parent.glob(prefix.name + "*") if p.is_file()}  # fmt: skip


def journal(prefix: Path) -> list[int]:
    """The jobs in all journals, in ascending order."""
    lines = [line for p in Path(f"{prefix}.parts").glob("*/*.journal") for line in p.read_text().splitlines()]
    return sorted(json.loads(line)["job"] for line in lines)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 jobs or so, in two files, with some bad lines."""
    folder = tmp_path_factory.mktemp("resume") / "in"
    folder.mkdir()
    for name, first in (("a.jsonl", 0), ("b.jsonl", 1500)):
        lines = [json.dumps({"text": text_of(i)}) if i % 211 else "{" for i in range(first, first + 1500)]
        (folder / name).write_text("\n".join(lines))
    (folder / "c.txt").write_text("x" * 70_000)
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tokenizer_path: Path) -> dict[str, str]:
    """What a run in one go writes."""
    preprocess([corpus], corpus.parent / "whole", tokenizer_path, split_valid=0.1, max_bad="15")
    return digests(corpus.parent / "whole")


def options(corpus: Path, tokenizer_path: Path, prefix: Path) -> tuple[object, ...]:
    return corpus, "--output", prefix, "--tokenizer", tokenizer_path, "--split-valid", 0.1, "--quiet", "--max-bad", 15


@pytest.mark.parametrize("where, count", PLACES)
def test_killed_in_one_process(
    corpus: Path, tokenizer_path: Path, undisturbed: dict[str, str], tmp_path: Path, where: str, count: int
) -> None:
    arguments = (*options(corpus, tokenizer_path, tmp_path / "o"), "--workers", 1)
    assert run([], 0, where, count, *arguments).returncode == -9
    done = journal(tmp_path / "o")
    assert len(done) == {"add": count - 1, "end": count - 1}.get(where, len(done))
    if where not in ("add", "end"):
        assert done
    again = run([], 0, "end", 0, *arguments)
    assert again.returncode == 0, again.stderr
    assert "15 in all and 10% of one file): 15 not JSON" in again.stderr and "b.jsonl:189: not JSON" in again.stderr
    assert digests(tmp_path / "o") == undisturbed
    assert not Path(f"{tmp_path}/o.parts").exists()


@pytest.mark.parametrize("launcher, rank, where, count", [
    ("2 workers", 0, "end", 3), ("2 workers", 0, "join", 8), ("2 workers", 0, "replace", 3),
    ("mpirun", 0, "end", 3), ("mpirun", 0, "join", 8), ("mpirun", 0, "replace", 3), ("mpirun", 1, "end", 2),
])  # fmt: skip
def test_killed_with_several_processes(
    corpus: Path, tokenizer_path: Path, undisturbed: dict[str, str], tmp_path: Path,
    launcher: str, rank: int, where: str, count: int,
) -> None:  # fmt: skip
    before = mpirun(2) if launcher == "mpirun" else []
    arguments = (*options(corpus, tokenizer_path, tmp_path / "o"), *([] if before else ["--workers", 2]))
    assert run(before, rank, where, count, *arguments).returncode not in (0, 2)
    some = journal(tmp_path / "o")
    assert some and len(set(some)) == len(some)
    assert run(before, 0, "remove", 1, *arguments).returncode not in (0, 2)  # finished, but for the end
    assert journal(tmp_path / "o") == list(range(len(journal(tmp_path / "o")))) and len(journal(tmp_path / "o")) > 20
    assert run(before, 0, "end", 0, *arguments).returncode == 0
    assert digests(tmp_path / "o") == undisturbed
    assert not Path(f"{tmp_path}/o.parts").exists()


def test_killed_often_and_continued_by_other_numbers_of_processes(
    corpus: Path, tokenizer_path: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    arguments, seen = options(corpus, tokenizer_path, tmp_path / "o"), 0
    for before, more in (([], ["--workers", 1]), (mpirun(2), []), ([], ["--workers", 3]), (mpirun(4), [])):
        assert run(before, 0, "end", 2, *arguments, *more).returncode not in (0, 2)
        assert len(journal(tmp_path / "o")) > seen
        seen = len(journal(tmp_path / "o"))
    assert run([], 0, "end", 0, *arguments).returncode == 0
    assert digests(tmp_path / "o") == undisturbed


LIMIT = {"max_document_bytes": 200, "max_bad": "100%", "max_bad_per_file": "100%"}


@pytest.mark.parametrize("change", ["input", "tokenizer", "key", "limit"])
def test_a_changed_command_never_uses_old_parts(
    jsonl: Path, tokenizer_path: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl.read_bytes().replace(b'{"text"', b'{"body": "other", "text"'))
    arguments = [tmp_path / "a.jsonl", "--output", tmp_path / "o", "--workers", 1]
    assert run([], 0, "commit", 1, *arguments, "--tokenizer", tokenizer_path).returncode == -9
    changed = {"key": {"json_key": "body"}, "limit": LIMIT}.get(change, {})
    if change == "tokenizer":
        from megallama.text.train_tokenizer import train_tokenizer

        tokenizer_path = train_tokenizer([jsonl], tmp_path / "t.model", 310)
    elif change == "input":
        stat = (tmp_path / "a.jsonl").stat()
        (tmp_path / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes().replace(b"fox", b"dog"))
        assert (tmp_path / "a.jsonl").stat().st_size == stat.st_size
    monkeypatch.setattr(module, "TASK_BYTES", 20_000)
    preprocess([tmp_path / "a.jsonl"], tmp_path / "o", tokenizer_path, **changed)
    preprocess([tmp_path / "a.jsonl"], tmp_path / "fresh", tokenizer_path, **changed)
    assert digests(tmp_path / "o") == digests(tmp_path / "fresh")
    assert not Path(f"{tmp_path}/o.parts").exists()


def killed(jsonl: Path, tokenizer_path: Path, tmp_path: Path) -> tuple[Path, tuple[object, ...]]:
    """The work folder of a run killed at its end, and its arguments."""
    arguments = (jsonl, "--output", tmp_path / "o", "--tokenizer", tokenizer_path, "--workers", 1)
    assert run([], 0, "commit", 1, *arguments).returncode == -9
    return next(p for p in Path(f"{tmp_path}/o.parts").iterdir() if p.is_dir()), arguments


def test_a_line_of_the_journal_that_was_cut_off_is_no_part(jsonl: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    folder, arguments = killed(jsonl, tokenizer_path, tmp_path)
    path = next(folder.glob("*.journal"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + b"\0" * 40 + b"\n" + lines[-1][:30])
    with next(folder.glob("*.tokens")).open("ab") as file:
        file.write(b"of an unfinished job")
    assert run([], 0, "end", 0, *arguments).returncode == 0
    preprocess([jsonl], tmp_path / "fresh", tokenizer_path)
    assert digests(tmp_path / "o") == digests(tmp_path / "fresh")


@pytest.mark.parametrize("kind", ["tokens", "documents"])
def test_a_damaged_part_is_noticed(jsonl: Path, tokenizer_path: Path, tmp_path: Path, kind: str) -> None:
    folder, arguments = killed(jsonl, tokenizer_path, tmp_path)
    path = next(folder.glob(f"*.{kind}"))
    data = bytearray(path.read_bytes())
    data[4] ^= 1
    path.write_bytes(data)
    done = run([], 0, "end", 0, *arguments)
    assert done.returncode == 2 and f"is damaged; delete {tmp_path}/o.parts and start again" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.parts"]
    data[4] ^= 1
    path.write_bytes(data[: len(data) // 2])  # what is missing is made again
    assert run([], 0, "end", 0, *arguments).returncode == 0
    preprocess([jsonl], tmp_path / "fresh", tokenizer_path)
    assert digests(tmp_path / "o") == digests(tmp_path / "fresh")


def test_a_second_run_for_the_same_output_is_refused(jsonl: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    with WorkFolder(str(tmp_path / "o"), {}):
        with pytest.raises(DataError, match="another process is writing .*o now; wait for it, or use another --output"):
            preprocess([jsonl], tmp_path / "o", tokenizer_path)
    preprocess([jsonl], tmp_path / "o", tokenizer_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.bin", "o.idx", "o.json", "o.sums"]
