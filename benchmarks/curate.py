"""Curation: MB/s a block on one core, beside others in turns; whole recipes on text of this machine.

    python benchmarks/curate.py --mb 1000

Text: HTML, man pages and text files below --roots, as WARC files; Python sources of the installed packages with their
licences.  Seconds are CPU seconds of the process, so a busy machine disturbs little.  The whole recipe is run with one
process and with two, and once more after kill -9 at random moments: the bytes must be the same.  A block of another
project is left out where it is not installed (datatrove, spacy, rensa).  Results: `results/curate.json`, `curate.md`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import header, median, save, table

from megallama.curate.hashing import paragraph_hashes
from megallama.curate.readers import html_text
from megallama.curate.recipe import KINDS
from megallama.curate.stage import Document

ROOT = Path(__file__).resolve().parents[1]
ROOTS = ("/usr/share/doc", "/usr/share/man", sys.prefix, "/usr/lib", "/root/.pyenv")
SUFFIXES = (".html", ".htm", ".txt", ".rst", ".md", ".gz")
ROUNDS = 3
Blocks = dict[str, Callable[[list[str]], Any]]


@dataclass(frozen=True)
class Block:
    """MB of text a second of CPU time, of one block."""

    name: str
    rate: float


@dataclass(frozen=True)
class Whole:
    """A whole recipe: processes, kills, seconds, MB/s of raw pages, peak memory [MiB], digest of what was written."""

    processes: int
    kills: int
    seconds: float
    rate: float
    peak: int
    digest: str


def raw_pages(roots: list[str], limit: int) -> Iterator[tuple[str, str, bytes]]:
    """Name, type and content of pages below some folders, in the order of a hash, up to `limit` bytes."""
    files = {str(p) for root in roots for p in Path(root).rglob("*") if p.suffix in SUFFIXES and p.is_file()}
    size = 0
    for name in sorted(files, key=lambda name: hashlib.sha1(name.encode()).digest()):
        if name.endswith(".gz") and "/man/" not in name:
            continue
        try:
            data = gzip.open(name).read() if name.endswith(".gz") else Path(name).read_bytes()
        except OSError:
            continue
        if 200 < len(data) < 2_000_000:
            size += len(data)
            yield name, "text/html" if b"<html" in data[:2000].lower() else "text/plain", data
        if size >= limit:
            return


def write_archives(folder: Path, roots: list[str], limit: int, files: int = 8) -> tuple[int, int]:
    """WARC files of pages; pages and bytes that are in them."""
    folder.mkdir(parents=True)
    outs = [open(folder / f"{n}.warc.gz", "wb") for n in range(files)]
    count = size = 0
    for count, (name, media, data) in enumerate(raw_pages(roots, limit), 1):
        content = f"HTTP/1.1 200 OK\r\nContent-Type: {media}\r\n\r\n".encode() + data
        about = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{count}>\r\n"
        about += f"WARC-Target-URI: file:{name}\r\n"
        about += f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(content)}\r\n\r\n"
        outs[count % files].write(gzip.compress(about.encode() + content + b"\r\n\r\n", 1))
        size += len(data)
    for out in outs:
        out.close()
    return count, size


def blocks(work: Path, texts: list[str]) -> Blocks:
    """What is measured on the same texts, ours and others'."""
    out: Blocks = {"paragraphs: hashes": lambda some: [*map(paragraph_hashes, some)]}
    rules = {"filter": {"drop_lines": ("(?i)javascript",), "keep_lines": (r"[.!?]\s*$",)}, "code": {}, "language": {}}
    if "perplexity" in KINDS:
        (work / "reference").mkdir(parents=True)
        (work / "reference" / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:300]))
        (work / "random.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[300:600]))
        good, bad, weights = str(work / "reference"), str(work / "random.jsonl"), str(work / "w.npy")
        rules["perplexity"] = {"model": str(work / "lm"), "reference": (good,), "vocabulary": 8000}
        rules["reference"] = {"model": weights, "positive": (good,), "negative": (bad,)}
    for kind, options in rules.items():
        stage: Any = KINDS[kind](kind=kind, **options)
        if hasattr(stage, "train"):
            stage.train(lambda text: print(text, file=sys.stderr))
        apply = stage.start()
        out[kind] = lambda some, apply=apply: [apply(Document(t, "", "")) for t in some]
    if "near_duplicates" in KINDS:
        near: Any = KINDS["near_duplicates"](kind="near_duplicates")
        out["MinHash: 128 hashes"] = lambda some: [near.signature(t) for t in some]
    return out | _others(work)


def _others(work: Path) -> Blocks:
    out: Blocks = {}
    try:
        filters = importlib.import_module("datatrove.pipeline.filters")
        data = importlib.import_module("datatrove.data")
        minhash = importlib.import_module("datatrove.pipeline.dedup.minhash")
        c4 = filters.C4QualityFilter()
        hashing = importlib.import_module("datatrove.utils.hashing").HashConfig(precision=64, hash_fc="sha1")
        config = minhash.MinhashConfig(hash_config=hashing)
        signer = minhash.MinhashDedupSignature(str(work / "signatures"), config=config)
        documents = lambda some: [data.Document(text=t, id="x") for t in some]  # noqa: E731

        def signed(text: str) -> Any:
            shingles = signer.get_shingles(text)
            return signer.get_signature(shingles) if shingles.size else None

        signed("One. Two. Three.")
        out["filter, datatrove's C4"] = lambda some: [c4.filter(d) for d in documents(some)]
        out["MinHash, datatrove's 112"] = lambda some: [*map(signed, some)]
    except ImportError as error:
        print(f"datatrove is left out: {error}", file=sys.stderr)
    try:
        rensa = importlib.import_module("rensa")

        def signature(text: str) -> Any:
            words, mine = text.split(), rensa.RMinHash(num_perm=128, seed=1)
            mine.update([" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))])
            return mine.digest()

        out["MinHash, rensa's 128"] = lambda some: [signature(t) for t in some]
    except ImportError as error:
        print(f"rensa is left out: {error}", file=sys.stderr)
    return out


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
    draw, begun, peak = random.Random(7), time.monotonic(), 0
    for left in range(kills, -1, -1):
        process = subprocess.Popen([*words, "--workers", str(workers)], env=env, start_new_session=True)
        until = time.monotonic() + draw.uniform(3, 12) if left else float("inf")
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
    seconds = time.monotonic() - begun
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


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=1000.0, help="raw pages of the whole recipe")
    parser.add_argument("--block-mb", type=float, default=20.0, help="text of the blocks")
    parser.add_argument("--roots", nargs="+", default=list(ROOTS))
    parser.add_argument("--kills", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="curate-") as folder:
        work = Path(folder)
        pages = [(media, data) for _, media, data in raw_pages(args.roots, int(args.block_mb * 2e6))]
        begun = time.process_time()
        texts = [html_text(data) for media, data in pages if media == "text/html"]
        size = sum(len(data) for media, data in pages if media == "text/html") / 1e6
        rows = [Block("text of HTML (Resiliparse)", round(size / (time.process_time() - begun), 1))]
        texts += [data.decode("utf-8", "replace") for media, data in pages if media != "text/html"]
        rows += measure(blocks(work / "models", texts), texts)
        count, size_raw = write_archives(work / "crawl", args.roots, int(args.mb * 1e6))
        recipe = work / "recipe.toml"
        stages = [("filter", "min_chars = 100"), ("paragraphs", ""), ("language", "")]
        stages += [("perplexity", f'model = "{work}/models/lm"')] if "perplexity" in KINDS else []
        stages += [("near_duplicates", "")] if "near_duplicates" in KINDS else []
        text = "".join(f'[[sources.stages]]\nkind = "{kind}"\n{more}\n' for kind, more in stages)
        recipe.write_text(f'[[sources]]\nname = "crawl"\ninputs = ["{work}/crawl"]\n{text}')
        shown = list[dict[str, str]]()
        hows = ((1, 0), (2, 0), (2, args.kills))
        runs = [whole(recipe, work / f"out{n}", size_raw / 1e6, *how) for n, how in enumerate(hows)]
        kept = json.loads((work / "out0" / "report.json").read_text())["sources"]["crawl"]["kept"]
    what = f"The whole recipe ({', '.join(kind for kind, _ in stages)}) on {count:,} pages of {size_raw / 1e6:.0f} MB"
    text = table([{"block": row.name, "MB/s of text, one core": f"{row.rate:.1f}"} for row in rows])
    text += f"\n{what}; {kept['documents']:,} documents of {kept['bytes'] / 1e6:.0f} MB are kept.\n\n"
    heads = ("processes", "kill -9", "seconds", "MB/s of raw pages", "peak memory, MiB", "digest of all files")
    for run in runs:
        values = (run.processes, run.kills, f"{run.seconds:.0f}", f"{run.rate:.1f}", run.peak, run.digest)
        shown.append(dict(zip(heads, map(str, values), strict=True)))
    save("curate", [*rows, *runs], header("Curation", args) + text + table(shown))
    if len({run.digest for run in runs}) > 1:
        raise SystemExit("the bytes differ")


if __name__ == "__main__":
    main()
