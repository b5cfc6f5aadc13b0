"""The table of processors: which entry fits, what is refused, what its candidates compute, what a resume keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megallama.checkpoint import manifest
from megallama.comm import rendezvous
from megallama.config.errors import ConfigError, MegallamaError
from megallama.config.load import load
from megallama.kernels import gemm, processors, select
from megallama.kernels.attention import ATTENTION, sdpa
from megallama.kernels.candidate import Target
from megallama.kernels.processors import Processor
from megallama.pretrain import main
from megallama.train import auto
from tests.comm.test_rendezvous import arrival
from tests.small import small_config

CPU, BF16 = torch.device("cpu"), torch.bfloat16
IN_FP32 = {
    "attention": "attention in fp32",
    "matrix product": "oneDNN in fp32",
    "weight gradient": "torch addmm in fp32",
}
ENTRY = f"kernels.bf16 = {{ {', '.join(f'{json.dumps(k)} = {json.dumps(v)}' for k, v in IN_FP32.items())} }}\n"
HERE = f'name = "here"\n{ENTRY}'
OLD = Processor("GenuineIntel", frozenset({"avx2", "avx512f"}))


def table(path: Path, *entries: str) -> str:
    path.write_text("".join(f"[[processor]]\n{entry}\n" for entry in entries))
    return str(path)


def test_the_first_entry_that_fits_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        'name = "amd"\nvendor = "AuthenticAMD"',
        'name = "bf16"\nhas = ["avx512f", "avx512_bf16"]',
        'name = "narrow"\nhas = ["avx512f"]\nwidths = [1, 512]',
        'name = "wide"\nhas = ["avx512f"]\nlacks = ["amx_bf16"]\nwidths = [513, 4096]',
    ]
    user = table(tmp_path / "user.toml", *entries)
    monkeypatch.setattr(processors, "SHIPPED", Path(table(tmp_path / "shipped.toml", 'name = "any"')))

    def found(vendor: str, *features: str, width: int = 768) -> str | None:
        entry = Processor(vendor, frozenset(features)).entry(width, user)
        return entry and entry.name

    assert found("AuthenticAMD") == "amd"
    assert found("GenuineIntel", "avx512f", "avx512_bf16") == "bf16"
    assert [found("GenuineIntel", "avx512f", width=w) for w in (512, 513)] == ["narrow", "wide"]
    assert found("GenuineIntel", "avx512f", "amx_bf16") == found("", "asimd") == "any"
    assert [found("GenuineIntel", "avx512f", width=w) for w in (4096, 4097)] == ["wide", "any"]
    silent = processors.entries(Path(user))[0]
    assert (silent.bf16, silent.compile, silent.kernels, silent.has, silent.lacks) == (True, False, {}, (), ())
    monkeypatch.setattr(processors, "SHIPPED", Path(table(tmp_path / "none.toml")))
    assert found("", "asimd") is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('name = "a"\nhas = ["avx9"]', "avx9 is not known; it holds [[processor]] with name, vendor, has, lacks"),
        ('vendor = "a"', "name: Field required"),
        ('name = "a"\nbf16 = 3', "bf16: Input should be a valid boolean"),
        ('name = "a"\nkernel = 3', "kernel: Extra inputs are not permitted"),
        ("name = ", "is not valid TOML"),
    ],
    ids=["feature", "no name", "kind", "key", "syntax"],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OLD.entry(64, table(tmp_path / "t.toml", entry))
    assert message in str(caught.value) and str(tmp_path / "t.toml") in str(caught.value)


def test_every_entry_of_the_package_can_be_taken() -> None:
    formats = {"bf16": BF16, "fp32": torch.float32}
    for entry in processors.entries(processors.SHIPPED):
        for dtype, named in entry.kernels.items():
            chosen = select.select_kernels(Target(CPU, formats[dtype]), named=named)
            assert {c.operation: c.selected for c in chosen.choices}.items() >= named.items(), entry.name
    assert OLD.entry(768) is not None and not OLD.has_bf16
    with_bf16 = Processor("AuthenticAMD", frozenset({"avx2", "avx512f", "avx512_bf16"}))
    assert with_bf16.has_bf16 and not ((entry := with_bf16.entry(768)) and entry.kernels.get("bf16"))


def test_what_is_named_comes_first_or_says_why_not() -> None:
    def chosen(dtype: torch.dtype, without: tuple[str, ...] = (), **named: str) -> dict[str, str]:
        pairs = {name.replace("_", " "): kind for name, kind in named.items()}
        found = select.select_kernels(Target(CPU, dtype), named=pairs, without=without)
        return {c.operation: str(c) for c in found.choices}

    assert chosen(BF16, attention="attention in fp32")["attention"] == "attention: attention in fp32"
    assert chosen(BF16, matrix_product="torch mm")["matrix product"] == "matrix product: torch mm"
    within = select.select_kernels(Target(CPU, BF16, documents=True), named={"attention": "attention in fp32"})
    assert within.choices[0].selected == "attention in fp32"  # which was compared within documents too
    refused = chosen(torch.float64, matrix_product="oneDNN in fp32")["matrix product"]
    assert refused == (
        "matrix product: torch mm (not oneDNN in fp32: bfloat16 and float16 on a CPU only; "
        "not oneDNN: fp32 on a CPU only)"
    )
    left_out = chosen(BF16, ("oneDNN in fp32",), matrix_product="oneDNN in fp32")["matrix product"]
    assert left_out.startswith("matrix product: torch mm (not oneDNN in fp32: left out by run.without_kernels;")
    with pytest.raises(MegallamaError, match="'MKL' is no implementation of 'matrix product'"):
        chosen(BF16, matrix_product="MKL")


def test_a_named_product_does_not_hang_on_the_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors.Processor, "here", lambda: processors.Processor("GenuineIntel", frozenset()))
    for named, taken in (({}, "torch mm"), ({"matrix product": "oneDNN"}, "oneDNN")):
        chosen = select.select_kernels(Target(CPU, torch.float32), named=named)
        assert chosen.choices[5].selected == taken


@pytest.mark.parametrize("most", [1 << 22, 100], ids=["whole", "in blocks"])
@pytest.mark.parametrize("name", ["oneDNN in fp32", "torch mm in fp32"])
def test_products_in_fp32_round_once(monkeypatch: pytest.MonkeyPatch, name: str, most: int) -> None:
    """Against float64: forward, input gradient of a transposed view, weight gradient written and added."""
    monkeypatch.setattr(gemm, "MAX_PRODUCT", most)
    target = Target(CPU, BF16)
    x, dy, weight = target.random(24, 48), target.random(24, 33, seed=1), target.random(33, 48, seed=2)
    product = dict(gemm.PRODUCT.named)[name](target)
    for a, b in ((x, weight), (dy, weight.t())):
        exact = a.double() @ b.double().t()
        assert torch.equal(product(a, b), product(a, b)) and product(a, b).dtype == BF16
        assert (product(a, b).double() - exact).abs().max() <= 2**-8 * exact.abs().max()
        assert ((product(a, b).double() - exact).norm() / exact.norm()) < 2**-9
    grad, exact = torch.full((33, 48), 7.0), dy.double().t() @ x.double()
    gemm.wgrad_in_fp32(grad, dy, x, True)
    assert (grad - exact).norm() < 1e-6 * exact.norm()
    gemm.wgrad_in_fp32(grad, dy, x, False)
    assert (grad - 2 * exact).norm() < 1e-6 * exact.norm()


def test_attention_in_fp32_is_as_exact_as_its_format() -> None:
    target = Target(CPU, BF16)
    q, k, v = (target.random(2, 40, heads, 16, seed=heads).requires_grad_() for heads in (4, 2, 2))
    dout = target.random(2, 40, 4, 16, seed=9)
    attend = dict(ATTENTION.named)["attention in fp32"](target)(4, 2, 16)
    own = [attend(q, k, v), *torch.autograd.grad(attend(q, k, v), (q, k, v), dout)]
    exact = [part.detach().double().requires_grad_() for part in (q, k, v)]
    wanted = [sdpa(*exact), *torch.autograd.grad(sdpa(*exact), exact, dout.double())]
    for a, b in zip(own, wanted, strict=True):
        assert a.dtype == BF16 and (a.double() - b).norm() / b.norm() < 2**-8


def run(folder: Path, *extra: str) -> list[float]:
    """A tiny run in this process; the losses of its steps."""
    sizes = ["hidden_size=32", "num_layers=2", "num_heads=2", "ffn_hidden_size=48", "vocab_size=61"]
    words = [*(f"model.{size}" for size in sizes), "batch.seq_length=16", "batch.micro_batch_size=2"]
    words += ["batch.global_batch_size=4", "data.synthetic=true", f"run.folder={folder}", "run.device=cpu"]
    words += ["run.threads=1", "train.steps=4", "log.tensorboard=false", "log.plot=false", *extra]
    assert main(words) in (0, 75)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    """Change what the newest checkpoint's manifest says."""
    (step,) = (folder / "checkpoints").glob("step-*")
    body = json.loads((step / "manifest.json").read_bytes())
    body.pop("digest")
    change(body)
    (step / "manifest.json").write_bytes(manifest.render(body))


