"""explain_step and plan_data: the documents a step is made of, against the files and texts themselves; the mixture."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megallama.cli import command
from megallama.commands.explain import imbalance, numbers_of
from megallama.config.errors import ConfigError
from megallama.config.load import load, to_toml
from megallama.data.loader import Loader
from megallama.data.sources import TrainDataset, open_sources
from megallama.data.tokenizer import Tokenizer, load_tokenizer
from megallama.data.writer import IndexedWriter
from tests.small import small_config
from tests.words import text_of

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = {  # Touvron et al. 2023, table 1
    "commoncrawl": "1.10", "c4": "1.06", "github": "0.64", "wikipedia": "2.45", "books": "2.23", "arxiv": "1.06",
    "stackexchange": "1.03",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of two corpora of texts 0..99 and 100..179, some empty, with a change at step 4."""
    folder, tokenizer = tmp_path_factory.mktemp("explain"), load_tokenizer(tokenizer_path)
    for name, numbers in (("a", range(100)), ("b", range(100, 180))):
        with IndexedWriter(folder / name, np.dtype("<u2")) as writer:
            for number in numbers:
                writer.add(np.array(encoded(tokenizer, number), np.int64))
    config = load(None, [
        f"data.train=[{{path='{folder}/a', weight=0.6}}, {{path='{folder}/b', weight=0.4, documents=[0.25, 1]}}]",
        "data.mixture_schedule=[{step=4, weights={a=0.1}}]", f"data.tokenizer={tokenizer_path}", "model.vocab_size=330",
        "batch.seq_length=64", "batch.global_batch_size=8", "batch.micro_batch_size=2", "train.steps=100",
        "batch.ramp_start=4", "batch.ramp_increment=4", "batch.ramp_samples=10",
    ])  # fmt: skip
    (folder / "config.toml").write_text(to_toml(config))
    return folder / "config.toml"


def encoded(tokenizer: Tokenizer, number: int) -> list[int]:
    """What is in the files of text `number`; every seventh document is empty."""
    assert tokenizer.eos_id is not None
    return [] if number % 7 == 3 else [*tokenizer.encode(text_of(number)), tokenizer.eos_id]


