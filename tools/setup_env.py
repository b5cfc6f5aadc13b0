"""Create the Makefile's virtual environment: `python tools/setup_env.py .venv base [test] [-- PIP OPTIONS]`.

Needs nothing but Python's own library.  torch is installed first and alone, so that no other package
chooses its version; then the pinned requirements; then this package, editable.  Everything pip says
goes to VENV/setup.log; the terminal shows what is being fetched and for how long.  A vendor's image keeps
its torch and what was built for it: the environment sees them, and only what is missing is installed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megallama.commands.exit import exit_status  # noqa: E402

SHOWN = ("Collecting ", "Downloading ", "Using cached ", "Installing ", "Building ")
HELP = """\
What to do:
  no network, a proxy     pip's own settings work here: PIP_INDEX_URL, PIP_PROXY; or make ... PIP_ARGS="--proxy URL"
  no space left           it takes about 1.5 GB (5 GB with torch's CUDA build); make ... VENV=/somewhere/else
  no matching version     Python 3.11 or 3.12 on Linux is needed; make ... PYTHON=/path/to/python3.11
Then type the same command again: it goes on where it stopped."""


KEPT = ("torch", "pytorch", "triton", "transformer", "flash", "apex", "nvidia", "cuda", "numpy")


def kept() -> list[str]:
    """As pip's constraints, what belongs to the torch of a vendor's image, which no index has; elsewhere nothing."""
    found = {d.name.lower(): d.version for d in distributions()}
    torch = found.get("torch", "")
    if not re.search(r"\+(?!cpu|cu\d|rocm|xpu)", torch):
        return []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    need = next(need for need in project["dependencies"] if need.startswith("torch"))
    low, high, own = (tuple(map(int, v.split("."))) for v in re.findall(r"\d+\.\d+", f"{need} {torch}")[:3])
    if not low <= own < high:
        sys.exit(f"error: this image has torch {torch}, and {need} is needed: take an image with such a torch")
    return sorted(f"{name}=={version}" for name, version in found.items() if name.startswith(KEPT))


def follow(lines: Iterator[str], log: Path, title: str) -> None:
    """Copy pip's lines to `log` and show the newest interesting one: in place on a terminal, every 20 s elsewhere."""
    start, newest, done, terminal = time.monotonic(), [""], threading.Event(), sys.stdout.isatty()

    def show() -> None:
        with suppress(BrokenPipeError):  # the main thread meets it too
            while not done.wait(0.5 if terminal else 20):
                text = f"  {title}: {newest[0]} ({time.monotonic() - start:.0f} s)"
                print(f"\r\033[K{text[:110]}" if terminal else text, end="" if terminal else "\n", flush=True)

    ticker = threading.Thread(target=show, daemon=True)
    ticker.start()
    with log.open("a", encoding="utf-8") as out:
        for line in lines:
            out.write(line)
            if line.strip().startswith(SHOWN):
                newest[0] = " ".join(line.split()[:2]).split(";")[0]
    done.set()
    ticker.join()
    print(f"{chr(13)}{chr(27)}[K" if terminal else "", end="")


def step(title: str, command: list[str], log: Path) -> None:
    """Run one command with visible progress; leave with status 1 and advice if it fails."""
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as out:
        out.write(f"\n$ {' '.join(command)}\n")
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    follow(iter(process.stdout), log, title)
    if status := process.wait():
        tail = "\n".join(f"    {line}" for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        sys.exit(f"error: {title} failed with status {status}\n{tail}\n  whole log: {log}\n{HELP}")
    print(f"  {title}: done in {time.monotonic() - start:.0f} s", flush=True)


def run(arguments: list[str]) -> None:
    """Create the environment and install the named requirement sets."""
    usage = "%(prog)s VENV {base,test} ... [-- PIP OPTIONS]"
    parser = argparse.ArgumentParser(description=__doc__, usage=usage)
    parser.add_argument("venv", metavar="VENV", help="the folder to make")
    parser.add_argument("sets", nargs="+", choices=("base", "test"), help="what to install")
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    given, options = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
    target, sets = given.venv, given.sets
    venv, version = Path(target).absolute(), ".".join(map(str, sys.version_info[:3]))
    print(f"Setting up {target} for {', '.join(sets)} with Python {version}; once, 1 to 5 minutes.", flush=True)
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        print(f"  note: tested with Python 3.11 and 3.12; this is {version}")
    python, log, image = str(venv / "bin" / "python"), venv / "setup.log", kept()
    venv.mkdir(parents=True, exist_ok=True)
    if not Path(python).exists():
        sees = ["--system-site-packages"] if image else []
        step("virtual environment", [sys.executable, "-m", "venv", *sees, str(venv)], log)
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *options]
    if image:
        print(f"  kept as this image has them: {', '.join(image)}", flush=True)
        (venv / "image.txt").write_text("\n".join(image), encoding="utf-8")
        step("what is missing", [*pip, "-c", str(venv / "image.txt"), "-e", ".[test]" if "test" in sets else "."], log)
        return
    if "base" in sets:
        step("torch", [*pip, "-r", "requirements/torch.txt"], log)
        step("other packages", [*pip, "-r", "requirements/base.txt"], log)
        step("megallama", [*pip, "--no-deps", "--no-build-isolation", "-e", "."], log)
    if "test" in sets:
        step("test packages", [*pip, "-r", "requirements/test.txt"], log)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run(sys.argv[1:])))
