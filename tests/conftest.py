"""Fixtures shared by all rooms."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.words import text_of

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several ranks share few cores
for _number in (signal.SIGHUP, signal.SIGQUIT):  # under nohup they are ignored, and so in all processes of the tests
    signal.signal(_number, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The files that take longest, by seconds: they go first, or one core works on the last of them while the other is idle.
LONGEST = (
    *("test_lint.py", "parity/test_matrix.py", "faults/test_hosts.py", "analysis/test_dryrun.py"),
    *("parity/test_context.py", "parity/test_delays.py", "quickstart/test_main_job.py", "faults/test_supervisor.py"),
    *("checkpoint/test_crashes.py", "train/test_flat.py", "comm/test_world.py", "train/test_gpu_benchmarks.py"),
    *("faults/test_waiting.py", "train/test_loop.py", "train/test_data.py", "text/test_fast_encoder.py"),
    *("faults/test_bad_input.py", "optim/test_update.py", "train/test_frames.py", "convert/test_reshard_errors.py"),
)

if TYPE_CHECKING:
    from tests.pool import Pool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the others as they were."""
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


@pytest.fixture(autouse=True, scope="module")
def small_heap() -> None:
    """What was imported until here is no business of the collector, which walked through it in every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A run that saved and stopped ignores signals from then on, in the process of its test too: given back here."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A run takes all cores for its one rank; the test after it computes with one thread again, beside another file."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def copies(request: pytest.FixtureRequest) -> Iterator[None]:
    """A run that was killed leaves its copies in memory to the next: here nobody goes on from them."""
    folder = str(request.getfixturevalue("tmp_path")).encode() if "tmp_path" in request.fixturenames else b""
    yield
    if folder:
        for path in Path("/dev/shm").glob("megallama-copies-*"):
            with suppress(OSError):
                if path.read_bytes()[-4096:].startswith(folder):
                    path.unlink()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Worker processes for tests over gloo: `pool.run(ranks, "module:function", *args)`."""
    from tests.pool import Pool  # imports torch, which not every test needs

    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents as JSON lines."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text_of(i)}) + "\n" for i in range(300)))
    return path


@pytest.fixture(scope="session")
def tokenizer_path(jsonl: Path) -> Path:
    """A SentencePiece model of 330 ids."""
    from megallama.text.train_tokenizer import train_tokenizer

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
