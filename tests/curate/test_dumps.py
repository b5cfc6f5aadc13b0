"""Dumps of Wikipedia and StackExchange, whole and broken."""

from __future__ import annotations

import bz2
import gzip
from collections import Counter
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest

from megallama.curate.readers import cut, documents

PAGE = "<page><title>{0}</title><ns>{1}</ns><id>{2}</id><revision><id>9{2}</id><text>{3}</text></revision>{4}</page>"
WIKI = (
    "<mediawiki xmlns='http://www.mediawiki.org/xml/export-0.11/'><siteinfo/>"
    + PAGE.format("Ada", 0, 7, "'''Ada''' &amp;amp; co", "")
    + PAGE.format("Talk:Ada", 1, 8, "talk", "")
    + PAGE.format("Lovelace", 0, 9, "#REDIRECT", "<redirect title='Ada' />")
    + PAGE.format("Nothing", 0, 10, "", "")
    + PAGE.format("Bell", 0, 11, "A bell.", "")
    + "</mediawiki>"
)


def read(path: Path) -> tuple[dict[str, str], dict[str, int], dict[str, str]]:
    """Texts by id, what was not read, scores by id."""
    bad, found, scores = Counter[str](), {}, {}
    for unit in cut(0, [str(path)], 1 << 20):
        for document, _ in documents(unit, "wiki", (), 300, lambda file, why: bad.update([why])):
            found[document.id], scores[document.id] = document.text, document.meta.get("score", "")
    return found, dict(bad), scores


@pytest.mark.parametrize("ending", ["xml", "xml.bz2", "xml.gz"])
def test_articles(ending: str, tmp_path: Path) -> None:
    packed = {"xml": bytes, "xml.bz2": bz2.compress, "xml.gz": gzip.compress}[ending](WIKI.encode())
    (tmp_path / f"pages.{ending}").write_bytes(packed)
    found, bad, _ = read(tmp_path / f"pages.{ending}")
    assert found == {"7": "Ada\n\n'''Ada''' &amp; co", "11": "Bell\n\nA bell."}
    assert bad == {"no article but a redirect or a page of another kind": 2, "empty text": 1}


def test_a_dump_that_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "pages.xml").write_text(WIKI[: WIKI.index("Bell")])
    found, bad, _ = read(tmp_path / "pages.xml")
    assert [*found] == ["7"] and sum(bad.values()) == 4
    assert any(why.startswith("cannot be read on: not valid XML") for why in bad)
    (tmp_path / "pages.xml.bz2").write_bytes(bz2.compress(WIKI.encode() * 9)[:-9])
    assert any("cannot be read" in why for why in read(tmp_path / "pages.xml.bz2")[1])


@pytest.mark.parametrize("encoding", ["no-such", "utf-7", "shift_jis"])
def test_an_encoding_that_is_not_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "pages.xml").write_text(f"<?xml version='1.0' encoding='{encoding}'?>{WIKI}")
    found, bad, _ = read(tmp_path / "pages.xml")
    assert found == {} and [*bad.values()] == [1]
    assert all(why.startswith("cannot be read on: not valid XML") for why in bad)


@pytest.mark.parametrize("ending", ["xml", "xml.bz2", "xml.gz"])
def test_flipped_bits_are_counted(ending: str, tmp_path: Path) -> None:
    packed = {"xml": bytes, "xml.bz2": bz2.compress, "xml.gz": gzip.compress}[ending](WIKI.encode() * 3)
    wrong = 0
    for at in range(0, len(packed), 7):
        (tmp_path / f"pages.{ending}").write_bytes(packed[:at] + bytes([packed[at] ^ 4]) + packed[at + 1 :])
        _, bad, _ = read(tmp_path / f"pages.{ending}")
        wrong += any(why.startswith("cannot be read") for why in bad)
    assert wrong > 10


def row(**values: object) -> str:
    return "<row " + " ".join(f"{name}={quoteattr(str(value))}" for name, value in values.items()) + " />"


def test_questions_with_their_answers_the_best_first(tmp_path: Path) -> None:
    rows = [
        row(Id=5, PostTypeId=2, ParentId=1, Score=3, Body="<p>Good.</p>"),
        row(Id=1, PostTypeId=1, Score=8, Title="Why?", Body="<p>&lt;b&gt; is<br/>odd.</p><pre>x &lt; y</pre>"),
        row(Id=2, PostTypeId=2, ParentId=1, Score=-1, Body="No."),
        row(Id=3, PostTypeId=2, ParentId=1, Score=9, Body="<p>Best.</p>"),
        row(Id=4, PostTypeId=2, ParentId=77, Score=9, Body="lost"),
        row(Id=6, PostTypeId=5, Body="wiki"),
        row(Id="x", PostTypeId=1, Body="no number"),
        row(Id=9 * 10**20, PostTypeId=1, Body="a number of more than 64 bits"),
        row(Id=12, PostTypeId=1, Score="9" * 5000, Body="a number that Python does not read"),
        row(Id=8, PostTypeId=1, Score=0, Title="Long", Body="z" * 301),
        row(Id=9, PostTypeId=1, Score=0, Title="Alone", Body="No answer."),
    ]
    (tmp_path / "Posts.xml").write_text("<posts>" + "".join(rows) + "</posts>")
    found, bad, scores = read(tmp_path / "Posts.xml")
    head = "Why?\n\n<b> is\nodd.\n\nx < y"
    assert found == {
        f"{tmp_path}/Posts.xml#1": f"{head}\n\nBest.\n\nGood.\n\nNo.",
        f"{tmp_path}/Posts.xml#9": "Alone\n\nNo answer.",
    }
    assert scores == {f"{tmp_path}/Posts.xml#1": "8", f"{tmp_path}/Posts.xml#9": "0"}
    assert bad == {"neither question nor answer": 4, "answers without their question": 1, "too long": 1}
