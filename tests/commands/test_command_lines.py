"""What every command line has in common: --help, options that do not exist, a reader that goes away, Ctrl-C."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megallama.commands.exit import exit_status
from megallama.config.errors import MegallamaError

ROOT = Path(__file__).parents[2]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of a tool, as a program but in this process."""
    monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)  # this process keeps its own
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    return int(left.value.code or 0)


def tree() -> dict[Path, float]:
    """Every file of the repository that a tool might write, and when it was written."""
    folders = (ROOT, ROOT / "docs", ROOT / "tools", ROOT / "examples")
    return {p: p.stat().st_mtime for folder in folders for p in folder.iterdir() if not p.name.startswith(".")}


@pytest.mark.parametrize("name", TOOLS)
def test_help_only_helps(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree()
    assert run(name, monkeypatch, "--help") == 0
    out, err = capsys.readouterr()
    assert "usage: " in out or f"python tools/{name}.py" in out
    assert err == "" and tree() == before


@pytest.mark.parametrize("name", TOOLS)
def test_an_option_that_does_not_exist(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree()
    needed = {"explain_step": ["a.toml", "1"], "preprocess_data": ["x", "--output", "y", "--tokenizer", "z"]}
    assert run(name, monkeypatch, *needed.get(name, []), "--no-such-option") == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and tree() == before
    assert "no-such-option" in err or "arguments are required" in err


def test_a_reader_that_has_gone() -> None:
    """As with `| head`, when it has seen enough: no word, and the status that the shell gives it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    read, write = os.pipe()
    os.close(read)
    commands = {name: [f"tools/{name}.py"] for name in TOOLS} | {"pretrain": ["-m", "megallama.pretrain"]}
    commands["unbuffered"] = ["-u", "tools/plan.py"]  # then argparse meets the closed pipe
    running = {
        name: subprocess.Popen(
            [sys.executable, *words, "--help"], stdout=write, stderr=subprocess.PIPE, cwd=ROOT, env=environment
        )
        for name, words in commands.items()
    }
    os.close(write)
    left = {name: (process.communicate()[1], process.returncode) for name, process in running.items()}
    assert left == dict.fromkeys(commands, (b"", 141))


def test_an_error_that_nobody_reads_keeps_the_status_of_a_run() -> None:
    """A run is never ended, nor its status changed, by a terminal that has gone."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "megallama.pretrain", "gone.toml"]
    done = subprocess.run(command, stdout=write, stderr=write, cwd=ROOT, env=environment)
    os.close(write)
    assert done.returncode == 2


ONE = (
    *("batch.global_batch_size=1", "batch.micro_batch_size=1", "batch.seq_length=1", "train.steps=1"),
    *("model.preset=debug", "model.num_layers=1", "lr_schedule.kind=constant", "lr_schedule.warmup_steps=0"),
)


def test_one_of_everything_is_said_in_the_singular(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every tool that counts, on one document, one rank, one step."""
    text, out, bad = tmp_path / "one.jsonl", str(tmp_path / "one"), tmp_path / "bad.jsonl"
    text.write_text('not JSON\n{"text": "one document"}\n')
    bad.write_text("not JSON\n")
    tokenizer = str(ROOT / "tests/frozen/v1/data/tokenizer.json")
    tokens = ["--tokenizer", tokenizer, "--workers", "1", "--quiet", "--output"]
    source = f'data.train=[{{path = "{tmp_path}/none", num_tokens = 3}}]'
    explained = ["examples/debug.toml", "1", *ONE, "data.synthetic=false", f"data.train={out}"]
    said = ""
    for name, *words in (
        ["preprocess_data", str(text), *tokens, out, "--max-bad", "50%"], ["inspect_data", out, "--verify"],
        ["preprocess_data", str(bad), *tokens, str(tmp_path / "bad")], ["plan", "ranks=1", "--search", *ONE],
        ["merge_datasets", out, "--quiet", "--output", str(tmp_path / "merged")], ["plan", "ranks=1", *ONE],
        ["draw_schedule", "ranks=1", *ONE], ["dryrun", "ranks=1", *ONE], ["plan_data", *ONE, source],
        ["explain_step", *explained],
    ):  # fmt: skip
        run(name, monkeypatch, *words)
        said += "".join(capsys.readouterr())
    for words in ("1 document, ", "1 bad record of 2 records", "= 1 rank", "1 step, 1 token", "1 sample of 1 token"):
        assert words in said, said
    things = "documents|ranks|steps|tokens|records|samples|layers|heads|sequences|replicas|micro-batches|stages"
    assert re.findall(rf"(?<![\w.,=-])1 (?:[a-z]+ )?(?:{things}|bytes|rows|layouts|calls|waits)\b", said) == [], said


def fails(error: BaseException) -> Callable[[], int]:
    def raising() -> int:
        raise error

    return raising


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (MegallamaError("x=3 is odd"), 2, "error: x=3 is odd\n"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 2, "error: a/b: No such file or directory\n"),
        (OSError("out of memory"), 2, "error: out of memory\n"),
        (ModuleNotFoundError("No module named 'x'", name="x"), 2, "error: No module named 'x'; pip install x\n"),
        (KeyboardInterrupt(), 130, "\nstopped\n"),
        (SystemExit(), 0, ""),
        (SystemExit(3), 3, ""),
        (SystemExit("pip failed"), 1, "pip failed\n"),
    ],
)
def test_statuses(error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(fails(error)) == status
    assert capsys.readouterr() == ("", said)
    with pytest.raises(ValueError, match="a bug"):
        exit_status(fails(ValueError("a bug")))
