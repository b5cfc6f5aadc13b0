"""N-grams of words: what a word is, and that all occurrences are found and no others."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megallama.text.ngrams import Ngrams, _hash, words_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't STOP: now!", "don t stop now"),
        ("a_b\tc\n1,000", "a b c 1 000"),
        ("“Quoted” – naïve Cafe\u0301 ＡＢ ﬁne", "quoted naïve café ab fine"),
        ("ПРИВЕТ, мир", "привет мир"),
        ("日本語 と x", "日 本 語 と x"),
        ("हिन्दी भाषा।", "हिन्दी भाषा"),
        ("", ""),
        ("\ud800 x", "x"),
    ],
    ids=["ascii", "separators", "marks and forms", "cyrillic", "characters", "vowel signs", "empty", "half a pair"],
)
def test_words(text: str, words: str) -> None:
    assert b" ".join(words_of(text)).decode() == words


def plain(text: str, words: int) -> list[tuple[str, ...]]:
    own = text.split()
    return [tuple(own[i : i + words]) for i in range(len(own) - words + 1)]


@pytest.mark.parametrize("words", [3, 9, 13])
def test_all_that_occur_are_found_and_no_others(words: int) -> None:
    draw = random.Random(words)
    names = [f"w{i}" for i in range(4 if words > 3 else 30)]
    texts = [" ".join(draw.choices(names, k=draw.randint(0, 25))) for _ in range(60)]
    others = [" ".join(draw.choices(names, k=draw.randint(0, 70))) for _ in range(150)]
    others += [f"x {texts[4]} y {texts[5]}", texts[6], texts[7][:-1]]
    index = Ngrams(texts, words)
    seen, where = np.zeros(index.size, bool), dict[int, int]()
    for first in range(0, len(others), 7):
        found, grams = index.find(others[first : first + 7])
        assert (np.diff(found) >= 0).all()
        for text, gram in zip(found.tolist(), grams.tolist(), strict=True):
            where.setdefault(gram, first + text)
    seen[[*where]] = True
    shares, shown = index.shares(seen), dict[int, tuple[int, str]]()
    for text, gram, passage in index.examples(seen):
        shown[text] = where[gram], passage
    some = 0
    for number, text in enumerate(texts):
        size = min(words, max(len(text.split()), min(8, words)))  # a shorter one as a whole, down to 8 words
        own, had = plain(text, size), [plain(other, size) for other in others]
        if not own:
            assert np.isnan(shares[number]) and number not in shown
            continue
        hits = [[i for i, there in enumerate(had) if gram in there] for gram in own]
        assert shares[number] == pytest.approx(sum(map(bool, hits)) / len(own))
        begins = next((i for i, there in enumerate(hits) if there), None)
        assert (number in shown) is (begins is not None)
        if begins is not None:
            some += 1
            assert shown[number] == (hits[begins][0], " ".join(own[begins]))
    assert 3 <= some < len(texts)


def test_nothing_in_nothing() -> None:
    index = Ngrams(["too short", ""])
    assert index.size == 0 and index.find(["a b c " * 9, ""]).shape == (2, 0)
    assert np.isnan(index.shares(np.zeros(0, bool))).all() and not [*index.examples(np.zeros(0, bool))]
    assert Ngrams([]).size == 0 and Ngrams(["a " * 20]).find([]).shape == (2, 0)


def test_a_gram_across_two_texts_is_none() -> None:
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    index = Ngrams([text])
    assert index.size == 1
    assert index.find([text[:30], text[30:]]).shape == (2, 0)
    assert index.find(["x", f"So: {text.upper()}!"]).tolist() == [[1], [0]]


def test_hashes_are_those_of_another_process() -> None:
    code = "from megallama.text.ngrams import _hash; print(_hash(b'word').hex())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == _hash(b"word").hex() == "4aa4cf27d7c78e95"