def test_a_resume_keeps_what_the_run_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "SHIPPED", Path(table(tmp_path / "none.toml")))
    user = f"run.processor_table={table(tmp_path / 't.toml', HERE)}"
    half = "train.stop_after_steps=2"
    plain, named = run(tmp_path / "plain"), run(tmp_path / "named", user)
    assert plain != named and max(abs(a - b) for a, b in zip(plain, named, strict=True)) < 0.01
    run(tmp_path / "a", user, half)  # it goes on without the table
    assert run(tmp_path / "a") == named
    run(tmp_path / "b", half)  # and without what a table would have, if there is one later
    assert run(tmp_path / "b", user) == plain
    run(tmp_path / "c", half)  # nor does a checkpoint of before there were tables
    rewrite(tmp_path / "c", lambda body: body["counters"].pop("kernels"))
    assert run(tmp_path / "c", user) == plain
    log = (tmp_path / "c" / "logs" / "rank-0000.log").read_text()
    assert "bits will differ" not in log and "attention in fp32" not in log


def test_a_resume_that_cannot_keep_it_says_so(tmp_path: Path) -> None:
    user = f"run.processor_table={table(tmp_path / 't.toml', HERE)}"
    run(tmp_path / "a", user, "train.stop_after_steps=2")
    run(tmp_path / "a", 'run.without_kernels=["oneDNN in fp32"]')
    (line,) = [x for x in (tmp_path / "a/logs/rank-0000.log").read_text().splitlines() if "bits will differ" in x]
    assert line.endswith("run so far, which was made with matrix product: oneDNN in fp32, now torch mm")


