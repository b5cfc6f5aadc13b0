"""A small corpus and its tokenizer, made once."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megallama.data.train_tokenizer import train_tokenizer

WORDS = "the quick brown fox jumps over a lazy dog while 12 birds sing def return self import 3.14 naïve 東京".split()


def text_of(number: int) -> str:
    """A document as a function of its number: 5 to 60 words on lines with some indentation."""
    draw = random.Random(number)
    words = [draw.choice(WORDS) for _ in range(draw.randint(5, 60))]
    return "".join(w + draw.choice([" ", " ", " ", "\n", "\n    "]) for w in words)


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents as JSON lines."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text_of(i)}) + "\n" for i in range(300)))
    return path


@pytest.fixture(scope="session")
def tokenizer_path(jsonl: Path) -> Path:
    """A SentencePiece model of 330 ids."""
    return train_tokenizer([jsonl], jsonl.parent / "tokenizer.model", 330)


@pytest.fixture(scope="module")
def json_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer.json with LLaMA 3's names of control tokens, which also appends them by default."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([text_of(i) for i in range(50)], trainer)
    model.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", None, [("<|begin_of_text|>", 0)])
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    model.save(str(path))
    return path
