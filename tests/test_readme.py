"""What README.md says can be typed, opened and set, can be."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megallama import pretrain
from megallama.config.describe import settings
from megallama.config.load import load
from megallama.config.schema import Config
from megallama.train import trainer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)
COMMANDS = "\n".join(body for kind, body in BLOCKS if not kind) + "\n".join(re.findall(r"`([^`\n]+)`", README))
TOOLS = sorted(set(re.findall(r"(tools/\w+\.py)[^#\n]* --", COMMANDS)))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8"))
    assert [t for t in targets if not t.startswith("http") and not (document.parent / t).exists()] == []


def test_mentioned_files_exist() -> None:
    named = set(re.findall(r"\b(?:examples|tools|docs|tests|requirements)/[\w./]+\w", README))
    assert named >= {"examples/debug.toml", "tools/plan.py", "docs/configuration.md"}
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_mentioned_settings_exist() -> None:
    sections = "|".join(Config.model_fields)
    known = {s.key for s in settings()}
    named = set(re.findall(rf"\b(?:{sections})\.(?!md\b|py\b)[a-z_]+\b", README)) - {"train.setps"}  # a mistake there
    assert {"parallel.tp", "run.folder", "memory.recompute"} <= named
    assert named - known == set()


def test_mentioned_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z]+)", COMMANDS)) == {"quickstart", "test"} < targets


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_options_exist(tool: str) -> None:
    lines = [line.split("#")[0] for line in COMMANDS.splitlines() if tool in line]
    used = set(re.findall(r"(?<=\s)--[a-z-]+", " ".join(lines)))
    shown = subprocess.run([sys.executable, ROOT / tool, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert {option for option in used if option not in shown.stdout} == set()


def test_exit_statuses_are_the_programs() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", README, re.M))
    assert set(rows) == {"0", "75", "2", "4", "3", "1"}
    constants = (trainer.FINISHED, trainer.SAVED, pretrain.BAD_REQUEST, pretrain.NOT_FINITE, pretrain.CRASHED)
    assert constants == (0, 75, 2, 3, 1) and trainer.FAILED == pretrain.FAILED == 4


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