def test_ranks_with_other_tables_are_told_apart(tmp_path: Path) -> None:
    paths = [table(tmp_path / name, f'name = "{name}"') for name in ("a.toml", "b.toml")]
    one, two = map(processors.digest, paths)
    assert processors.digest(None) == "" and one != two
    seen = rendezvous._compare({0: arrival(0, config="abc" + one)}, arrival(3, config="abc" + two))
    assert seen.startswith(f"rank 0 (host0) and rank 3 (host1) have different configurations (abc{one} and abc{two});")
    assert ", run.processor_table " in seen


def plant(monkeypatch: pytest.MonkeyPatch, processor: Processor, gpus: tuple[float, ...] = ()) -> None:
    monkeypatch.setattr(Processor, "here", classmethod(lambda cls: processor))
    monkeypatch.setattr(auto, "_capabilities", lambda: [*gpus])


NEW = Processor("GenuineIntel", frozenset({"avx2", "avx512f", "amx_bf16"}))
FORMATS = [  # processor, GPUs, entry of the table, what auto is
    (NEW, (), None, "bf16"),
    (OLD, (), None, "fp32"),
    (OLD, (), "bf16 = true", "bf16"),
    (NEW, (), "bf16 = false", "fp32"),
    (OLD, (9.0, 8.0), "bf16 = false", "bf16"),
    (NEW, (7.5, 9.0), None, "fp32"),
]


@pytest.mark.parametrize(("processor", "gpus", "entry", "dtype"), FORMATS, ids=[str(n) for n in range(len(FORMATS))])
def test_the_format_follows_from_the_device_and_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processor: Processor, gpus: tuple[float, ...], entry: str | None,
    dtype: str,
) -> None:  # fmt: skip
    plant(monkeypatch, processor, gpus)
    monkeypatch.setattr(
        processors, "SHIPPED", Path(table(tmp_path / "t.toml", *([f'name = "x"\n{entry}'] * bool(entry))))
    )
    said: list[str] = []
    config = small_config(precision={"dtype": "auto"}, run={"folder": str(tmp_path)})
    assert auto.decide(config, said.append).precision.dtype == dtype
    assert said[0].startswith(f'precision.dtype="auto" is {dtype}: ')
    on_cpu = small_config(precision={"dtype": "auto"}, run={"folder": str(tmp_path), "device": "cpu"})
    assert auto.decide(on_cpu, said.append).precision.dtype == (
        "fp32" if entry == "bf16 = false" else "bf16" if entry or processor is NEW else "fp32"
    )


def test_leaves_are_compiled_where_the_table_and_a_compiler_say_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant(monkeypatch, OLD)
    config, said = small_config(run={"compile": "auto", "folder": str(tmp_path)}), list[str]()
    for entry, compiler, on in (
        ("compile = true", "/bin/g++", True),
        ("compile = true", None, False),
        ("", "/bin/g++", False),
    ):
        monkeypatch.setattr(processors, "SHIPPED", Path(table(tmp_path / "t.toml", f'name = "x"\n{entry}')))
        monkeypatch.setattr(auto.shutil, "which", lambda name, found=compiler: found)
        assert auto.decide(config, said.append).run.compile is on
    assert said[0] == 'run.compile="auto" is true: so the table of processors has it (x)'


def test_auto_is_decided_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the first start took is in the checkpoint; another processor goes on with it. A plan takes the defaults."""
    words = ["precision.dtype=auto", "run.compile=auto"]
    planned = load(None, words, need_data=False)
    assert (planned.precision.dtype, planned.run.compile) == ("bf16", False)
    monkeypatch.setattr(processors, "SHIPPED", Path(table(tmp_path / "none.toml")))
    plant(monkeypatch, OLD)
    run(tmp_path / "a", *words, "train.stop_after_steps=2")
    plant(monkeypatch, NEW)
    assert run(tmp_path / "a", *words) == run(tmp_path / "b", "precision.dtype=fp32") != run(tmp_path / "c", *words)
    (step,) = (tmp_path / "a" / "checkpoints").glob("step-00000004")
    config = json.loads((step / "manifest.json").read_bytes())["config"]
    assert (config["precision"]["dtype"], config["run"]["compile"]) == ("fp32", False)
    (line,) = [
        x
        for x in (tmp_path / "a/logs/rank-0000.log").read_text().splitlines()
        if "checkpoint has it" in x and "dtype" in x
    ]
    assert line.endswith('precision.dtype="auto" is fp32: as the checkpoint has it')
