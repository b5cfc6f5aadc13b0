"""What README.md says can be typed, opened and set, can be."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megallama import cli, pretrain
from megallama.config.describe import settings
from megallama.config.errors import CorruptionError
from megallama.config.load import load
from megallama.config.schema import Config
from megallama.train import loop, setup

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)
COMMANDS = "\n".join(body for kind, body in BLOCKS if not kind) + "\n" + "\n".join(re.findall(r"`([^`\n]+)`", README))
RUNNING = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8"))
    assert [t for t in targets if not t.startswith("http") and not (document.parent / t).exists()] == []


def test_mentioned_files_exist() -> None:
    named = set(re.findall(r"\b(?:megallama|examples|tools|docs|tests|requirements)/[\w./]+\w", README + RUNNING))
    assert named >= {"examples/debug.toml", "megallama/pretrain.py", "docs/configuration.md"}
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_mentioned_settings_exist() -> None:
    sections = "|".join(Config.model_fields)
    known = {s.key for s in settings()}
    named = set(re.findall(rf"\b(?:{sections})\.(?!md\b|py\b)[a-z_]+\b", README + RUNNING))
    assert {"parallel.tp", "run.folder", "memory.recompute"} <= named
    assert named - known == {"train.setps"}, "the mistake that is shown"


def test_mentioned_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z]+)", COMMANDS)) == {"quickstart", "test"} < targets


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_is_in_the_table_with_options_that_it_has(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line.split("#")[0] for line in COMMANDS.splitlines() if f"megallama {command}" in line]
    assert lines, f"the table `I want to ...` does not name {command}"
    used = set(re.findall(r"(?<=\s)--[a-z-]+", " ".join(line.partition(f"megallama {command}")[2] for line in lines)))
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert {option for option in used if option not in shown} == set()


def test_the_configuration_to_copy_is_one(tmp_path: Path) -> None:
    (text,) = [body for kind, body in BLOCKS if kind == "toml"]
    (tmp_path / "my.toml").write_text(text, encoding="utf-8")
    config = load(tmp_path / "my.toml", (), ranks=8)
    assert (config.model.num_layers, config.batch.seq_length, config.train.steps) == (32, 2048, 250_000)
    assert len(text.splitlines()) <= 10


def test_the_files_to_read_are_eight() -> None:
    section = README.partition("## Read the code")[2].partition("\n## ")[0]
    numbers = re.findall(r"^(\d)\. `(megallama/[\w/]+\.py)`", section, re.M)
    assert [int(n) for n, _ in numbers] == [*range(1, 9)]


def test_exit_statuses_are_the_programs() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", README, re.M))
    assert set(rows) == {"0", "75", "2", "4", "3", "5", "1"}
    constants = (loop.FINISHED, loop.SAVED, pretrain.BAD_REQUEST, pretrain.NOT_FINITE, pretrain.CRASHED)
    assert constants == (0, 75, 2, 3, 1) and setup.FAILED == pretrain.FAILED == 4
    assert CorruptionError.status == 5


def test_layout_table_is_the_examples() -> None:
    rows = re.findall(r"^\| `(examples/\w+\.toml)` \|" + r" (\d+) \|" * 6, README, re.M)
    assert len(rows) == 4
    for path, *numbers in rows:
        gpus, tp, pp, chunks, dp, micro = map(int, numbers)
        config = load(ROOT / path, (), ranks=gpus)
        parallel = config.parallel
        assert (parallel.tp, parallel.pp, parallel.chunks, config.batch.micro_batch_size) == (tp, pp, chunks, micro)
        assert tp * pp * dp == gpus


def test_the_mistake_is_shown_as_it_is() -> None:
    command, answer = re.findall(r"^\$ python (-m megallama.+)\n(error: (?:.+\n)+)```", README, re.M)[0]
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, answer)


def test_python_blocks_compile() -> None:
    blocks = [body for kind, body in BLOCKS if kind == "python"]
    assert blocks
    for body in blocks:
        compile(body, "README.md", "exec")
