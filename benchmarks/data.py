"""Text to tokens: our tools/preprocess_data.py, the bare encoders and Megatron's tool, alternately, on the same text.

    python benchmarks/data.py                                              ours and the bare encoders
    python benchmarks/data.py --peers-python runs/peers/bin/python --megatron path/to/Megatron-LM
    python benchmarks/data.py --mb 10 --large-mb 0 --rounds 1              a quick look

The text is what this machine has: the sources and documents of its Python installations and /usr/share, each text
once, as JSON lines; `--large-mb` repeats it with changes.  Text and tokenizers (SentencePiece and byte-level BPE,
32,000 ids) are made once, in --folder.  A rate is bytes of text / wall time: of the whole command for the tools, of
encoding alone with all text in memory for the bare encoders.  Memory is the largest sum of PSS over the processes of
the command, looked at 20 times a second in a run of its own, because looking costs time.  Whose files are the same,
byte by byte, is in the table.  The peers' environment is that of `benchmarks/peers.py --setup`.  Results:
`benchmarks/results/data.json` and `data.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from launch import BenchmarkError, busy_seconds, wait_for_calm
from report import header, median, save, table

ROOT = Path(__file__).resolve().parent.parent
DRIVERS = ROOT / "benchmarks" / "drivers"
KINDS = {".py", ".md", ".rst", ".txt", ".html", ".h", ".c", ".js", ".pyi"}
VOCABULARY, MAX_TEXT = 32_000, 300_000
SPLIT = (  # the words of LLaMA 3's byte-level BPE
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class System:
    """One way to encode the text with one tokenizer; {input}, {output} and {text} stand in its command."""

    name: str
    tokenizer: str
    command: tuple[str, ...]
    large: bool = False  # measured on the large text too
    bare: bool = False  # an encoder alone


@dataclass(frozen=True)
class Measured:
    """One run."""

    system: str
    tokenizer: str
    text_mb: int
    mb_per_second: float
    wall_seconds: float
    cpu_seconds: float
    peak_mb: int  # 0: nobody looked
    other_load: float
    digest: str  # of .bin and .idx
    note: str


def texts(limit: int) -> Iterator[str]:
    """Distinct texts of this machine, `limit` bytes in all, in a fixed order."""
    places = [sysconfig.get_paths()["stdlib"], "/usr/share/doc", "/usr/lib/python3", "/usr/share", "/usr/include"]
    places += [str(p) for p in Path(sys.executable).parent.parent.glob("lib/python*/site-packages")]
    seen: set[bytes] = set()
    for place in places:
        for folder, names, files in os.walk(place):
            names.sort()
            for name in sorted(files):
                path = Path(folder, name)
                if path.suffix not in KINDS or path.is_symlink() or path.stat().st_size > MAX_TEXT:
                    continue
                try:
                    text = path.read_text("utf-8")
                except (UnicodeDecodeError, OSError):
                    continue
                raw = text.encode()
                digest = hashlib.blake2b(raw, digest_size=16).digest()
                if digest in seen or not text.strip() or len(raw) > limit:
                    continue
                seen.add(digest)
                limit -= len(raw)
                yield text


def write_corpus(path: Path, size: int, source: Path | None = None) -> None:
    """JSON lines with about `size` bytes of text; with `source` its texts again and again, each time cut elsewhere."""

    def varied() -> Iterator[str]:
        left, turn = size, 0
        while source and left > 0:
            turn += 1
            with source.open(encoding="utf-8") as lines:
                for line in lines:
                    text = json.loads(line)["text"]
                    cut = len(text) * turn % 997 * len(text) // 997 if turn > 1 else 0
                    left -= len(text.encode())
                    yield text[cut:] + f"\n# {turn}\n" + text[:cut]
                    if left <= 0:
                        return

    if path.exists():
        return
    with path.with_suffix(".tmp").open("w", encoding="utf-8") as file:
        for text in varied() if source else texts(size):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    path.with_suffix(".tmp").replace(path)


def make_tokenizers(folder: Path, corpus: Path) -> dict[str, str]:
    """Train both tokenizers if they are not there: name -> file."""
    model, bpe = folder / "sentencepiece.model", folder / "byte-level.json"
    if not model.exists():
        command = [sys.executable, "tools/train_tokenizer.py", str(corpus), "--output", str(model), "--sample-mb", "20"]
        command += ["--vocab-size", str(VOCABULARY), "--quiet"]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    if not bpe.exists():
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
            show_progress=False,
        )
        with corpus.open(encoding="utf-8") as lines:
            tokenizer.train_from_iterator((json.loads(x)["text"] for i, x in enumerate(lines) if i % 5 == 0), trainer)
        tokenizer.save(str(bpe))
    return {"SentencePiece": str(model), "byte-level BPE": str(bpe)}


def systems(files: dict[str, str], args: argparse.Namespace) -> list[System]:
    """What is measured."""
    python, workers = sys.executable, str(args.workers)
    found = []
    for name, path in files.items():
        ours = (python, "tools/preprocess_data.py", "{input}", "--output", "{output}", "--tokenizer", path)
        ours += ("--workers", workers, "--quiet")
        raw = {"SentencePiece": ["sentencepiece", "sentencepiece-numpy"], "byte-level BPE": ["gigatoken"]}[name]
        for kind in raw:
            threads = "1" if kind == "gigatoken" else workers
            command = (python, str(DRIVERS / "encode.py"), kind, path, "{input}", threads)
            name_of = f"bare {kind} ({threads} {'thread' if threads == '1' else 'threads'})"
            found.append(System(name_of, name, command, bare=True))
        if name == "SentencePiece" or args.slow:
            found.append(System("ours (reference encoder)", name, (*ours, "--reference-encoder")))
        found.append(System("ours", name, ours, large=True))
        if args.peers_python:
            theirs = (args.peers_python, str(DRIVERS / "run_megatron_preprocess.py"), "--input", "{input}")
            theirs += ("--output", "{output}", "--tokenizer", path, "--workers", workers)
            theirs += ("--megatron", str(args.megatron.absolute())) if args.megatron else ()
            found.append(System("Megatron", name, theirs))
    return found


def peak_of_tree(process: subprocess.Popen[bytes], watch: bool) -> int:
    """Wait for a process; the largest sum of PSS over it and its descendants [bytes], or 0."""
    if not watch:
        process.wait()
        return 0
    peak, root = 0, psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            for one in (root, *root.children(recursive=True)):
                try:
                    total += one.memory_full_info().pss
                except psutil.Error:  # it ended meanwhile
                    pass
        except psutil.Error:
            pass
        peak = max(peak, total)
        time.sleep(0.05)
    return peak


def measure(system: System, corpus: Path, size: int, watch: bool, args: argparse.Namespace) -> Measured:
    """One run, with a look at its memory or without. Raises: BenchmarkError."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        command = [part.format(input=corpus, output=f"{folder}/out") for part in system.command]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        printed, complaints = Path(folder, "said"), Path(folder, "complaints")
        before = psutil.Process().cpu_times()
        start, busy = time.perf_counter(), busy_seconds()
        with printed.open("wb") as out, complaints.open("wb") as err:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err)
            peak = peak_of_tree(process, watch)
        wall, busy = time.perf_counter() - start, busy_seconds() - busy
        after = psutil.Process().cpu_times()
        if process.returncode:
            raise BenchmarkError(f"{' '.join(command)}\nfailed:\n{complaints.read_text()[-2000:]}")
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        watching = after.user + after.system - before.user - before.system
        note, seconds = printed.read_text().strip().splitlines()[-1], wall
        if system.bare:
            seconds = json.loads(note)["seconds"]
            note = f"{json.loads(note)['tokens']} tokens"
        elif system.name == "Megatron":
            note = json.loads(note)["how"]
        else:
            note = note.partition("encoder: ")[2]
        digest = hashlib.sha256()
        for path in sorted(Path(folder).glob("out*.bin")) + sorted(Path(folder).glob("out*.idx")):
            digest.update(path.read_bytes())
        found = digest.hexdigest() if any(Path(folder).glob("out*.idx")) else ""
    return Measured(system.name, system.tokenizer, round(size / 1e6), size / 1e6 / seconds, wall, cpu,
                    round(peak / 1e6), round(max(0.0, busy - cpu - watching) / wall, 2), found, note)  # fmt: skip


