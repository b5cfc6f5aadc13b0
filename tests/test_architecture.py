"""The shape of the package, as tests: who may import whom, how long things may be, what is banned."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, TOOLS = ROOT / "megallama", ROOT / "tools"
# from below to above; folders of one level do not import one another
ENGINE = ("config", "plan", "comm kernels", "layers", "checkpoint data optim pipeline model", "train")
# beside the engine: these import it and are never imported by it; each with the lines that it may have
# (100 of text/ are the n-gram index, which evaluation and curation use; 60 of forecast/, 10 of analysis/ and 20 of
# commands/ were added for context parallelism, 20 of forecast/ and 10 of analysis/ for runs in phases)
BESIDE = {"text": 1790, "convert": 1050, "forecast": 778, "analysis": 815, "inference": 500, "recovery": 2158}
LAYERS = (*ENGINE, " ".join(BESIDE), "curate evaluation", "commands")
CEILINGS = BESIDE | {"curate": 1917, "evaluation": 1049, "commands": 2859}
# 72 of evaluation/ run what a model wrote; 114 of commands/ are curate, evaluate, compare
# in the engine's rooms, imported only by what stands beside
ELSEWHERE = {"checkpoint.average", "data.look", "data.writer", "plan.copies"}
MAX_FROM_MEGATRON = 700  # with its table
MAX_ENGINE, MAX_TOOLS = 15_371, 900
WITHOUT_TORCH = ("config", "plan", "forecast")
ONLY_IN = {  # name -> the modules that may use it, by prefix
    "torch.distributed": ("comm.",),
    "os.environ": ("comm.launch", "commands.prepare"),
    "os.getenv": ("comm.launch",),
    # clocks are set now and then: what is waited for is measured by `time.monotonic`
    "time.time": ("train.metrics", "recovery.", "commands.status"),
    "print": ("train.log", "pretrain", "cli", "commands.", "tools."),
    "transformer_engine": ("kernels.",),
    "transformer_engine_torch": ("kernels.",),
    "apex": ("kernels.",),
    "amp_C": ("kernels.",),
    "triton": ("kernels.triton_",),
    "pickle": (),
    "torch.save": ("convert.pth",),
    "torch.load": ("convert.pth",),
    "NotImplementedError": (),
    "NotImplemented": (),
}
BANNED_WORDS = ("TODO", "FIXME", "XXX", "HACK")
BANNED_FILES = ("utils.py", "helpers.py", "common.py", "misc.py")
MAX_FILE, MAX_FUNCTION = 500, 60
SCRIPTS_WITHOUT_TORCH = (
    *("preprocess_data.py", "plan.py", "merge_datasets.py", "plan_data.py", "explain_step.py", "draw_schedule.py"),
    "from_megatron_args.py",
)


def level(package: str) -> int | None:
    """How high a package folder stands, or None for an entry point, which may import everything."""
    return next((i for i, names in enumerate(LAYERS) if package in names.split()), None)


def imports(node: ast.AST, module: str) -> list[str]:
    """Absolute names of what an import statement imports; for `from a import b` both `a` and `a.b`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parents = ["megallama", *module.split(".")][: -node.level]
        base = ".".join([*parents, base] if base else parents)
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def uses(node: ast.AST, module: str) -> Iterator[str]:
    """Names that `node` refers to, as ONLY_IN writes them, with every prefix of a dotted name."""
    names = imports(node, module)
    if isinstance(node, ast.Name):
        names = [node.id]
    elif isinstance(node, ast.Attribute):
        names = [ast.unparse(node)]
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def import_problems(node: ast.AST, module: str) -> Iterator[str]:
    package = module.split(".")[0]
    own = level(package)
    for name in imports(node, module):
        if package in WITHOUT_TORCH and name.split(".")[0] == "torch":
            yield f"{package}/ must not import torch"
        parts = name.split(".")
        if parts[0] == "tools" and (package != "tools" or len(parts) < 3):  # a tool may have a folder of its own
            yield f"{package}/ must not import tools/"
        if parts[0] == "megallama" and len(parts) > 1 and parts[1] != package and own is not None:
            other = level(parts[1])
            entry = other is None and (package, parts[1]) != ("commands", "pretrain")  # a command runs it
            if entry or (other is not None and other >= own):
                yield f"{package}/ must not import {parts[1]}{'/' if other is not None else ''}"


