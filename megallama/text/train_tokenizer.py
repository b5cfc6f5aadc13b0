"""Training a LLaMA-style SentencePiece tokenizer; and a corpus for the first run.

The recipe of LLaMA 1 and 2 (Touvron et al. 2023, 2.1): BPE; unknown characters as bytes; digits split;
text as it is; <unk>=0, <s>=1, </s>=2. Training sees lines: a newline is always the byte piece <0x0A>.
The corpus is the reader's own text, or the standard library and the topics of `help()`: no download.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megallama.config.errors import DataError
from megallama.data.writer import write_whole
from megallama.text.documents import RecordReader, place
from megallama.text.inputs import Losses

LINE_CHARACTERS = 4096  # longer lines are cut; SentencePiece would silently leave them out
SMALLEST = 3 + 256 + 1  # control pieces, bytes, and one piece
FOLDERS = "site-packages|dist-packages|test|tests|idle_test|encodings|pydoc_data|__pycache__"
LEFT_OUT = re.compile(f"config-|(.*/)?(_sysconfigdata|({FOLDERS})/)")
MIN_BYTES = 100_000  # of the reader's own text
MIN_DOCUMENTS, MAX_PIECE_BYTES = 64, 16_384  # into which long ones are cut


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    *,
    json_key: str = "text",
    sample_bytes: int = 200_000_000,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    losses: Losses | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Train on files, folders or patterns and write OUTPUT.model; the same input gives the same file.

    Of more text an even sample of `sample_bytes` is used: 13 times that in memory, 0.3 s per MB.
    `progress(bytes read, bytes in all)`; `losses` judges what is lost; `say` gets what is not read.
    Raises: DataError, which names the largest possible vocabulary where the text is too small.
    """
    output, losses = Path(output), losses or Losses()
    if output.suffix != ".model":
        raise DataError(f"output {output} must end in .model")
    if vocab_size < SMALLEST:
        what = f"vocab_size={vocab_size} leaves no room beside 3 control and 256 byte pieces"
        raise DataError(f"{what}; use {SMALLEST} or more")
    if sample_bytes < 1 or threads < 1:
        raise DataError(f"sample_bytes={sample_bytes}, threads={threads}; use 1 or more of each")
    import sentencepiece

    model, reader = io.BytesIO(), RecordReader(losses.find(inputs, say), json_key=json_key)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(reader, sample_bytes, progress, losses),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.99995,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=threads,
            max_sentence_length=8 * LINE_CHARACTERS,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise _explain(error, vocab_size) from error
    write_whole(output, model.getvalue())
    return output


def _explain(error: Exception, vocab_size: int) -> DataError:
    for pattern, why in (
        (r"too high .* to a value <= (\d+)", "more than this text supports; use {} or less, or more text"),
        (r"smaller than required_chars.* vs (\d+)", "less than the characters of this text need; use {} or more"),
    ):
        if found := re.search(pattern, str(error)):
            return DataError(f"vocab_size={vocab_size} is {why.format(found[1])}")
    return DataError(f"SentencePiece could not train: {error}")


def _lines(
    reader: RecordReader, sample_bytes: int, progress: Callable[[int, int], None], losses: Losses
) -> Iterator[str]:
    """The lines, cut to length, of the documents of smallest hash: an even sample in one pass."""
    sample: list[tuple[int, int, bytes]] = []  # (-hash, number, text), the largest hash first
    size, limit = 0, 1 << 64
    for _, document in losses.texts(reader):
        number = losses.records - 1
        if number % 64 == 0:
            progress(reader.bytes_done, reader.bytes_total)
        drawn = int.from_bytes(hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest(), "little")
        if drawn >= limit:
            continue
        text = document.encode()
        heapq.heappush(sample, (-drawn, number, text))
        size += len(text)
        while size > sample_bytes and len(sample) > 1:
            drawn, _, text = heapq.heappop(sample)
            size, limit = size - len(text), -drawn
    progress(reader.bytes_total, reader.bytes_total)
    if not any(text.strip(b"\0\n") for _, _, text in sample):
        raise DataError("there is no text to train a tokenizer on in the given files")
    sample.sort(key=lambda entry: -entry[1])
    while sample:
        for line in sample.pop()[2].decode().replace("\0", "").split("\n"):
            yield from (line[at : at + LINE_CHARACTERS] for at in range(0, len(line), LINE_CHARACTERS))


