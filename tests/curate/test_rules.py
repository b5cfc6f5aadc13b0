"""Each rule on planted documents: the right ones stay, the right ones go, for the right reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config.errors import DataError
from megallama.curate.contamination import Contamination
from megallama.curate.latex import Macros
from megallama.curate.recipe import load_recipe
from megallama.curate.rules import Code, Filter, Language, Licence, Replace, licence_in, licence_of
from tests.curate.recipes import EXAMPLES, judged, write_rows

PROSE = "The river had risen in the night, and the lower fields lay under water. "
C4, GITHUB, WIKIPEDIA, ARXIV = (
    load_recipe(EXAMPLES / f"{name}.toml").sources[0].stages for name in ("c4", "github", "wikipedia", "arxiv")
)
FILTERS = {
    "long enough": (PROSE, ""),
    "too short": ("Hm.", "too short"),
    "too long": (PROSE * 40, "too long"),
    "an unwanted word": (PROSE + "Casino!", "it has (?i)casino"),
    "few sentences": (PROSE.replace(".", ","), "fewer than 1 of [.]"),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filter(name: str) -> None:
    text, reason = FILTERS[name]
    stage = Filter(kind="filter", min_chars=10, max_chars=2000, drop=("(?i)casino",), need="[.]", times=1)
    assert judged((stage,), text) == (reason, text)


def test_c4_keeps_lines_that_are_sentences() -> None:
    lines = [
        "Home | About | Contact",
        PROSE.strip(),
        "It was a short.",
        "Enable Javascript to see all of this page.",
        "We all waited there for the boats...",
        "By using this site you accept the privacy policy of it.",
        "Nobody came[12] until the morning of the third day.",
        'At last a boat came, and "all aboard", he said!',
    ]
    reason, text = judged(C4[:2], "\n".join(lines))
    kept = [lines[1], lines[6].replace("[12]", ""), lines[7]]
    assert (reason, text.split("\n")) == ("", kept)


@pytest.mark.parametrize(
    "text, reason",
    [
        (PROSE * 3 + "\nfunction() { return 1; } and so on and on.", "it has \\{"),
        (PROSE * 3 + "\nLorem ipsum dolor sit amet it says.", "it has (?i)lorem ipsum"),
        (PROSE, "fewer than 3 of"),
        ("Buy now\nCheap pills\nBest price", "too short"),
        (PROSE * 3, ""),
    ],
    ids=["braces", "lorem", "one sentence", "spam", "prose"],
)
def test_c4_drops_pages(text: str, reason: str) -> None:
    found, _ = judged(C4[:2], text)
    assert found.startswith(reason) and bool(found) == bool(reason)


CODE = {
    "by hand": ("def add(a, b):\n    return a + b\n", ""),
    "minified": ("x=1;" * 300, "long lines on average"),
    "one long line": ("a = 1\n" * 50 + "b = '" + "y" * 1001 + "'\n", "a long line"),
    "table of numbers": (", \n".join("--- ... ;;" for _ in range(9)), "few letters and digits"),
}


@pytest.mark.parametrize("name", CODE)
def test_code(name: str) -> None:
    text, reason = CODE[name]
    assert judged((Code(kind="code"),), text)[0] == reason


NOTICES = {
    "hashes": "#!/bin/sh\n# Copyright 2020 Someone\n# Licensed under the MIT licence\n\n# What it does\nrun\n",
    "block": "/*\n * Copyright (c) X\n */\n/* SPDX-License-Identifier: MIT */\nint main;\n",
    "slashes": "// a file\n// (c) Y, see LICENSE\npackage x\n",
    "none": "# Adds numbers\nx = 1\n",
    "later": "import os\n# Copyright in the middle\n",
    "another block": "/* adds */\nint f;\n/* Copyright */\n",
}
WITHOUT = {
    "hashes": "#!/bin/sh\n# What it does\nrun", "block": "int main;", "slashes": "package x",
    "none": "# Adds numbers\nx = 1", "later": "import os\n# Copyright in the middle",
    "another block": "/* adds */\nint f;\n/* Copyright */",
}  # fmt: skip


@pytest.mark.parametrize("name", NOTICES)
def test_notices_are_taken_off(name: str) -> None:
    assert judged(GITHUB[2:3], NOTICES[name]) == ("", WITHOUT[name])


LICENCE_TEXTS = {
    "mit": "MIT License\n\nPermission is hereby granted, free of\ncharge, to any person",
    "bsd": "Copyright X. All rights reserved.\nRedistribution and use in source and binary forms",
    "apache": "Apache License\n Version 2.0, January 2004",
    "gpl": "This is under the GNU General Public License; parts: Permission is hereby granted, free of charge",
    "mpl": "Mozilla Public License Version 2.0",
    "unknown": "You may not, however GPL-compatible it is.",
}


@pytest.mark.parametrize("name", LICENCE_TEXTS)
def test_licences_are_told_by_their_text(name: str) -> None:
    assert licence_of(LICENCE_TEXTS[name]) == name
    bundled = "\n\nThe distribution bundles a library under the GNU General Public License."
    assert licence_of(LICENCE_TEXTS[name] + bundled) == (name if name != "unknown" else "gpl")


@pytest.mark.parametrize(
    "tag, name",
    [("MIT", "mit"), ("BSD-3-Clause", "bsd"), ("Apache-2.0", "apache"), ("GPL-3.0-only", "gpl"), ("AGPL", "gpl"),
     ("LGPL-2.1", "gpl"), ("0BSD", "bsd"), ("Unlicense", "unknown")],
)  # fmt: skip
def test_licences_are_told_by_their_names(tag: str, name: str) -> None:
    assert licence_of(tag) == name
    reason = judged((Licence(kind="licence"),), "x", license=tag, path="")[0]
    assert reason == ("" if name in ("mit", "bsd", "apache") else f"licence {name}")


def test_the_nearest_licence_file_counts(tmp_path: Path) -> None:
    def file(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    file("LICENSE", LICENCE_TEXTS["gpl"])
    file("lib/vendored/COPYING.txt", LICENCE_TEXTS["mit"])
    file("site/pkg-1.0.dist-info/licenses/LICENSE", LICENCE_TEXTS["bsd"])
    file("two/LICENSE-APACHE", LICENCE_TEXTS["apache"])
    file("two/LICENSE-GPL", LICENCE_TEXTS["gpl"])
    stage = (Licence(kind="licence"),)
    assert judged(stage, "x", path=file("lib/a.py", "x"))[0] == "licence gpl"
    assert judged(stage, "x", path=file("lib/vendored/deep/a.c", "x"))[0] == ""
    assert judged(stage, "x", path=file("site/pkg/a.py", "x"))[0] == ""
    assert judged(stage, "x", path=file("two/a.py", "x"))[0] == "licence gpl"
    assert judged(stage, "x", path="/nowhere/a.py")[0] == "licence none"
    licence_in.cache_clear()


@pytest.mark.parametrize(("pattern", "by"), [("", "x"), ("a", "aa"), ("(?=b)", "<>")])
def test_replacements_that_grow(pattern: str, by: str) -> None:
    rules = ({"pattern": pattern, "by": by, "nested": True},)
    stage = (Replace.model_validate({"kind": "replace", "rules": rules}),)
    reason, found = judged(stage, "ab" * 5000)
    assert reason == "replacements that grow without end" and len(found) < 1_000_000
    assert judged(stage, "ccc")[0] == ("replacements that grow without end" if not pattern else "")


def test_wikitext() -> None:
    text = (
        "{{Infobox|a={{b|c}}|d}}'''Ada''' [[Lovelace|L.]] was<!-- not --> a [[mathematician]]"
        "<ref name=x>book {{cite}}</ref><ref name=y/>.\n{| class=t\n|-\n| cell\n|}\n"
        "[[File:a.jpg|thumb|She in [[London]]]]\n== Life ==\n* born ''1815'' &amp; raised\n"
        "see [http://x.org her page].\n__TOC__ {{reflist}}\n[[Category:People]]" + PROSE * 3
    )
    reason, found = judged(WIKIPEDIA, text)
    head = "Ada L. was a mathematician.\n\nLife\nborn 1815 & raised\nsee her page."
    assert reason == "" and [line.strip() for line in found.split("\n")][:5] == head.split("\n")
    assert found.endswith(PROSE.strip()) and not any(mark in found for mark in ("[[", "{{", "''", "Category", "cell"))
    assert judged(WIKIPEDIA, "#REDIRECT [[Ada]]")[0].startswith("it has")


def test_latex() -> None:
    text = (
        "\\documentclass{article} % style\n\\begin{document}\\abstract{x}\n\\section*{One} 50\\% of it % not this\n"
        "% nor this\nEnd.\n\\begin{comment}\nold\n\\end{comment}\n\\begin{thebibliography}{9}\\bibitem{a} A.\n"
        "\\end{thebibliography}\n\\appendix\\section{Two}\\bibliography{all}\n\\end{document} rest"
    )
    reason, found = judged(ARXIV, text)
    assert (reason, found) == ("", "\\section*{One} 50\\% of it \nEnd.\n\n\\appendix\\section{Two}")
    assert judged(ARXIV, "\\begin{document}Hello\\end{document}")[0].startswith("fewer than 1")


MACROS = {
    "no arguments": (r"\newcommand{\R}{\mathbb{R}} in \R^n and \Rest", r" in \mathbb{R}^n and \Rest"),
    "arguments": (r"\newcommand{\n}[2]{|#1|_{#2}}\n{x}{2} \n y3", r"|x|_{2} |y|_{3}"),
    "def": (r"\def\eps{\varepsilon}\def\p#1{(#1)} \p{\eps }", r" (\varepsilon)"),
    "nested": (r"\newcommand\a{A\b}\newcommand\b{B} \a.", r" AB."),
    "escaped": (r"\newcommand{\set}{\{x\}} \set", r" \{x\}"),
    "open": (r"\newcommand{\x}{never closed \x", r"\newcommand{\x}{never closed \x"),
    "none": (r"\section{x} \alpha", r"\section{x} \alpha"),
}


@pytest.mark.parametrize("name", MACROS)
def test_macros_are_written_out(name: str) -> None:
    text, expected = MACROS[name]
    assert judged((Macros(kind="macros"),), text) == ("", expected)


@pytest.mark.parametrize(
    "text",
    [r"\def\a{\b\b}\def\b{\a\a} \a", r"\def\a{x\a} \a", r"\def\a{" + "x" * 9999 + "}" + r"\a " * 9999],
    ids=["doubling", "endless", "huge"],
)
def test_macros_that_grow_end(text: str) -> None:
    assert judged((Macros(kind="macros"),), text)[0] == "macros that grow without end"


def test_passages_of_evaluations(tmp_path: Path) -> None:
    question = "If a train leaves the northern station at nine and another at ten, when do both of them meet?"
    write_rows(tmp_path / "eval.jsonl", ["short"])
    with (tmp_path / "eval.jsonl").open("a") as file:
        file.write('{"question": {"stem": "' + question + '"}, "choices": ["at noon", "never"]}\n')
    stage = (Contamination(kind="contamination", against=(str(tmp_path / "eval.jsonl"),)),)
    whole = PROSE + question.upper().replace(",", " -") + PROSE
    assert judged(stage, whole)[0] == "passage of an evaluation"
    assert judged(stage, PROSE + " ".join(question.split()[:12]))[0] == ""
    for hits, reason in ((7, "passage of an evaluation"), (8, "")):  # 19 words are 7 n-grams of 13
        many = (Contamination(kind="contamination", against=stage[0].against, min_hits=hits),)
        assert judged(many, whole)[0] == reason
    (tmp_path / "bad.jsonl").write_text('{"a": "b"}\n{"a\n')
    for files, message in ((("bad.jsonl",), "bad.jsonl:2: .*must be read whole"), ((), "holds no text of 13 words")):
        wrong = Contamination(kind="contamination", against=tuple(str(tmp_path / file) for file in files))
        with pytest.raises(DataError, match=message):
            wrong.start()


def test_an_evaluation_that_is_not_read_is_no_evaluation_without_hits(tmp_path: Path) -> None:
    write_rows(tmp_path / "evals" / "a.jsonl", [PROSE])
    (tmp_path / "evals" / ".hidden").write_text("x")
    stage = Contamination(kind="contamination", against=(str(tmp_path / "evals"),))
    assert judged((stage,), PROSE)[0] == "passage of an evaluation"
    (tmp_path / "evals" / "mmlu.csv").write_text(PROSE)
    with pytest.raises(DataError, match="evals: not read: .csv; an evaluation must be read whole"):
        stage.start()
    (tmp_path / "evals" / "mmlu.csv").unlink()
    (tmp_path / "evals" / "deep.jsonl").write_text('{"question": ' + "[" * 100_000)
    with pytest.raises(DataError, match="deep.jsonl:1: .*must be read whole"):
        stage.start()


LANGUAGES = {
    "en": PROSE,
    "de": "Der Fluss war in der Nacht gestiegen, und die unteren Felder standen unter Wasser.",
    "fr": "La rivi\u00e8re avait mont\u00e9 pendant la nuit et les champs les plus bas \u00e9taient sous l'eau.",
    "es": "El r\u00edo hab\u00eda crecido durante la noche y los campos bajos estaban cubiertos de agua.",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_language(language: str) -> None:
    pytest.importorskip("fasttext", reason="the extra `curate` is not installed")
    for text in (LANGUAGES[language] * 3, LANGUAGES[language].replace(" ", "\u00a0") * 3):
        reason, _ = judged((Language(kind="language"),), text)
        assert reason == ("" if language == "en" else f"language {language}")