def lines_of(runs: list[Measured]) -> list[dict[str, str]]:
    """The table: medians over rounds, and ratios to the bare encoder and to Megatron."""
    groups: dict[tuple[str, int, str], list[Measured]] = {}
    for run in runs:
        groups.setdefault((run.tokenizer, run.text_mb, run.system), []).append(run)
    timed = {key: [run for run in of if not run.peak_mb] or of for key, of in groups.items()}
    speed = {key: median([run.mb_per_second for run in of]) for key, of in timed.items()}
    smallest = min(size for _, size, _ in groups)
    lines = []
    for (tokenizer, size, system), of in timed.items():
        bare = [v for (t, _, s), v in speed.items() if t == tokenizer and s.startswith("bare")][:1]
        theirs = speed.get((tokenizer, size, "Megatron"))
        local, own = speed[tokenizer, size, system], of[0].digest
        same = [s for (t, n, s), others in groups.items()
                if own and (t, n) == (tokenizer, size) and s != system and others[0].digest == own]  # fmt: skip
        lines.append({
            "tokenizer": tokenizer,
            "text MB": str(size),
            "system": system,
            "MB/s": f"{local:.1f}",
            "rounds": " ".join(f"{run.mb_per_second:.1f}" for run in of),
            "of the bare encoder": f"{100 * local / bare[0]:.0f} %" if bare and size == smallest else "-",
            "times Megatron": f"{local / theirs:.1f}" if theirs else "-",
            "CPU s": f"{median([run.cpu_seconds for run in of]):.1f}",
            "peak MB": str(max(run.peak_mb for run in groups[tokenizer, size, system])),
            "same files as": ", ".join(same) or "-",
            "others' load": f"{max(run.other_load for run in of):.2f}",
            "note": of[0].note,
        })  # fmt: skip
    return lines


