"""`megallama`: one command with its commands, one parser for all of them, help made of the schema."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megallama import __version__, cli
from megallama.commands.parser import Parser, explain
from megallama.config.describe import sections, settings
from megallama.config.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_commands_is_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    files = {p.stem.replace("_", "-") for p in (ROOT / "megallama" / "commands").glob("*.py")}
    parts = {"--init--", "parser", "exit", "inspect-checkpoint"}  # of other commands
    assert files - parts == set(cli.COMMANDS)
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert [name for name in cli.COMMANDS if f"\n  {name} " not in listed] == []
    assert cli.main([]) == 2 and capsys.readouterr().out == listed


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megallama {__version__}\n"


def test_a_command_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian", "run.toml"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[0]) == ("", "error: there is no command 'trian'; did you mean train?")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    """From any folder; nothing but the help is printed, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert cli.main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: megallama {name} ") and err == "" and "tools/" not in out
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "train"])
def test_an_option_that_does_not_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--no-such-option"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "no-such-option" in err or "required" in err
    assert f"usage: megallama {name}" in err and "Traceback" not in err


def test_the_settings_of_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help", "precision"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("[precision] Number formats.")
    keys = [s.key for s in settings() if s.key.startswith("precision.")]
    assert [line.split(" = ")[0] for line in out.splitlines() if " = " in line] == keys
    assert 'precision.dtype = one of "bf16", "fp16", "fp32", "fp64", "auto"; default "bf16"\n' in out
    assert "precision.loss_scale_window = a whole number above 0 [steps]; default 1000\n" in out
    assert cli.main(["plan", "--help", "batch.seq-length"]) == 0
    assert capsys.readouterr().out.startswith("batch.seq_length = a whole number above 0 [tokens]; default 256\n    ")


def test_every_section_is_explained() -> None:
    lines = "\n".join(explain(name) for name in sections())
    assert [s.key for s in settings() if f"{s.key} = " not in lines] == []
    assert all(len(line) <= 100 for line in lines.splitlines() if line.startswith("    "))


def test_a_section_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help", "presicion"]) == 2
    err = capsys.readouterr().err
    assert "no section and no setting 'presicion'; did you mean precision? Sections are model, " in err


@pytest.mark.parametrize("words", [
    ["ranks=8", "parallel.tp=2"], ["--ranks=8", "--parallel.tp=2"], ["--ranks", "8", "parallel.tp=2"],
    ["parallel.tp=2", "--ranks", "8"],
])  # fmt: skip
def test_ranks_and_settings_in_every_form(words: list[str]) -> None:
    parser = Parser("plan", "", config=True, named=["ranks"])
    parser.add_argument("--json", action="store_true")
    args = parser.read(["run.toml", *words, "--json"])
    assert parser.run_of(args, "the plan") == (Path("run.toml"), 8, ["parallel.tp=2"]) and args.json


@pytest.mark.parametrize("words, message", [
    (["plan", "--rank", "4"], "unrecognized arguments: --rank; did you mean --ranks?\nusage: megallama plan "),
    (["dryrun", "--rank=4"], "unrecognized arguments: --rank=4; did you mean --ranks?\n"),
    (["doctor", "--meas"], "unrecognized arguments: --meas; did you mean --measure?\n"),
    (["from-megatron", "--out", "x", "--", "--lr", "1"], "unrecognized arguments: --out; did you mean --output?\n"),
    (["merge", "a", "--output", "b", "--no-such-option"], "unrecognized arguments: --no-such-option\nusage: "),
])  # fmt: skip
def test_options_are_written_out(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An abbreviation would mean something else, or nothing, as soon as a second option begins like it."""
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {message}")


@pytest.mark.parametrize("count", ["", "0", "-1", "1.5", "1" * 5000, "9999999999", "x"])
def test_a_number_of_ranks_that_is_none(count: str) -> None:
    parser = Parser("plan", "", config=True, named=["ranks"])
    with pytest.raises(ConfigError, match="needs one number of ranks, not ranks=") as caught:
        parser.run_of(parser.read([f"ranks={count}"]), "the plan")
    assert len(str(caught.value)) < 300 and str(caught.value).endswith("\nusage: " + parser.format_usage()[7:].strip())


def test_two_files_two_numbers_and_none() -> None:
    parser = Parser("plan", "", config=True, named=["ranks"])
    for words, message in (
        (["a.toml", "b.toml", "ranks=2"], "two configuration files, a.toml and b.toml; give one"),
        (["ranks=2", "--ranks", "4"], "the plan needs one number of ranks, not ranks=2 ranks=4; write for"),
        (["a.toml"], "the plan needs one number of ranks; write for example ranks=8"),
    ):
        with pytest.raises(ConfigError) as caught:
            parser.run_of(parser.read(words), "the plan")
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize("words", [
    ["prepare", "a.jsonl", "--output", "", "--tokenizer", "t.model"],
    ["prepare", "a.jsonl", "--output", "x", "--tokenizer", ""],
    ["merge", "a", "--output", ""], ["tokenizer", "a.jsonl", "--output="],
])  # fmt: skip
def test_an_empty_name(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    """An unset variable of the shell."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    assert "it is empty; name a file or a folder" in capsys.readouterr().err and [*tmp_path.iterdir()] == []


def test_training_without_a_word_is_helped(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train"]) == 2
    alone = capsys.readouterr().out
    assert cli.main(["train", "--help"]) == 0 and capsys.readouterr().out == alone


def test_training_by_the_command_is_the_entry_point(tmp_path: Path) -> None:
    """Its status and its messages; and what a run must have before anything that takes time is imported first."""
    command = [sys.executable, "-m", "megallama", "train", "model.preset=debug", "parallel.tp=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and "parallel.tp=3" in done.stderr and [*tmp_path.iterdir()] == []
    code = (
        "import sys, megallama.cli; print([m for m in ('torch', 'numpy', 'pydantic', 'argparse') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_what_is_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ROOT / "tests/frozen/v1/data/text_valid"
    assert cli.main(["inspect", str(pair)]) == 0
    assert "document length: shortest" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "has no manifest.json: it is not a complete checkpoint" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "none"), "--verify"]) == 2
    assert "none does not exist; name a checkpoint, a run folder or a .bin/.idx pair\n" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "none.bin")]) == 2
    assert "does not exist; give the prefix" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["nan", "inf", "0", "-1", "1e300", "many"])
def test_a_size_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option, words in {
        "--max-document-mb": ["prepare", "x", "--output", "y", "--tokenizer", "z"],
        "--sample-mb": ["tokenizer", "x", "--output", "y.model"],
        "--shard-gb": ["convert", "x", "y", "--to", "hf"],
    }.items():
        assert cli.main([*words, option, text]) == 2
        why = "invalid size value" if text == "many" else f"{text} is no size; write a number above 0 and at most"
        assert capsys.readouterr().err.startswith(f"error: argument {option}: {why}")


def test_numbers_beyond_what_libraries_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("Some words.")
    words = ["tokenizer", str(tmp_path / "a.txt"), "--output", str(tmp_path / "t.model"), "--quiet"]
    assert cli.main([*words, "--vocab-size", str(1 << 31)]) == 2
    assert "SentencePiece could not train" in capsys.readouterr().err
