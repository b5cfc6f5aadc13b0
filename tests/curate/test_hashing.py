"""Texts as they are compared."""

from __future__ import annotations

import hashlib

import pytest
import xxhash

from megallama.curate.hashing import normalise, paragraph_hashes, text_hash


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Hello, World 42!\tx", "hello world 00 x"),
        ("one\r\ntwo", "one \ntwo"),
        ("\u00dcn\u00efc\u00f6d\u00e9 \u0661\u0662", "unicode 00"),
        ("\u00c7a\u00a0va\u2014\u201cStra\u00dfe\u201d", "ca vastra\u00dfe"),
        ("e\u0301t\u00e9", "ete"),
        ("\ud55c\uad6d\uc5b4 \u65e5\u672c", "\ud55c\uad6d\uc5b4 \u65e5\u672c"),
        ("\U00020000\U0001f600x", "\U00020000x"),
        ("", ""),
    ],
    ids=["ascii", "lines", "accents", "marks", "combining", "hangul", "beyond", "empty"],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text).decode() == expected
    assert normalise(text + "\u00e9")[:-1] == normalise(text)  # the way of plain ASCII is the other way


def test_a_paragraph_is_the_hash_of_its_normalised_line() -> None:
    found = paragraph_hashes("The First.\n\n  the FIRST\n...\nsecond 7")
    first, second = xxhash.xxh3_64_intdigest(b"the first"), xxhash.xxh3_64_intdigest(b"second 0")
    assert found.tolist() == [first, 0, first, 0, second]
    assert (first, second) == (0x2442FCC5CFAB67C5, 0x2AE49534600423DF)  # the same everywhere


def test_the_hash_of_a_text_is_the_same_everywhere() -> None:
    assert text_hash("a") == int.from_bytes(hashlib.blake2b(b"a", digest_size=8).digest(), "little")
    assert text_hash("\ud800") == text_hash("?")  # half of a surrogate pair does not end a run
