"""Recipes: what is wrong with them is told at once, with what may be written; the examples are right."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama import cli
from megallama.config.errors import ConfigError
from megallama.curate.recipe import KINDS, load_recipe
from tests.curate.recipes import EXAMPLES, ROOT, write_rows

WRONG = """
seeed = 1
[[sources]]
name = "a b"
inputz = ["x"]
[[sources.stages]]
kind = "filtr"
[[sources.stages]]
kind = "filter"
min_char = 3
max_chars = -1
drop = ["(x"]
[[sources.stages]]
foo = 3
[[stages]]
kind = "language"
min_score = "x"
"""
PROBLEMS = (
    "sources[0].name='a b': String should match pattern",
    "sources[0].inputs is missing: files, folders or patterns, in their order",
    'sources[0].stages[0].kind="filtr" is no stage; did you mean filter?',
    "sources[0].stages[1].max_chars=-1: Input should be greater than or equal to 0",
    "sources[0].stages[1].drop[0]='(x': Value error, it is no regular expression: missing ), unterminated subpattern",
    "sources[0].stages[1].min_char is not known; did you mean min_chars?",
    'sources[0].stages[2] has no kind; write kind = "filter" or another of filter, replace,',
    "sources[0].inputz is not known; did you mean inputs?",
    "stages[0].min_score='x': Input should be a valid number",
    "seeed is not known; did you mean seed?",
)


REPLACE = """[[sources]]
name = "a"
inputs = ["x"]
[[sources.stages]]
kind = "replace"
rules = [{{pattern = "{}", by = "{}"}}]
"""


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(WRONG)
    with pytest.raises(ConfigError) as error:
        load_recipe(tmp_path / "r.toml")
    head, *lines = str(error.value).split("\n")
    assert head == f"{len(PROBLEMS)} problems in the recipe:"
    for line, problem in zip(lines, PROBLEMS, strict=True):
        assert line.startswith(f"  - {tmp_path}/r.toml: {problem}"), line


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = ", "is not valid TOML"),
        ("sources = []", "sources=[]: Tuple should have at least 1 item"),
        ('[[sources]]\nname="a"\ninputs=["x"]\n' * 2, "two sources are called a"),
        (
            REPLACE.format("(a)", r"\\2"),
            "it is no regular expression: invalid group reference 2",
        ),
        (REPLACE.format("(a)", r"\\g<x>"), "it is no regular expression: unknown group name 'x'"),
        (REPLACE.format("a{99999999999}", ""), "it is no regular expression: the repetition number is too large"),
        ("unit_mb=1e-9\n[[sources]]\n", "unit_mb=1e-09: Input should be greater than or equal to 0.000001"),
        ("max_document_mb=1e14\n[[sources]]\n", "Input should be less than or equal to 1000000"),
        ('[[sources]]\nname="work"\ninputs=["x"]\n', "two sources are called work; each needs a name of its own"),
    ],
    ids=["toml", "none", "twice", "group", "name", "repeated", "unit", "document", "work"],
)
def test_one_problem(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_recipe(tmp_path / "r.toml")
    assert message in str(error.value)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_examples(path: Path) -> None:
    assert load_recipe(path).sources


def test_the_documentation_names_every_stage_and_option() -> None:
    text = (ROOT / "docs" / "curation.md").read_text()
    assert [kind for kind in KINDS if f"| `{kind}` |" not in text] == []
    names = {name for kind in KINDS.values() for name in kind.model_fields if name != "kind"}
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "in" / "a.jsonl", ["A text.", "No"])
    (tmp_path / "r.toml").write_text(
        f'[[sources]]\nname = "web"\ninputs = ["{tmp_path}/in"]\n[[sources.stages]]\nkind = "filter"\nmin_chars = 3\n'
    )
    words = ["curate", str(tmp_path / "r.toml"), "--output", str(tmp_path / "out")]
    for wrong in ([*words, "--workers", "0"], [*words, "--train"], words[:2]):
        assert cli.main(wrong) == 2
        assert "give --output FOLDER or --train; --workers must be 1 or more" in capsys.readouterr().err
    assert cli.main([*words, "--quiet"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out/report.html\n"
    lines = (tmp_path / "out" / "web" / "00000.jsonl").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith('{"text":"A text.","source":"web","id":"')


def test_the_command_says_what_was_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "in" / "a.jsonl", ["A text."])
    (tmp_path / "other.json").write_text('{"content": "Text under another key."}\n' * 3)
    both = {"a": "in", "b": "other.json"}.items()
    sources = "".join(f'[[sources]]\nname = "{n}"\ninputs = ["{tmp_path}/{file}"]\n' for n, file in both)
    (tmp_path / "r.toml").write_text(sources)
    words = ["curate", str(tmp_path / "r.toml"), "--output", str(tmp_path / "out"), "--quiet"]
    for again in ("", ": finished before"):
        assert cli.main(words) == 0
        out, err = capsys.readouterr()
        assert out == f"{tmp_path}/out/report.html{again}\n"
        first = f'not all was read, as of {tmp_path}/other.json: no key "text"; see the report'
        assert err == f"note: {first}\nnote: no document was read of b\n"
