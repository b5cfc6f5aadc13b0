"""How the files below `tests/frozen/v1` were written, by the program as it was at commit 8d06fa2:

    git checkout 8d06fa2 && python -m tests.frozen.make

They are what users have on disk, so they are never written again: a later program reads them or is wrong.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "tests" / "frozen" / "v1"
WORDS = "the quick brown fox jumps over a lazy dog while 12 birds sing def return self import 3.14 naïve 東京".split()
RUN = """# Written for the tests of what is on disk: a model of 11,000 weights, {dtype}.
[model]
hidden_size = 16
num_layers = 2
num_heads = 4
num_kv_heads = 2
ffn_hidden_size = 24
vocab_size = 300

[parallel]
tp = 2
pp = 2

[batch]
seq_length = 16
micro_batch_size = 1
global_batch_size = 4

[precision]
dtype = "{dtype}"

[optimizer]
lr = 1e-2

[lr_schedule]
kind = "{kind}"
warmup_steps = 2

[data]
train = "data/text_train"
valid = "data/text_valid"
tokenizer = "data/tokenizer.json"

[train]
steps = 6
eval_interval = 2
eval_batches = 2

[checkpoint]
interval = 1
keep_last = 20

[run]
folder = "{dtype}"
device = "cpu"
"""
DIE = """
import os, signal, sys
sys.path.insert(0, {root!r})
from megallama.text import shards
from megallama.text import preprocess
from megallama.cli import command
preprocess.TASK_BYTES = {job}
end, calls = shards.ShardWriter.end, []
def fatal(self):
    calls.append(1)
    if len(calls) > 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return end(self)
shards.ShardWriter.end = fatal
command("prepare")()
"""


def text_of(number: int) -> str:
    """A document as a function of its number."""
    draw = random.Random(number)
    return "".join(draw.choice(WORDS) + draw.choice([" ", " ", "\n"]) for _ in range(draw.randint(5, 40)))


def tool(*arguments: str, ranks: int = 1, expect: int = 0) -> None:
    """Run a command in the folder of the frozen files."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = ["torchrun", "--nproc-per-node", str(ranks)] if ranks > 1 else [sys.executable]
    done = subprocess.run([*before, *arguments], cwd=OUT, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (expect == 0), (arguments, done.returncode, done.stdout, done.stderr)


def corpus() -> None:
    """Text, tokenizer, a corpus with its PREFIX.json, and a preprocessing killed after three of its jobs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    data = OUT / "data"
    data.mkdir(parents=True)
    documents = [text_of(i) for i in range(120)]
    (data / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|begin_of_text|>", "<|end_of_text|>"]
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(data / "tokenizer.json"), pretty=False)
    preprocess = [str(ROOT / "tools" / "preprocess_data.py"), "data/text.jsonl", "--tokenizer", "data/tokenizer.json"]
    tool(*preprocess, "--output", "data/text", "--split-valid", "0.2", "--workers", "1", "--quiet")
    half = OUT / "half"
    half.mkdir()
    killed = ["data/text.jsonl", "--tokenizer", "data/tokenizer.json", "--output", "half/text", "--workers", "1"]
    code = DIE.format(root=str(ROOT), job=2000)
    died = subprocess.run([sys.executable, "-c", code, *killed, "--quiet"], cwd=OUT, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()


def run(dtype: str, kind: str) -> None:
    """Six steps in one go are the reference; the folder that is kept stops after the third."""
    (OUT / f"{dtype}.toml").write_text(RUN.format(dtype=dtype, kind=kind))
    arguments = ("-m", "megallama.pretrain", f"{dtype}.toml", "log.tensorboard=false", "log.plot=false")
    tool(*arguments, ranks=4)
    whole = OUT / dtype
    expected = OUT / f"{dtype}.expected"
    expected.mkdir()
    shutil.copy(whole / "metrics.jsonl", expected / "metrics.jsonl")
    for step in (4, 6):
        shutil.copy(whole / "checkpoints" / f"step-{step:08d}" / "manifest.json", expected / f"manifest-{step}.json")
    shutil.rmtree(whole)
    tool(*arguments, "train.stop_after_steps=3", ranks=4, expect=75)
    for name in ("run.log", "trace"):
        (whole / name).unlink(missing_ok=True)
    for log in whole.glob("logs/*"):
        log.unlink()
    for step in (1, 2) if dtype == "bf16" else (1,):
        shutil.rmtree(whole / "checkpoints" / f"step-{step:08d}")


def beside() -> None:
    """Beside the fp32 checkpoints: what damage, a crash in a replacement and a crash in a save leave."""
    folder = OUT / "fp32" / "checkpoints"
    three, two = folder / "step-00000003", folder / "step-00000002"
    damaged = folder / "step-00000004.damaged"  # quarantined by an earlier start
    shutil.copytree(three, damaged)
    raw = bytearray((damaged / "manifest.json").read_bytes())
    raw[200] ^= 1
    (damaged / "manifest.json").write_bytes(raw)
    two.rename(folder / "step-00000002.old")  # a replacement of step 2 died between its two renames
    shutil.copytree(three, folder / "step-00000005.tmp")  # a save died before its commit
    (folder / "step-00000005.tmp" / "manifest.json").unlink()


def main() -> None:
    """Write everything anew."""
    import torch

    shutil.rmtree(OUT, ignore_errors=True)
    corpus()
    run("bf16", "cosine")
    run("fp32", "linear")
    beside()
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    processor = [model.split(":")[1].strip(), torch.backends.cpu.get_cpu_capability(), torch.__version__]
    (OUT / "made_on.json").write_text(json.dumps({"commit": "8d06fa2", "processor": processor}) + "\n")
    print(f"{OUT}: {sum(p.stat().st_size for p in OUT.rglob('*') if p.is_file()):,} bytes", tempfile.gettempdir())


if __name__ == "__main__":
    main()
