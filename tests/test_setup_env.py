"""Setting up where a vendor's image brings its own torch: that one stays, with all that was built for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tools import setup_env

ROOT = Path(__file__).resolve().parent.parent
NEEDS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
VENDOR = {
    "torch": "2.11.0a0+a6c236b9fd.nv25.11",
    "transformer_engine": "2.9.0+70f53666",
    "pytorch-triton": "3.5.0+gitc8757738",
    "numpy": "1.26.4",
    "rich": "13.9.4",
}


def site(folder: Path, packages: dict[str, str]) -> Path:
    """Where Python finds these packages, as far as their names and versions go."""
    for name, version in packages.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "INSTALLER").write_text("vendor\n")
        (info / "RECORD").write_text("")
    return folder


def wheel(folder: Path, name: str, version: str) -> None:
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as out:
        out.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        out.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr(f"{info}/RECORD", "")


def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: dict[str, str]) -> Path:
    found = site(tmp_path / "site", packages)
    monkeypatch.setattr(sys, "path", [str(found)])
    return found


def test_what_belongs_to_an_images_torch_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path, monkeypatch, VENDOR)
    assert setup_env.kept() == [
        "numpy==1.26.4",
        "pytorch-triton==3.5.0+gitc8757738",
        "torch==2.11.0a0+a6c236b9fd.nv25.11",
        "transformer_engine==2.9.0+70f53666",
    ]


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cu130", "2.12.1+cpu", "2.11.0+rocm6.4", "2.9.0+xpu"])
def test_a_torch_of_an_index_is_not_kept(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a one can be installed anywhere; the environment gets the version that is pinned."""
    image(tmp_path, monkeypatch, {"torch": version})
    assert setup_env.kept() == []


@pytest.mark.parametrize("version", ["2.10.0a0+b4e4ee81d3.nv25.12", "2.14.0a0+1.nv26.9", "3.0.0+nv27.1"])
def test_an_image_whose_torch_is_not_supported_is_refused(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is made."""
    image(tmp_path, monkeypatch, VENDOR | {"torch": version})
    with pytest.raises(SystemExit) as refused:
        setup_env.run([str(tmp_path / "venv"), "base"])
    assert refused.value.code == (
        f"error: this image has torch {version}, and torch>=2.11.0a0,<2.14 is needed: take an image with such a torch"
    )
    assert not (tmp_path / "venv").exists()


STEPS = {
    "base": [["-m", "venv", "--system-site-packages", "VENV"], ["-c", "VENV/image.txt", "-e", "."]],
    "test": [["-m", "venv", "--system-site-packages", "VENV"], ["-c", "VENV/image.txt", "-e", ".[test]"]],
}


@pytest.mark.parametrize("wanted", STEPS)
def test_in_an_image_the_environment_sees_it_and_no_pins_are_read(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image(tmp_path, monkeypatch, VENDOR)
    commands: list[list[str]] = []
    monkeypatch.setattr(setup_env, "step", lambda title, command, log: commands.append(command))
    setup_env.run([str(tmp_path / "venv"), wanted, "--", "--proxy", "p"])
    ends = [command[-len(end) :] for command, end in zip(commands, STEPS[wanted], strict=True)]
    assert ends == [[word.replace("VENV", str(tmp_path / "venv")) for word in end] for end in STEPS[wanted]]
    assert "--proxy" in commands[1] and not any("requirements" in word for command in commands for word in command)
    assert "torch==2.11.0a0+a6c236b9fd.nv25.11" in (tmp_path / "venv" / "image.txt").read_text().splitlines()
    assert "kept as this image has them: numpy==1.26.4, pytorch-triton==" in capsys.readouterr().out


def test_elsewhere_torch_comes_first_and_everything_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path, monkeypatch, {"torch": "2.13.0"})
    commands: list[list[str]] = []
    monkeypatch.setattr(setup_env, "step", lambda title, command, log: commands.append(command))
    setup_env.run([str(tmp_path / "venv"), "base", "test"])
    assert [command[-1] for command in commands] == [
        str(tmp_path / "venv"), "requirements/torch.txt", "requirements/base.txt", ".", "requirements/test.txt",
    ]  # fmt: skip
    assert "--system-site-packages" not in commands[0] and "--no-deps" in commands[3]


def test_pip_replaces_nothing_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself, with what this package needs: newer ones lie ready, and what the image lacks comes alone."""
    found = image(tmp_path, monkeypatch, VENDOR | {"rich": "12.0.0", "sentencepiece": "0.1.99"})
    (tmp_path / "image.txt").write_text("\n".join(setup_env.kept()))
    names = {re.split(r"[><=]", need)[0] for need in NEEDS}
    for name in names - {"rich", "sentencepiece"}:
        if name not in VENDOR:
            site(found, {name: "99.0"})
    for name, version in (("torch", "2.13.0"), ("numpy", "2.4.6"), ("rich", "15.0.0"), ("sentencepiece", "0.2.3")):
        wheel(tmp_path / "index", name, version)
    command = ["-m", "pip", "install", "--dry-run", "--no-index", "--find-links", "index", "--no-deps", "--upgrade"]
    upgrade = [word for word in command if word != "--upgrade"]
    options = ["--disable-pip-version-check", "--no-cache-dir", "-c", "image.txt"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        [sys.executable, *upgrade, *options, *NEEDS], cwd=tmp_path, capture_output=True, text=True,
        env=clean | {"PYTHONPATH": str(found)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("Would install"))
    assert sorted(line.split()[2:]) == ["rich-15.0.0", "sentencepiece-0.2.3"]
    done = subprocess.run(
        [sys.executable, *command, *options, *NEEDS], cwd=tmp_path, capture_output=True, text=True,
        env=clean | {"PYTHONPATH": str(found)},
    )  # fmt: skip
    assert "torch-2.13.0" not in done.stdout and "numpy-2" not in done.stdout