def explained(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert command("explain")([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


@pytest.mark.parametrize("step", [1, 3, 4, 5, 60])
def test_the_documents_of_a_step_are_its_tokens(run: Path, step: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Three ways: what the loader delivers, the bytes of .bin by .idx, and the original texts encoded again."""
    config = load(run)
    train, tokenizer = open_sources(config).train, load_tokenizer(str(config.data.tokenizer))
    batch = config.batch
    first, size = batch.samples_after(step - 1), batch.samples_after(step) - batch.samples_after(step - 1)

    def ids(step: int) -> list[range]:
        return batch.sample_ids(first, size, 1, 0)

    with Loader(train.read, ids, stop_step=1, prefetch=0) as loader:
        delivered = next(loader)
    rows = torch.cat([torch.cat([b.tokens, b.labels[:, -1:]], dim=1) for b in delivered]).tolist()
    told = explained([str(run), str(step)], capsys)
    assert (told["step"], [s["sample"] for s in told["samples"]]) == (step, list(range(first, first + size)))
    for sample, row in zip(told["samples"], rows, strict=True):
        parts = [(p["document"], p["offset"], p["length"]) for p in sample["pieces"]]
        assert [t for p in sample["pieces"] for t in p["tokens"]] == row
        assert [t for part in parts for t in from_files(sample["path"], *part)] == row
        begin = {"a": 0, "b": 100}[sample["source"]]
        again = [encoded(tokenizer, begin + document)[at : at + n] for document, at, n in parts]
        assert [t for part in again for t in part] == row
        for piece, part in zip(sample["pieces"], again, strict=True):
            assert piece["text"] == tokenizer.decode(part)
            assert sample["source"] == "a" or piece["document"] >= 20  # the documents range


def from_files(prefix: str, document: int, offset: int, length: int) -> list[int]:
    """Tokens of a document, from the bytes of the two files as their format is described."""
    index = Path(prefix + ".idx").read_bytes()
    count = struct.unpack_from("<Q", index, 18)[0]
    begin = struct.unpack_from("<Q", index, 34 + 4 * count + 8 * document)[0]
    assert offset + length <= struct.unpack_from("<I", index, 34 + 4 * document)[0]
    return np.fromfile(prefix + ".bin", "<u2", length, offset=begin + 2 * offset).tolist()  # type: ignore[no-any-return]


def test_sources_indices_and_epochs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = open_sources(load(run)).train
    assert isinstance(train, TrainDataset)
    seen: dict[str, list[int]] = {"a": [], "b": []}
    for step in range(1, 31):
        for sample in explained([str(run), str(step)], capsys)["samples"]:
            seen[sample["source"]].append(sample["index"])
            source = train.sources["ab".index(sample["source"])]
            assert sample["epoch"] == sample["index"] // source.num_sequences
    total = load(run).batch.samples_after(30)
    assert {name: len(numbers) for name, numbers in seen.items()} == {
        name: used["samples"] for name, used in train.consumption(total).items()
    }
    assert all(numbers == list(range(len(numbers))) for numbers in seen.values())


def test_what_one_rank_reads(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two replicas of two ranks each: micro-batches of two samples in turn."""
    base = [str(run), "9", "parallel.tp=2", "ranks=4"]
    whole = [s["sample"] for s in explained([str(run), "9"], capsys)["samples"]]
    for rank in range(4):
        mine = [s["sample"] for s in explained([*base, "--rank", str(rank)], capsys)["samples"]]
        replica = rank // 2
        assert mine == [whole[i] for m in (0, 1) for i in (4 * m + 2 * replica, 4 * m + 2 * replica + 1)]
        one = explained([*base, "--rank", str(rank), "--micro-batch", "1"], capsys)["samples"]
        assert [s["sample"] for s in one] == mine[2:]
    (single,) = explained([str(run), "9", "--sample", str(whole[3])], capsys)["samples"]
    assert single["sample"] == whole[3]


def test_how_evenly_documents_load_the_ranks_of_a_sequence() -> None:
    """8 tokens over two ranks, in chunks of two: rank 0 has the first and the last, rank 1 those between.

    Of one document the queries see 1, 2, .. 8 keys: 3 + 15 and 7 + 11. Where one begins at token 4, 1, 2, 3, 4 twice:
    3 + 7 each. Where tokens 2 to 5 are documents of their own: 1, 2, 1, 1, 1, 1, 1, 2, so 6 and 4.
    """
    whole, halves, short = [0] * 8, [0, 0, 0, 0, 4, 4, 4, 4], [0, 0, 2, 3, 4, 5, 6, 6]
    for starts, ratio in ((whole, 1), (halves, 1), (short, 1.2)):
        found = imbalance(np.array([starts]), 2, 1)
        assert found == pytest.approx({"cp_imbalance": ratio, "cp_imbalance_worst": ratio})
    both = imbalance(np.array([whole, short]), 2, 1)
    assert both == pytest.approx({"cp_imbalance": (18 + 6) / (18 + 5), "cp_imbalance_worst": 1.2})
    together = imbalance(np.array([whole, short]), 2, 2)  # one micro-batch of two samples
    assert together == pytest.approx(dict.fromkeys(("cp_imbalance", "cp_imbalance_worst"), 24 / 23))


def test_the_imbalance_of_a_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load(run)
    words = ["parallel.cp=2", "data.document_mask=true", "parallel.cp_exchange=gather"]
    told = explained([str(run), "3", *words], capsys)
    samples = open_sources(load(run, words)).train.read([s["sample"] for s in told["samples"]])
    assert samples.starts is not None
    want = imbalance(samples.starts[:, :-1], 2, config.batch.micro_batch_size)
    assert want["cp_imbalance_worst"] > want["cp_imbalance"] > 1
    assert {key: told[key] for key in want} == pytest.approx(want)
    assert command("explain")([str(run), "3", *words]) == 0
    said = "attention of the busiest cp rank over their mean: {:.2f}, in the worst micro-batch {:.2f}"
    assert said.format(*want.values()) in capsys.readouterr().out
    for others in ([], words[:2] + ["parallel.cp_exchange=heads"], words[1:]):
        assert "cp_imbalance" not in explained([str(run), "3", *others], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0"], "step 0 does not exist; steps count from 1"),
        (["9", "ranks=x"], "ranks=x is no number of ranks; write for example ranks=8"),
        (["9", "ranks=2"], "--micro-batch and ranks= need --rank; write for example --rank 0 ranks=8"),
        (["9", "--rank", "2"], "--rank 2 needs the number of ranks, above it; write for example ranks=3"),
        (["9", "--rank", "1", "ranks=2", "--micro-batch", "2"], "--micro-batch 2 does not exist; step 9 has micro-ba"),
        (["1", "--sample", "4"], "--sample 4 is not in step 1: 0 to 3"),
        (
            ["1", "data.synthetic=true", "data.train=[]", "data.mixture_schedule=[]"],
            "data.synthetic=true makes samples of",
        ),
        (["1", "data.trian=x"], "unknown setting 'data.trian'; did you mean data.train?"),
    ],
)
def test_what_cannot_be_explained(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("explain")([str(run), *arguments]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and message in text


def test_the_text_of_a_step_as_a_program_without_torch(run: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = ['x', *sys.argv[1:]]\n"
        "try: runpy.run_path('tools/explain_step.py', run_name='__main__')\n"
        "except SystemExit as left: print(left.code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(run), "2", "--chars", "30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "step 2: 4 samples of 64 tokens" and lines[-1] == "0 False", done.stderr
    assert lines[1].startswith("sample 4: ") and ", epoch 0" in lines[1]
    assert any(line.startswith("  document ") and line.endswith("...") for line in lines)
    ids = subprocess.run([sys.executable, "tools/explain_step.py", str(run), "2", "--tokens", "--chars", "0"],
                         cwd=ROOT, capture_output=True, text=True, check=True).stdout  # fmt: skip
    counts = [len(line.split(": ")[1].split()) for line in ids.splitlines() if line.startswith("  document")]
    assert sum(counts) == 4 * 65


# ---- plan_data ----


def plan(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert command("plan")(["--data", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_the_mixture_of_the_paper_gives_its_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    example = str(ROOT / "examples" / "llama_mixture.toml")
    told = plan([example], capsys)
    assert {s["source"]: f"{s['epochs']:.2f}" for s in told["sources"]} == EPOCHS
    assert sum(s["used_tokens"] for s in told["sources"]) == 333_787 * 2048 * 2048
    assert [s["shares"] for s in told["sources"]] == [[x] for x in (0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02)]
    assert command("plan")(["--data", example]) == 0
    text = capsys.readouterr().out
    assert text.startswith("333,787 steps, 683,595,776 samples of 2048 = 1,400,004,149,248 tokens\n")
    assert [line.split()[-1] for line in text.splitlines()[3:10]] == list(EPOCHS.values())
    assert "* num_tokens of the configuration; the files are not here" in text


def test_sizes_come_from_files_where_they_are(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = open_sources(load(run)).train
    assert isinstance(train, TrainDataset)
    told = plan([str(run)], capsys)
    assert told["phases"] == [1, 4]
    steps = load(run).batch.samples_after(100)
    account = train.consumption(steps)
    for row, source in zip(told["sources"], train.sources, strict=True):
        assert (row["tokens"], row["measured"]) == (source.num_tokens, True)
        assert row["used_tokens"] == account[row["source"]]["tokens"]
        assert row["epochs"] == account[row["source"]]["epochs"]
    assert told["sources"][0]["shares"] == [0.6, pytest.approx(0.2)]


def test_caps_and_the_step_they_are_reached(capsys: pytest.CaptureFixture[str]) -> None:
    """a: 2 of 4 samples of 10 tokens a step; 100 sequences and 1.5 epochs last 75 steps."""
    arguments = ["data.train=[{path='/n/a', num_tokens=1001, max_epochs=1.5}, {path='/n/b', num_tokens=9001}]",
                 "batch.seq_length=10", "batch.global_batch_size=4", "train.steps=200"]  # fmt: skip
    rows = plan(arguments, capsys)["sources"]
    assert [(r["last_step"], r["epochs"], r["measured"]) for r in rows] == [(75, 4.0, False), (None, 400 / 900, False)]
    assert command("plan")(["--data", *arguments]) == 0
    assert 'with data.on_exhausted="error" this run is refused' in capsys.readouterr().out
    assert command("plan")(["--data", *arguments, "data.on_exhausted=stop"]) == 0
    assert 'with data.on_exhausted="stop" this run is over after step 75' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.train=/n/a"], "there are no files /n/a.bin and .idx to take the size of source 'a' from; write"),
        (["data.train={path='/n/a', num_tokens=9}"], "source 'a' has 9 tokens, less than one sample of 257"),
        (["data.synthetic=true"], "data.synthetic=true takes nothing from any source; write data.train"),
        (["data.train={path='a', num_tokens=0}"], "data.train[0].num_tokens=0 must be a whole number above 0"),
        (["gone.toml"], "cannot read the configuration gone.toml"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan")(["--data", *arguments]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and message in text


def test_ranks_that_share_sequences_read_the_same_samples() -> None:
    config = small_config(parallel={"cp": 2})
    read = [numbers_of(config, 1, 4, rank, None) for rank in range(4)]
    assert read[0] == read[1] == [0, 2, 4, 6] and read[2] == read[3] == [1, 3, 5, 7]


def test_a_step_that_no_run_reaches() -> None:
    with pytest.raises(ConfigError, match=f"step {10**20} does not exist; steps count from 1"):
        numbers_of(small_config(), 10**20, None, None, None)
