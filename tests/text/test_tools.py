"""The tools as a user starts them: output, exit status, and no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.words import text_of

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"tools/{name}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def prefix(jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and data, made by the tools themselves, with one bad record."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "c.jsonl").write_bytes(jsonl.read_bytes() + b'{"id": 1}\n')
    trained = tool("train_tokenizer", folder / "c.jsonl", "--vocab-size", 330, "--output", folder / "t.model")
    assert trained.returncode == 0 and "t.model: 330 ids" in trained.stdout
    options = ("--tokenizer", folder / "t.model", "--output", folder / "d", "--workers", 2)
    done = tool("preprocess_data", folder / "c.jsonl", *options)
    assert done.returncode == 0, done.stderr
    assert "d.bin: 300 documents" in done.stdout and "MB/s" in done.stdout and "M tokens/s" in done.stdout
    assert "skipped 1 bad record of 301 records" in done.stderr and "c.jsonl:301: no key" in done.stderr
    return folder / "d"


def test_inspect_shows_counts_lengths_and_documents(prefix: Path) -> None:
    facts = json.loads(Path(f"{prefix}.json").read_text())
    done = tool("inspect_data", prefix, "--verify", "--tokenizer", prefix.parent / "t.model")
    assert done.returncode == 0
    assert f"300 documents, {facts['tokens']:,} tokens of uint16" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if " .. " in line]
    assert sum(int(row[3]) for row in rows) == 300
    assert f"verified: offsets, document marks and {facts['tokens']:,} ids below 330" in done.stdout
    assert f"verified: every 64 KiB is as {prefix}.sums says" in done.stdout
    text = tool("inspect_data", prefix, "--document", 7, "--tokenizer", prefix.parent / "t.model").stdout
    assert text == text_of(7) + "\n"
    assert tool("inspect_data", prefix, "--document", 7).stdout.split()[-1] == "2"


def test_inspect_finds_damage_and_writes_checksums(prefix: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".sums"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"d{suffix}")
    raw, sums = (tmp_path / "d.bin").read_bytes(), (tmp_path / "d.sums").read_bytes()
    (tmp_path / "d.bin").write_bytes(raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:])
    done = tool("inspect_data", tmp_path / "d", "--verify")
    assert done.returncode == 2 and f"{tmp_path}/d.bin: the 65536 bytes from 0 on are not what was" in done.stderr
    (tmp_path / "d.bin").write_bytes(raw)
    (tmp_path / "d.sums").unlink()
    done = tool("inspect_data", tmp_path / "d", "--verify")
    assert done.returncode == 0 and "not verified: " in done.stdout and "d.sums: No such file" in done.stdout
    done = tool("inspect_data", tmp_path / "d", "--write-sums")
    assert done.returncode == 0 and (tmp_path / "d.sums").read_bytes() == sums
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.bin", "d.idx", "d.sums"]


def test_merge_joins_pairs(prefix: Path, tmp_path: Path) -> None:
    tokens = json.loads(Path(f"{prefix}.json").read_text())["tokens"]
    done = tool("merge_datasets", prefix, f"{prefix}.bin", "--output", tmp_path / "m")
    assert done.returncode == 0 and f"m.bin: 600 documents, {2 * tokens:,} tokens" in done.stdout, done.stderr
    assert json.loads((tmp_path / "m.json").read_text())["documents"] == 600


@pytest.mark.parametrize("arguments", [["--help"], None], ids=["help", "a tiny job"])
def test_preprocessing_never_imports_torch(prefix: Path, tmp_path: Path, arguments: list[str] | None) -> None:
    options = ["--tokenizer", str(prefix.parent / "t.model"), "--output", str(tmp_path / "o"), "--workers", "1"]
    inputs = arguments or [str(prefix.parent / "c.jsonl"), *options]
    program = (
        "import sys\n"
        "from megallama.cli import command\ntry:\n    command('prepare')()\nexcept SystemExit: pass\n"
        "print([x for x in ('torch', 'pydantic', 'transformers', 'mpi4py', 'rich') if x in sys.modules])"
    )
    command = [sys.executable, "-c", program, *inputs]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert arguments or (tmp_path / "o.bin").exists()


def test_preprocess_splits_off_two_parts(prefix: Path, tmp_path: Path) -> None:
    options = ("--tokenizer", prefix.parent / "t.model", "--output", tmp_path / "o", "--max-bad", "1%")
    done = tool("preprocess_data", prefix.parent / "c.jsonl", *options, "--split-valid", 0.1, "--split-test", 0.05)
    assert done.returncode == 0, done.stderr
    for name, count in (("train", 255), ("valid", 30), ("test", 15)):
        assert f"o_{name}.bin: {count} documents" in done.stdout
    assert "encoder: " in done.stdout


def test_errors_have_status_2(prefix: Path, tmp_path: Path) -> None:
    strict = ("--tokenizer", prefix.parent / "t.model", "--output", tmp_path / "x", "--strict", "--quiet")
    for name, arguments, text in (
        ("inspect_data", (tmp_path / "gone",), "gone does not exist; name a checkpoint"),
        ("inspect_data", (prefix, "--document", 300), "holds documents 0..299, not 300"),
        ("merge_datasets", (prefix, tmp_path / "gone", "--output", tmp_path / "m"), "gone.idx does not exist"),
        ("preprocess_data", (prefix.parent / "c.jsonl", *strict[:-2], "--max-bad", "x"), "max_bad='x' is neither"),
        ("preprocess_data", (prefix.parent / "c.jsonl", *strict), 'c.jsonl:301: no key "text"'),
        ("train_tokenizer", (prefix.parent / "c.jsonl", "--output", tmp_path / "x.model"), "vocab_size=32000 is more"),
    ):
        done = tool(name, *arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and text in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []
