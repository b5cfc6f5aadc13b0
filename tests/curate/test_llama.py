"""The seven sources in one recipe, on real text: Python's documentation and sources, in the formats of the sources."""

from __future__ import annotations

import importlib
import json
import pydoc
import random
import re
from html import escape
from importlib.metadata import distribution
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest

from megallama import cli
from megallama.config.errors import ConfigError
from megallama.curate.recipe import load_recipe
from megallama.curate.report import write_report
from tests.curate.recipes import EXAMPLES, packed, read_rows, response, write_rows

SHARES = {  # of the paper's table 1
    "commoncrawl": 0.67, "c4": 0.15, "github": 0.045, "wikipedia": 0.045, "books": 0.045, "arxiv": 0.025,
    "stackexchange": 0.02,
}  # fmt: skip
MODULES = ("argparse", "calendar", "difflib", "heapq", "json", "logging", "pprint", "random", "statistics", "textwrap")
TEXTS = [text for name, text in sorted(topics.items()) if len(text) > 600]
GERMAN = "Der Fluss war in der Nacht gestiegen, und die unteren Felder standen unter Wasser. "
POST = '<row Id="{}" PostTypeId="{}" Score="{}" Title="{}" Body={} ParentId="{}" />'


def page(text: str) -> bytes:
    lines = "".join(f"<p>{escape(line)}</p>" for line in text.split("\n\n"))
    return f"<html><body>{lines}</body></html>".encode()


def write_crawl(raw: Path) -> None:
    """Pages of WARC: documentation as HTML, one of them again, and one in German; texts for the models."""
    manuals = [pydoc.HTMLDoc().docmodule(importlib.import_module(name)).encode() for name in MODULES]
    prose = [page(text) for text in TEXTS[20:34]]
    pages = [*manuals, *prose, prose[3], page(GERMAN * 9)]
    (raw / "crawl").mkdir(parents=True)
    (raw / "crawl" / "a.warc.gz").write_bytes(packed(*(response(n, body) for n, body in enumerate(pages))))
    write_rows(raw / "wikipedia_text" / "a.jsonl", TEXTS[:20])
    write_rows(raw / "cited_by_wikipedia" / "a.jsonl", TEXTS[:20])
    sources = [Path(pydoc.__file__).with_name(f"{name}.py") for name in ("ast", "bdb", "cgi", "dis", "doctest", "enum")]
    write_rows(raw / "random_pages" / "a.jsonl", [path.read_text() for path in sources if path.exists()])


def write_projects(raw: Path) -> None:
    """Sources of installed packages with their own licences, and one that asks for more."""
    for name in ("pydantic", "numpy", "tensorboard"):
        files = distribution(name).files or []
        licence = next(f for f in files if f.name.startswith("LICENSE"))
        modules = sorted(f for f in files if f.suffix == ".py" and len(f.parts) == 2)[:6]
        for file in (licence, *modules):
            path = raw / "github" / name / (file.name if file is not licence else "LICENSE")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(Path(str(file.locate())).read_bytes())
    (raw / "github" / "other").mkdir()
    (raw / "github" / "other" / "LICENSE").write_text("GNU GENERAL PUBLIC LICENSE\nVersion 3")
    (raw / "github" / "other" / "other.py").write_text("def other():\n    return 'no free licence'\n")


def write_texts(raw: Path) -> None:
    """Wikipedia, books, ArXiv and StackExchange, in their own formats."""
    articles = [
        f"<page><title>T{n}</title><ns>0</ns><id>{n}</id><revision><text>'''T{n}''' [[a|is]]{{{{cite|x}}}}\n"
        f"{escape(text)}</text></revision></page>"
        for n, text in enumerate(TEXTS[34:44])
    ]
    for folder in ("wikipedia", "gutenberg", "books3", "arxiv", "stackexchange"):
        (raw / folder).mkdir()
    (raw / "wikipedia" / "pages.xml").write_text(f"<mediawiki>{''.join(articles)}</mediawiki>")
    book = " ".join(TEXTS[44:50]).split()
    (raw / "gutenberg" / "one.txt").write_text(" ".join(book))
    book[50:60] = random.Random(1).sample(book, 9)
    (raw / "books3" / "again.txt").write_text("An introduction. " + " ".join(book))
    head = "\\documentclass{article}\n\\newcommand{\\py}{Python}\n\\begin{document}% a comment\n\\section{One}\n"
    for n, text in enumerate(TEXTS[50:54]):
        body = text.replace("Python", "\\py{}").replace("%", "\\%")
        (raw / "arxiv" / f"{n}.txt").write_text(f"{head}{body}\n\\bibliography{{all}}\n\\end{{document}}")
    rows = []
    for n, name in enumerate(MODULES):
        module: Any = importlib.import_module(name)
        rows += [POST.format(3 * n + 1, 1, 5, f"What is {name}?", quoteattr("<p>I want to know what it does.</p>"), "")]
        for i, text in enumerate((f"<p>See the manual of {name}.</p>", f"<p>{escape(module.__doc__ or name)}</p>")):
            rows += [POST.format(3 * n + 2 + i, 2, i, "", quoteattr(text), 3 * n + 1)]
    (raw / "stackexchange" / "Posts.xml").write_text(f"<posts>{''.join(rows)}</posts>")