@dataclass(frozen=True)
class Corpus:
    """What `build_corpus` wrote."""

    path: Path
    documents: int
    text_bytes: int
    skipped: tuple[str, ...]  # lines that tell what was left out, and why


def build_corpus(out: Path, max_bytes: int, text: Path | None = None, *, stdlib: Path | None = None) -> Corpus:
    """Write JSON lines {"text", "source"} of the default corpus, or of `text` (file, folder).

    At most `max_bytes` of text, each content once; the same installation (or text) gives the same bytes.
    Raises: DataError if the text is missing, empty, unreadable or too small to train on.
    """
    skipped, losses = list[str](), Losses()
    if text is None:
        lib = stdlib or Path(sysconfig.get_paths()["stdlib"])
        documents: Iterable[tuple[str, str]] = [*_topics(), *_modules(lib, skipped)]
        if not documents:
            what = f"{lib} holds no Python sources (a trimmed installation?)"
            raise DataError(f"{what}; give your own text with TEXT=path")
    else:
        if not text.exists():
            raise DataError(f"{text} does not exist; TEXT takes a text file, a .jsonl file or a folder of them")
        reader = RecordReader(losses.find([text], skipped.append))
        if not reader.bytes_total:
            raise DataError(f"{text} is empty; give a file or folder with {MIN_BYTES:,} bytes of text or more")
        size = min(MAX_PIECE_BYTES, max(1024, reader.bytes_total // MIN_DOCUMENTS))
        documents = (
            (f"{place(record)} part {number}", piece)
            for record, body in losses.texts(reader)
            for number, piece in enumerate(pieces(body, size))
        )
    sources, total = dict[str, str](), 0  # by content
    for source, body in documents:
        if (grown := total + len(body.encode())) > max_bytes:
            break
        if body not in sources and body.strip():
            sources[body], total = source, grown
    losses.check()
    if text is not None and total < MIN_BYTES:
        note = f" ({len(skipped)} skipped, the first: {skipped[0]})" if skipped else ""
        little = f"{text} holds {total:,} bytes of usable text{note}, too little to train on"
        raise DataError(f"{little}; give {MIN_BYTES:,} bytes or more of UTF-8 text, as a file or a folder")
    lines = (json.dumps({"text": body, "source": sources[body]}, ensure_ascii=False) for body in sources)
    write_whole(out, "".join(line + "\n" for line in lines).encode())
    return Corpus(out, len(sources), total, (*skipped, *(losses.lines() if losses.skipped else [])))


def _modules(lib: Path, skipped: list[str]) -> Iterator[tuple[str, str]]:
    """The standard library's modules in the order of a hash: any part is a fair one."""
    names = (path.relative_to(lib).as_posix() for path in lib.rglob("*.py"))
    names = (name for name in names if not LEFT_OUT.match(name))
    for name in sorted(names, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest()):
        try:
            yield name, (lib / name).read_text("utf-8")
        except (UnicodeDecodeError, OSError) as error:
            skipped.append(f"{name}: {'not UTF-8' if isinstance(error, UnicodeDecodeError) else error.strerror}")


def _topics() -> Iterator[tuple[str, str]]:
    with suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics

        yield from ((f"topic {name}", topics[name]) for name in sorted(topics))


def pieces(text: str, size: int) -> Iterator[str]:
    """Cut into pieces of `size` to twice as many characters: after a blank line, a line, or anywhere."""
    start = 0
    while (last := start + 2 * size) < len(text):
        blank, line = (text.find(end, start + size, last) for end in ("\n\n", "\n"))
        end = blank + 2 if blank >= 0 else line + 1 or last
        yield text[start:end]
        start = end
    yield text[start:]
