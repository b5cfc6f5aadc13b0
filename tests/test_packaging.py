"""What `pip install .` and a source distribution contain, and what they say they need."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # the builds replace the arguments
print(build_meta.build_sdist(folder), build_meta.build_wheel(folder))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution and the wheel of what git would check out here."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "tree"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if not names:
        pytest.skip("not a git checkout: there is no list of the project's files")
    for name in names:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    sdist, wheel = done.stdout.split()[-2:]
    return folder / sdist, folder / wheel


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    package = {
        str(p.relative_to(ROOT)) for p in (ROOT / "megallama").rglob("*") if p.suffix in (".py", ".toml", ".typed")
    }
    assert set(names) == package


def test_the_source_distribution_holds_what_its_readme_names(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    left_out = {name for name in tracked if name not in names}
    assert left_out <= {".gitignore", ".ci/run"}


def test_the_licence_is_said_once_for_every_file() -> None:
    (every,) = tomllib.loads((ROOT / "REUSE.toml").read_text(encoding="utf-8"))["annotations"]
    assert every["path"] == "**" and every["SPDX-License-Identifier"] == PROJECT["license"] == "Apache-2.0"
    assert (ROOT / "LICENSES" / "Apache-2.0.txt").read_bytes() == (ROOT / "LICENSE").read_bytes()


COMMAND_LINES = (
    (["--help"], 0), (["plan", "model.preset=debug", "ranks=4", "parallel.pp=2"], 0), (["doctor", "--help"], 0),
    (["draw", "--schedule", "zb-v", "--pp", "2", "--microbatches", "4"], 0), (["train", "--help", "model"], 0),
    (["train", "model.preset=debug"], 2), (["inspect", "nothing"], 2), (["no-such-command"], 2),
)  # fmt: skip


def test_the_wheel_alone_has_the_command(built: tuple[Path, Path], tmp_path: Path) -> None:
    """From any folder, without the repository."""
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(tmp_path / "site")
        entries = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "megallama = megallama.cli:main\n" in wheel.read(entries).decode()
    (tmp_path / "elsewhere").mkdir()
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"}
    for words, status in COMMAND_LINES:
        code = "import sys; from megallama.cli import main; import megallama; print(megallama.__file__); "
        code += "sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(
            command, cwd=tmp_path / "elsewhere", capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == status and done.stdout.startswith(str(tmp_path / "site")), (words, done.stderr)
        assert ("error: " in done.stderr) == (status == 2) and "Traceback" not in done.stderr
    assert [*(tmp_path / "elsewhere").iterdir()] == []


def test_the_pinned_versions_lie_in_the_ranges() -> None:
    lines = [line for name in ("torch", "base", "test") for line in (ROOT / f"requirements/{name}.txt").open()]
    pins = [Requirement(line.strip()) for line in lines if "==" in line and not line.startswith("#")]
    pinned = {pin.name.lower().replace("_", "-"): str(pin.specifier).removeprefix("==") for pin in pins}
    extras = {name: needs for name, needs in PROJECT["optional-dependencies"].items() if name not in ("eval", "curate")}
    ranges = [*PROJECT["dependencies"], *(need for needs in extras.values() for need in needs)]  # tests need no others
    for text in ranges:
        need = Requirement(text)
        if need.name not in ("megallama", "transformer-engine"):
            assert need.specifier.contains(pinned[need.name.lower().replace("_", "-")]), text
    torch = next(Requirement(text) for text in ranges if text.startswith("torch"))
    assert not torch.specifier.contains("3.0.0"), "a later torch is untried: its range needs an end"
