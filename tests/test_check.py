"""`make check`: which commands it runs, and that it tells of a failure."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import check


def test_its_tests_exist() -> None:
    paths = [path for paths in check.QUICK for path in paths]
    assert [path for path in paths if not (check.ROOT / path).exists()] == []
    assert {"tests/config", "tests/plan", "tests/layers", "tests/test_architecture.py"} <= set(paths)


def test_files_that_changed_are_linted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "ROOT", tmp_path)
    assert check.changed() == ["."]  # no repository
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for name in ("same.py", "edited.py", "removed.py"):
        (tmp_path / name).write_text("")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    (tmp_path / "edited.py").write_text("x = 1\n")
    (tmp_path / "new.py").write_text("")
    (tmp_path / "new.txt").write_text("")
    (tmp_path / "removed.py").unlink()
    assert check.changed() == ["edited.py", "new.py"]


def test_commands() -> None:
    tests = check.commands([])
    assert len(tests) == len(check.QUICK) and all(command[0] == "pytest" for command in tests)
    assert check.commands(["tests/a.py"])[len(tests) :] == [["ruff", "check", "--quiet", "tests/a.py"]]
    both = check.commands(["tests/a.py", "tools/b.py"])[len(tests) :]
    assert both[1:] == [["mypy", "--no-error-summary", "tools/b.py"]] and both[0][-2:] == ["tests/a.py", "tools/b.py"]
    assert check.commands(["."])[-1][-2:] == ["megallama", "tools"]


def test_a_failure_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "changed", list)
    monkeypatch.setattr(check, "commands", lambda files: [["platform"], ["tokenize", "-e", "no-such-file.py"]])
    assert check.main() == 1
    out = capsys.readouterr().out
    assert "no-such-file.py" in out and "check: 1 of 2 commands passed" in out
    monkeypatch.setattr(check, "commands", lambda files: [["platform"]])
    assert check.main() == 0 and "1 of 1" in capsys.readouterr().out