def test_all_seven_sources(tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fasttext", reason="the extra `curate` is not installed")
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "data" / "raw"
    write_crawl(raw)
    write_projects(raw)
    write_texts(raw)
    (tmp_path / "data" / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    text = (EXAMPLES / "llama.toml").read_text().replace("# tokenizer =", "tokenizer =")
    recipe = str(tmp_path / "llama.toml")
    Path(recipe).write_text(re.sub(r'"(\w+\.toml)",', rf'"{EXAMPLES}/\1",', text))
    assert cli.main(["curate", recipe, "--train"]) == 0
    assert cli.main(["curate", recipe, "--output", "out", "--quiet"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {name: row["share"] for name, row in report["sources"].items()} == SHARES
    for name, row in report["sources"].items():
        words = [f"out/{name}", "--tokenizer", "data/tokenizer.model", "--output", f"tokens/{name}"]
        assert cli.main(["prepare", *words]) == 0
        tokens = (tmp_path / "tokens" / f"{name}.bin").stat().st_size // 2
        assert row["tokens"] == tokens > 0 and row["epochs"] == round(1.4e12 * SHARES[name] / tokens, 4), name
        assert row["bytes_per_token"] == row["kept"]["bytes"] / tokens
    reasons = {
        (name.split()[0], reason): count["documents"]
        for name, stage in report["stages"].items()
        for reason, count in stage.get("reasons", {}).items()
    }
    assert reasons["commoncrawl", "little left"] == 1 and reasons["commoncrawl", "language de"] == 1
    assert reasons["c4", "language de"] == 1
    assert reasons["c4", "same text as an earlier one"] == 1 and reasons["github", "licence gpl"] == 1
    assert reasons["books", "near-duplicate"] == 1
    kept = {name: read_rows(tmp_path / "out", name) for name in SHARES}
    assert len(kept["wikipedia"]) == 10 and not any("[[" in row["text"] for row in kept["wikipedia"])
    assert {row["scores"]["licence"] for row in kept["github"]} == {"mit", "bsd", "apache"}
    for row in kept["arxiv"]:
        assert row["text"].startswith("\\section{One}") and not {"\\py", "% a", "\\bibl"} & {row["text"]}
    first = kept["stackexchange"][0]["text"]
    assert first.startswith("What is argparse?") and first.index("Command-line") < first.index("See the manual")
    assert f"counted by {Path('data/tokenizer.model')}" in (tmp_path / "out" / "report.html").read_text()


def test_an_included_recipe_has_only_sources(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('include = ["a.toml"]\n')
    (tmp_path / "b.toml").write_text('include = ["c.toml"]\nseed = 3\n[[sources]]\nname = "b"\ninputs = ["x"]\n')
    (tmp_path / "c.toml").write_text('[[sources]]\nname = "c"\ninputs = ["y"]\n')
    assert [source.name for source in load_recipe(tmp_path / "b.toml").sources] == ["b", "c"]
    with pytest.raises(ConfigError, match="a.toml has include; of a recipe that is included only sources can be used"):
        load_recipe(tmp_path / "a.toml")


def test_tokens_that_are_not_counted_are_an_estimate(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('bytes_per_token = 3.5\n[[sources]]\nname = "c"\ninputs = ["y"]\n')
    stages = {"c -- raw": {"out": {"documents": 2, "bytes": 700}}}
    tree: dict[str, Any] = {"stages": stages, "bad": {}, "histograms": {}, "samples": {}, "tokens": {"c": 0}}
    write_report(load_recipe(tmp_path / "c.toml"), tree, tmp_path, lambda path, write: write(path))
    assert tree["sources"]["c"]["tokens"] == 200
    assert "Tokens kept are an estimate: bytes / 3.5; a <code>tokenizer" in (tmp_path / "report.html").read_text()