def definition_problems(node: ast.AST, tree: ast.Module) -> Iterator[str]:
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return
    if not isinstance(node, ast.ClassDef):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION:
            yield f"{node.name} has {lines} lines, at most {MAX_FUNCTION}"
    if node in tree.body and not node.name.startswith("_") and ast.get_docstring(node) is None:
        yield f"{node.name} is public and has no docstring"


def problems(path: Path, module: str) -> list[str]:
    """Everything wrong with one file, each with its line; `module` is dotted, below the package: "plan.box"."""
    source = path.read_text(encoding="utf-8")
    tree, out = ast.parse(source), []
    lines = source.splitlines()
    if len(lines) > MAX_FILE:
        out.append(f"{module}: {len(lines)} lines, at most {MAX_FILE}")
    if path.name in BANNED_FILES:
        out.append(f"{module}: {path.name} says nothing; name the file after what it holds")
    if ast.get_docstring(tree) is None and tree.body:
        out.append(f"{module}: no file docstring")
    for number, line in enumerate(lines, 1):
        out += [f"{module}:{number}: {word}" for word in BANNED_WORDS if re.search(rf"\b{word}\b", line)]
    for node in ast.walk(tree):
        found = [*import_problems(node, module), *definition_problems(node, tree)]
        if isinstance(node, ast.Global):
            found.append("`global`; pass the value instead")
        for name in uses(node, module):
            if name in ONLY_IN and not module.startswith(ONLY_IN[name]):
                places = ", ".join(ONLY_IN[name]) or "no file"
                found.append(f"{name} belongs in {places}")
        out += [f"{module}:{getattr(node, 'lineno', 0)}: {text}" for text in found]
    return sorted(set(out))


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *TOOLS.rglob("*.py")])


def dotted(path: Path) -> str:
    base = PACKAGE if path.is_relative_to(PACKAGE) else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_file(path: Path) -> None:
    assert problems(path, dotted(path)) == []


def num_lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


@pytest.mark.parametrize("room", CEILINGS)
def test_a_room_beside_the_engine_keeps_its_size(room: str) -> None:
    total = num_lines([*(PACKAGE / room).rglob("*.py"), *([PACKAGE / "cli.py"] if room == "commands" else [])])
    assert total <= CEILINGS[room], f"{total} lines in {room}/; remove some"


def test_the_reader_of_megatrons_flags_keeps_its_size() -> None:
    commands = PACKAGE / "commands"
    total = num_lines([commands / "from_megatron.py", *(commands / "megatron").rglob("*.py")])
    assert total <= MAX_FROM_MEGATRON, f"{total} lines that read Megatron's flags; remove some"


def test_the_engine_and_the_tools_keep_their_size() -> None:
    total = num_lines(PACKAGE.joinpath(*module.split(".")).with_suffix(".py") for module in engine())
    assert total <= MAX_ENGINE, f"{total} lines that a training run can import; remove some"
    assert num_lines(TOOLS.rglob("*.py")) <= MAX_TOOLS


def test_every_folder_has_its_level() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders <= {name for names in LAYERS for name in names.split()}
    assert all((PACKAGE / f / "__init__.py").exists() for f in folders)


def engine() -> set[str]:
    """Every module that an import statement leads to from the entry point, those inside functions included."""
    found, todo = set[str](), ["pretrain"]
    while todo:
        module = todo.pop()
        path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
        if module not in found and path.exists():
            found.add(module)
            names = (n for node in ast.walk(ast.parse(path.read_text("utf-8"))) for n in imports(node, module))
            todo += [name.removeprefix("megallama.") for name in names if name.startswith("megallama.")]
    return found


def test_the_engine_imports_nothing_that_stands_beside_it() -> None:
    rooms = {module.split(".")[0] for module in engine()}
    assert rooms > {"train", "plan", "config"} and rooms & set(BESIDE) == set()