def main() -> None:
    """Measure everything in turn, round by round, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "data-benchmark", help="for text and tokenizers")
    parser.add_argument("--mb", type=int, default=100, help="text [MB]")
    parser.add_argument("--large-mb", type=int, default=1000, help="text of the memory rows [MB]; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--slow", action="store_true", help="also byte-level BPE by its reference encoder")
    parser.add_argument("--peers-python", help="the interpreter of the peers' environment")
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM; default: a loop of its tool's design")
    parser.add_argument("--calm", type=float, default=0, help="wait at most this long for an idle machine [s]")
    parser.add_argument("--name", default="data", help="of the result files")
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    args.folder.mkdir(parents=True, exist_ok=True)
    corpus, large = (args.folder / f"text-{size}.jsonl" for size in (args.mb, args.large_mb))
    write_corpus(corpus, args.mb * 1_000_000)
    files = make_tokenizers(args.folder, corpus)
    every = systems(files, args)
    work = [(system, corpus, turn == args.rounds) for turn in range(args.rounds + 1) for system in every]
    if args.large_mb:
        write_corpus(large, args.large_mb * 1_000_000, corpus)
        work += [(system, large, True) for system in every if system.large]
    sizes = {}
    for path in {path for _, path, _ in work}:
        with path.open(encoding="utf-8") as file:
            sizes[path] = sum(len(json.loads(line)["text"].encode()) for line in file)
    runs: list[Measured] = []
    failed: set[str] = set()
    for system, path, watch in work:
        if system.name in failed:
            continue
        wait_for_calm(args.calm)
        try:
            runs.append(measure(system, path, sizes[path], watch, args))
        except BenchmarkError as error:
            if system.name == "ours":
                raise
            failed.add(system.name)
            print(f"{system.name} is left out: {error}", file=sys.stderr)
            continue
        last = runs[-1]
        print(f"{last.tokenizer:15} {last.text_mb:5} MB  {last.system:32} {last.mb_per_second:7.1f} MB/s "
              f"{last.peak_mb:5} MB  others {last.other_load}", flush=True)  # fmt: skip
    text = header("Text to tokens", args) + table(lines_of(runs))
    text += (
        "\nMB/s: bytes of text per second of wall time, of the whole command; for the bare encoders of encoding "
        "alone. Of the bare encoder: of the first one of the same tokenizer. Peak: of all processes together.\n"
        "Others' load: cores that other processes kept busy meanwhile; above 0.15 a figure is too low.\n"
    )
    save(args.name, runs, text)


if __name__ == "__main__":
    main()
