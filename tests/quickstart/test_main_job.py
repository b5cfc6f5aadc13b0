"""The main job for real, with few steps: corpus, tokenizer, tokens, 4 ranks, a signal, resume, evaluation, text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from megallama.data.indexed import IndexedDataset
from megallama.data.tokenizer import load_tokenizer
from tools.quickstart import ITEMS, PROMPT, ROOT


def stream(prefix: Path) -> list[int]:
    """All tokens of a corpus."""
    data = IndexedDataset(prefix)
    return [int(i) for i in data.read(0, data.num_tokens)]


def test_main_job(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "tools/quickstart.py", "--folder", str(folder), "--steps", "4", "--bytes", "400000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    text = done.stdout
    assert done.returncode == 0, text + done.stderr

    # the signal: all four ranks saved, and the second start went on from there
    signalled = re.search(r"step (\d+): SIGTERM to all 4 ranks", text)
    saved = re.search(r"all ranks saved .*/step-(\d+) and left with status 75", text)
    assert signalled and saved and 2 <= int(signalled[1]) <= int(saved[1]) < 4, text
    assert f"resumed after step {int(saved[1])}," in (folder / "logs" / "start-2-rank-0.log").read_text()

    # every step once, in order, and the loss falls
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [r for r in records if r["kind"] == "train"]
    valid = [r for r in records if r["kind"] == "valid"]
    assert [r["step"] for r in train] == [1, 2, 3, 4]
    assert [r["step"] for r in valid] == [1, 2, 3, 4]
    assert valid[-1]["loss"] < valid[0]["loss"] < train[0]["loss"]

    # the summary's numbers are the run's
    facts = json.loads((folder / "data" / "tokens_valid.json").read_text())
    bits = valid[-1]["loss"] * facts["tokens"] / facts["bytes"] / 0.6931471805599453
    assert f"validation loss   {valid[-1]['loss']:.3f} nats/token = {bits:.3f} bits/byte" in text
    assert re.search(r"unigram baseline  \d\.\d{3} nats/token = \d\.\d{3} bits/byte", text)
    assert abs(bits - valid[-1]["bits_per_byte"]) < 1e-9 * bits

    # the items are the held-out text's, and the table is that of the results
    items = [json.loads(line) for line in (folder / "data" / "continuations.jsonl").read_text().splitlines()]
    assert 4 < len(items) <= ITEMS and {len({*item["choices"]}) for item in items} == {4}
    held = load_tokenizer(folder / "data" / "tokenizer.model").decode(stream(folder / "data" / "tokens_valid"))
    assert all(item["context"] + item["choices"][item["gold"]] in held for item in items)
    wrong = [item["context"] + item["choices"][item["gold"] - 1] for item in items]
    assert sum(text in held for text in wrong) < len(items) / 10
    found = json.loads((folder / "evaluation.json").read_text())["results"]["continuations"]
    row = rf"continuations +0 +acc +{found['acc,none']:.4f} ± {found['acc_stderr,none']:.4f}"
    assert re.search(row, text) and 0 < found["bits_per_byte,none"] < 8

    # what it points to is there
    tokenizer = load_tokenizer(folder / "data" / "tokenizer.model")
    size = tokenizer.vocab_size
    assert f"A tokenizer of {size} pieces" in text and f"│ {PROMPT}" in text
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any((folder / "tensorboard").iterdir())
    config = json.loads((folder / "checkpoints" / "step-00000004" / "model" / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("llama", size)