def test_what_stands_in_the_rooms_of_the_engine_is_counted_with_it() -> None:
    """No ceiling holds for a module that lies there and that only rooms beside the engine import."""
    rooms = {name for level in ENGINE for name in level.split()}
    files = (path for path in PACKAGE.rglob("*.py") if path.parent.name in rooms and path.name != "__init__.py")
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in files}
    assert modules - engine() == ELSEWHERE


def names_of(module: str) -> set[str]:
    """What `from module import ...` can find: the names of a module's top level, the modules of a folder."""
    path = ROOT.joinpath(*module.split("."))
    found = {p.stem for p in path.glob("*.py")} | {p.name for p in path.glob("*/")}
    file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    for node in ast.walk(ast.parse(file.read_text("utf-8"))) if file.exists() else ():
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("folder", ["benchmarks", "tests/gpu", "tools"])
def test_what_seldom_runs_imports_what_there_is(folder: str) -> None:
    """Benchmarks and the tests of GPUs: nobody notices a name that has moved until they are needed."""
    lost = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("megallama", "tests"):
                names = names_of(node.module or "")
                lost += [f"{path.name}: {node.module}.{a.name}" for a in node.names if a.name not in names]
    assert lost == []
    assert "make_plan" in names_of("megallama.plan.plan") and "flops" not in names_of("megallama.plan")


def where_is_rows(document: str) -> list[str]:
    """First cells of the table: one path in backticks each."""
    return re.findall(r"^\| `([^`]+)`", document, re.M)


def test_the_map_is_true() -> None:
    rows = where_is_rows((ROOT / "docs" / "where_is_what.md").read_text(encoding="utf-8"))
    assert [row for row in rows if not (ROOT / row).exists()] == []
    folders = {f"megallama/{p.name}/" for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders - set(rows) == set(), "folders that docs/where_is_what.md does not list"


@pytest.mark.parametrize("script", [s for s in SCRIPTS_WITHOUT_TORCH if (TOOLS / s).exists()])
def test_scripts_start_without_torch(script: str) -> None:
    load = f"runpy.run_path({str(TOOLS / script)!r}, run_name='loaded')"
    code = f"import runpy, sys; {load}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


BAD = (
    """import torch
from megallama.train.log import x
from ..model import llama
import os
import apex
import pickle
import torch.distributed as dist
from megallama import pretrain
from tools import plan
def f():
    global y
    print(os.environ)
    torch.save(1)
"""
    + "    pass\n" * 60
    + "class A:\n    def method(self):\n        raise NotImplementedError  # TO"
    + "DO\n" * 430
)
BITES = (
    *("plan/ must not import torch", "must not import train/", "must not import model/", "must not import tools/"),
    *("plan/ must not import pretrain", "f has 64 lines, at most 60", "`global`", "print belongs in train.log"),
    *("os.environ belongs in comm.launch", "f is public and has no docstring", "A is public and has no docstring"),
    *("no file docstring", "utils.py says nothing", "apex belongs in kernels."),
    *("pickle belongs in no file", "torch.save belongs in convert.pth", "torch.distributed belongs in comm."),
    *("NotImplementedError belongs in no file", "TO" + "DO", "lines, at most 500"),
)


def test_the_rules_bite(tmp_path: Path) -> None:
    bad = tmp_path / "utils.py"
    bad.write_text(BAD, encoding="utf-8")
    text = " | ".join(problems(bad, "plan.bad"))
    assert [rule for rule in BITES if rule not in text] == [], text
    sibling = tmp_path / "other.py"
    source = ('"""One of the five."""', "from megallama.data import batch", "from megallama.comm.group import Group")
    sibling.write_text("\n".join(source), encoding="utf-8")
    assert problems(sibling, "model.other") == ["model.other:2: model/ must not import data/"]
    assert problems(sibling, "train.other") == []
    assert problems(sibling, "forecast.other") == []
    sibling.write_text('"""Beside."""\nfrom megallama.forecast import search', encoding="utf-8")
    for package in ("train", "analysis"):
        assert problems(sibling, f"{package}.x") == [f"{package}.x:2: {package}/ must not import forecast/"]
    table = "| path | what |\n|---|---|\n| `a/b.py` | x |\n| `c/` | y |\n"
    assert where_is_rows(table) == ["a/b.py", "c/"]
