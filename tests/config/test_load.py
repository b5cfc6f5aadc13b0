"""Reading: order of precedence, shorthands, messages, round trips."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megallama.config.describe import Setting
from megallama.config.describe import settings as schema_settings
from megallama.config.errors import ConfigError, MegallamaError
from megallama.config.load import is_setting, load, resolve, to_toml
from megallama.config.presets import PRESETS
from megallama.config.schema import Config, SourceConfig
from megallama.plan.plan import make_plan

ROOT = Path(__file__).parents[2]
SCHEDULES = '"gpipe", "1f1b", "zb-h1", "zb-h2", "zb-v", "v-half", "dualpipe-v", "csv"'


def problems(overrides: list[str], text: str = "", tmp_path: Path | None = None) -> list[str]:
    """The messages of a configuration with errors, one by one."""
    file = None
    if tmp_path is not None:
        file = tmp_path / "run.toml"
        file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file, overrides, need_data=False)
    lines = str(caught.value).split("\n")
    return [line.removeprefix("  - ") for line in lines[1:]] if "problems in the configuration" in lines[0] else lines


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[model]\npreset = "llama-7b"\nnum_layers = 3\nvocab_size = 100\n[batch]\nmicro_batch_size = 8\n')
    config = load(file, ["--model.vocab-size=77", "data.train=a", "data.train=b"])
    assert (config.model.hidden_size, config.model.num_layers, config.model.vocab_size) == (4096, 3, 77)
    assert (config.batch.micro_batch_size, config.batch.seq_length) == (8, 2048)
    assert config.data.train == (SourceConfig(path="b"),)


def test_preset_on_the_command_line_lies_under_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[model]\nnum_layers = 3\n[batch]\nseq_length = 128\n")
    config = load(file, ["model.preset=llama3.1-8b", "data.synthetic=true"])
    assert (config.model.num_layers, config.model.ffn_hidden_size, config.batch.seq_length) == (3, 14336, 128)


def test_derived_values() -> None:
    config = load(None, ["data.synthetic=true", "run.folder=/r", "train.steps=5000", "model.hidden_size=512"])
    assert (config.model.num_kv_heads, config.model.head_dim) == (4, 128)
    schedule = config.lr_schedule
    assert (schedule.warmup_steps, schedule.decay_steps, schedule.wsd_decay_steps) == (500, 5000, 500)
    assert config.checkpoint.folder == "/r/checkpoints"
    assert config.batch.ramp_start is None
    assert config.train.seed == 1234  # another default would be another run
    long = load(None, ["data.synthetic=true", "train.steps=500000", "lr_schedule.decay_steps=400000"]).lr_schedule
    assert (long.warmup_steps, long.decay_steps, long.wsd_decay_steps) == (2000, 400000, 40000)
    assert load(None, ["data.synthetic=true", "lr_schedule.warmup_steps=50"]).lr_schedule.warmup_steps == 50
    assert load(None, ["data.synthetic=true", "train.steps=1"]).lr_schedule.wsd_decay_steps == 1


@pytest.mark.parametrize(
    "text,want",
    [
        ("data.train=/a/b", (("/a/b", 1.0),)),
        ("data.train=007", (("007", 1.0),)),
        ('data.train="with space"', (("with space", 1.0),)),
        ("data.train=['a', 'b']", (("a", 1.0), ("b", 1.0))),
        ("data.train=['a', {path='b', weight=0.25}]", (("a", 1.0), ("b", 0.25))),
        ("data.train={path='b', weight=3}", (("b", 3.0),)),
    ],
)
def test_source_shorthands(text: str, want: tuple[tuple[str, float], ...]) -> None:
    assert tuple((s.path, s.weight) for s in load(None, [text]).data.train) == want


def test_sources_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[data]\nvalid = "v"\n[[data.train]]\npath = "a"\nweight = 0.5\n[[data.train]]\npath = "b"\n')
    data = load(file, []).data
    assert [(s.path, s.weight) for s in data.train] == [("a", 0.5), ("b", 1.0)]
    assert [s.path for s in data.valid] == ["v"]


def test_mixtures_of_the_command_line(tmp_path: Path) -> None:
    config = load(None, [
        'data.train=[{path = "x/c4.bin", weight = 0.5, documents = [0, 0.9], max_epochs = 2}, "w.en"]',
        'data.mixture_schedule=[{step = 100, weights = {c4 = 1, "w.en" = 0.5}}]', "data.test=held/out/",
    ])  # fmt: skip
    first, second = config.data.train
    assert (first.label, first.documents, first.max_epochs, second.label) == ("c4", (0.0, 0.9), 2.0, "w.en")
    assert [(c.step, c.weights) for c in config.data.mixture_schedule] == [(100, {"c4": 1.0, "w.en": 0.5})]
    assert [s.label for s in config.data.test] == ["out"]
    one = load(None, ["data.train=a", "data.mixture_schedule={step = 2, weights = {a = 3}}"])
    assert one.data.mixture_schedule[0].step == 2
    file = tmp_path / "out.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert 'mixture_schedule = [{step = 100, weights = {c4 = 1.0, "w.en" = 0.5}}]' in file.read_text()
    assert load(file, []) == config


def test_words_of_the_command_line() -> None:
    config = load(
        None,
        ["data.synthetic=True", "run.folder=007", "optimizer.lr=1", "data.tokenizer=none",
         "train.stop-after-steps=none", "parallel.stage_layers=[2, 2]", "parallel.pp=2", "log.wandb_project=a=b"],
    )  # fmt: skip
    assert (config.run.folder, config.optimizer.lr, config.data.tokenizer) == ("007", 1.0, None)
    assert (config.parallel.stage_layers, config.log.wandb_project) == ((2, 2), "a=b")
    named = load(None, ["data.train=2024", "run.folder=7", "log.wandb_project=true"])  # a number, but a name's
    assert (named.data.train[0].path, named.run.folder, named.log.wandb_project) == ("2024", "7", "true")


def test_nested_table(tmp_path: Path) -> None:
    scaled = load(None, ["model.rope-scaling.factor=16", "data.synthetic=true"]).model.rope_scaling
    assert scaled is not None and (scaled.factor, scaled.original_max_position) == (16.0, 8192)
    preset = ["model.preset=llama3.2-1b", "data.synthetic=true"]
    assert load(None, [*preset, "model.rope_scaling=none"]).model.rope_scaling is None
    again = load(None, [*preset, "model.rope_scaling=none", "model.rope_scaling.factor=4"]).model.rope_scaling
    assert again is not None and again.factor == 4.0
    fields = ["model.rope_scaling.high_freq_factor=8", "model.rope_scaling=none", "model.rope_scaling.factor=4"]
    anew = load(None, [*preset, *fields]).model.rope_scaling
    assert anew is not None and (anew.factor, anew.high_freq_factor) == (4.0, 4.0)  # none forgets what came before it
    part = load(None, [*preset, "model.rope_scaling.factor=4"]).model.rope_scaling
    assert part is not None and (part.factor, part.high_freq_factor) == (4.0, 4.0)
    file = tmp_path / "run.toml"
    file.write_text("[model.rope_scaling]\n[data]\nsynthetic = true\n")
    empty = load(file, []).model.rope_scaling
    assert empty is not None and empty.factor == 8.0


A_SOURCE = "a source is a path or a table with path, weight, name, documents, max_epochs, num_tokens"
A_CHANGE = "a change is a table with step, weights"
SINGLE: list[tuple[str, str]] = [
    ("parallel.tp=two", 'parallel.tp="two" must be a whole number above 0; for example parallel.tp=1'),
    ("parallel.tp=0", "parallel.tp=0 must be a whole number above 0; for example parallel.tp=1"),
    ("parallel.tp=1.5", "parallel.tp=1.5 must be a whole number above 0; for example parallel.tp=1"),
    ("parallel.tp=true", "parallel.tp=true must be a whole number above 0; for example parallel.tp=1"),
    ("train.deterministic=1", "train.deterministic=1 must be true or false; for example train.deterministic=false"),
    ("optimizer.beta1=1.5",
     "optimizer.beta1=1.5 must be a number of at least 0 below 1; for example optimizer.beta1=0.9"),
    ("optimizer.lr=inf", "optimizer.lr=inf must be finite, a number above 0; for example optimizer.lr=0.0003"),
    ("optimizer.clip_grad=none", 'optimizer.clip_grad="none" must be a number of at least 0; '
                                 "for example optimizer.clip_grad=1.0"),
    ("train.stop_after_steps=0", "train.stop_after_steps=0 must be a whole number above 0 or none"),
    ("parallel.schedule=zb", f'parallel.schedule="zb" must be one of {SCHEDULES}; did you mean "zb-v"?'),
    ("parallel.schedule=x", f'parallel.schedule="x" must be one of {SCHEDULES}'),
    ("parallel.stage_layers=4", "parallel.stage_layers=4 must be a list of whole numbers of at least 0 or none"),
    ("parallel.stage_layers=[1,-1,'a']",
     'parallel.stage_layers=[1, -1, "a"] must be a list of whole numbers of at least 0 or none'),
    ("model.rope_scaling=3", "model.rope_scaling=3 must be a table with kind, factor, low_freq_factor, "
                             "high_freq_factor, original_max_position, beta_fast, beta_slow, attention_factor or none"),
    ("model.rope_scaling.factor=-1",
     "model.rope_scaling.factor=-1 must be a number above 0; for example model.rope_scaling.factor=8.0"),
    ("data.train=[{weight=1}]", f"data.train[0] has no path; {A_SOURCE}"),
    ("data.train=['a',{path='b',wieght=1}]",
     f"data.train[1].wieght=1 is not known; {A_SOURCE}"),
    ("data.train={path='b',weight=-1}",
     f"data.train[0].weight=-1 must be a number of at least 0; {A_SOURCE}"),
    ("data.train=[{path='a',documents=0.9}]",
     f"data.train[0].documents=0.9 must be a list of 2 numbers; {A_SOURCE}"),
    ("data.train=[{path='a',documents=[0,'x']}]",
     f'data.train[0].documents[1]="x" is wrong: documents must be a list of 2 numbers; {A_SOURCE}'),
    ("data.train=[{path='a',max_epochs=0}]", f"data.train[0].max_epochs=0 must be a number above 0; {A_SOURCE}"),
    ("data.valid=[3]", f"data.valid[0]=3 is not known; {A_SOURCE}"),
    ("data.test=[{path=3}]", f"data.test[0].path=3 must be text; {A_SOURCE}"),
    ("data.mixture_schedule=[{step=7}]", f"data.mixture_schedule[0] has no weights; {A_CHANGE}"),
    ("data.mixture_schedule=[5]", f"data.mixture_schedule[0]=5 is not known; {A_CHANGE}"),
    ("data.mixture_schedule=soon", f'data.mixture_schedule[0]="soon" is not known; {A_CHANGE}'),
    ("data.mixture_schedule=[{step=0,weights={}}]",
     f"data.mixture_schedule[0].step=0 must be a whole number above 0; {A_CHANGE}"),
    ("data.mixture_schedule={step=7,weights={a=-1}}",
     "data.mixture_schedule[0].weights.a=-1 is wrong: weights must be a table with "
     f"numbers of at least 0 under each name; {A_CHANGE}"),
    ("data.on_exhausted=halt", 'data.on_exhausted="halt" must be one of "error", "stop"'),
    ("run.device=gpu", 'run.device="gpu" must be one of "auto", "cpu", "cuda"; did you mean "cuda"?'),
    ("precision.dtype=float16",
     'precision.dtype="float16" must be one of "bf16", "fp16", "fp32", "fp64", "auto"; did you mean "fp16"?'),
    ("model.lr=1", "unknown setting 'model.lr'; did you mean optimizer.lr?"),
    ("lr=1", "unknown setting 'lr'; did you mean optimizer.lr?"),
    ("log.steps=1", "unknown setting 'log.steps'; did you mean train.steps?"),
    ("parallel.shedule=1", "unknown setting 'parallel.shedule'; did you mean parallel.schedule?"),
    ("modle.x=3", "unknown setting 'modle.x'; did you mean [model]?"),
    ("interval=3", "unknown setting 'interval'; did you mean eval.interval or checkpoint.interval or log.interval?"),
    ("--tensor-model-parallel-size=2", "unknown setting 'tensor_model_parallel_size'; did you mean parallel.tp?"),
    ("num_key_value_heads=2", "unknown setting 'num_key_value_heads'; did you mean model.num_kv_heads?"),
    ("num_hidden_layers=2", "unknown setting 'num_hidden_layers'; did you mean model.num_layers?"),
    ("rms_norm_eps=1e-5", "unknown setting 'rms_norm_eps'; did you mean model.norm_eps?"),
    ("tie_word_embeddings=true", "unknown setting 'tie_word_embeddings'; did you mean model.tie_embeddings?"),
    ("tokenizer_model=x", "unknown setting 'tokenizer_model'; did you mean data.tokenizer?"),
    ("lr_warmup_iters=2", "unknown setting 'lr_warmup_iters'; did you mean lr_schedule.warmup_steps?"),
    ("memory.bogusbogus=1", "unknown setting 'memory.bogusbogus'; [memory] has recompute, cp_keep_kv, "
                            "loss_chunk_tokens, loss_chunk_mb"),
    ("xyzzy=1", "unknown setting 'xyzzy'; the sections are model, parallel, batch, precision, memory, overlap, "
                "optimizer, lr_schedule, data, train, eval, checkpoint, log, run"),
    ("parallel.tp", "'parallel.tp' has no value; write section.key=value, e.g. parallel.tp=2"),
    ("model=3", "model is a section; write [model] and its settings below it"),
    ("model.preset=lama-7b",
     'model.preset="lama-7b" is unknown; did you mean "llama-7b"? presets: ' + ", ".join(PRESETS)),
    ("model.preset=zzz", 'model.preset="zzz" is unknown; presets: ' + ", ".join(PRESETS)),
]  # fmt: skip


@pytest.mark.parametrize("override,message", SINGLE, ids=[s[0] for s in SINGLE])
def test_message(override: str, message: str) -> None:
    assert problems([override]) == [f"command line: {message}"]


GONE = {
    "run.cuda_graphs=true": "run.cuda_graphs=true is no setting any more: micro-batches are no longer recorded as CUDA "
    "graphs; leave it out",
    "precision.min_loss_scale=0.25": "precision.min_loss_scale=0.25 is no setting any more: the loss scale of fp16 "
    "never falls below 1; leave it out",
}


@pytest.mark.parametrize("override", GONE)
def test_settings_that_are_gone_are_refused_unless_they_have_their_default(override: str) -> None:
    assert problems([override]) == [f"command line: {GONE[override]}"]
    plain = load(None, ["data.synthetic=true"])
    assert load(None, ["data.synthetic=true", "run.cuda_graphs=false", "precision.min_loss_scale=1"]) == plain


def test_checkpoints_of_earlier_versions_remember_settings_that_are_gone() -> None:
    plain = load(None, ["data.synthetic=true"])
    tree = plain.model_dump(mode="json")
    tree["run"]["cuda_graphs"], tree["precision"]["min_loss_scale"] = True, 0.25
    assert Config.model_validate(tree) == plain
    with pytest.raises(ValidationError, match=r"run\n"):
        Config.model_validate({"run": 3})
    tree["run"]["cuda_graph"] = True
    with pytest.raises(ValidationError, match="cuda_graph"):
        Config.model_validate(tree)


def notes(file: Path | None, overrides: Sequence[str]) -> tuple[list[str], Config]:
    lines: list[str] = []
    return lines, load(file, overrides, need_data=False, note=lines.append)


def test_settings_with_a_new_name_are_read_under_the_old_one_with_a_line(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    source = 'train = [{path = "a", max_epochs = 2.0}]\n'
    file.write_text(f'[data]\n{source}at_max_epochs = "stop"\nchanges = [{{step = 5, weights = {{a = 2.0}}}}]\n')
    lines, config = notes(file, ["data.at_max_epochs=error", "--data.at-max-epochs=stop"])
    assert lines == [
        f"{file}: data.at_max_epochs is now called data.on_exhausted; it was read as that",
        f"{file}: data.changes is now called data.mixture_schedule; it was read as that",
        "command line: data.at_max_epochs is now called data.on_exhausted; it was read as that",
    ]
    new = ["data.on_exhausted=stop", "data.mixture_schedule=[{step=5, weights={a=2.0}}]"]
    assert notes(None, [f"data.{source.strip().replace('train = ', 'train=')}", *new]) == ([], config)
    lines, config = notes(None, ["data.valid=a", "train.eval_interval=5", "train.eval_batches=2"])
    names = {"train.eval_interval": "eval.interval", "train.eval_batches": "eval.batches"}
    assert lines == [f"command line: {a} is now called {b}; it was read as that" for a, b in names.items()]
    assert notes(None, ["data.valid=a", "eval.interval=5", "eval.batches=2"]) == ([], config)
    assert problems(["data.at_max_epochs=halt"])[0].startswith('command line: data.on_exhausted="halt" must be one of')


def test_the_old_and_the_new_name_together_are_an_error(tmp_path: Path) -> None:
    old, new = "data.at_max_epochs=error", "data.on_exhausted=error"
    both = "are the old and the new name of one setting; write data.on_exhausted alone"
    line = "command line"
    assert problems([old, new]) == [f"data.at_max_epochs ({line}) and data.on_exhausted ({line}) {both}"]
    assert problems([new], '[data]\nat_max_epochs = "error"\n', tmp_path) == [
        f"data.at_max_epochs ({tmp_path / 'run.toml'}) and data.on_exhausted ({line}) {both}"
    ]


def test_a_line_is_said_once_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    load(None, ["data.at_max_epochs=error", "data.at_max_epochs=error"], need_data=False)
    output = "command line: data.at_max_epochs is now called data.on_exhausted; it was read as that"
    assert capsys.readouterr() == ("", f"note: {output}\n")


def test_linear_is_wsd_without_a_stable_part(tmp_path: Path) -> None:
    words = ["lr_schedule.warmup_steps=3", "train.steps=40"]
    lines, config = notes(None, ["lr_schedule.kind=linear", "lr_schedule.wsd_decay_steps=7", *words])
    assert lines == [
        'command line: lr_schedule.kind="linear" is now lr_schedule.kind="wsd" and lr_schedule.wsd_decay_steps=0, '
        "the same curve"
    ]
    assert notes(None, ["lr_schedule.kind=wsd", "lr_schedule.wsd_decay_steps=0", *words]) == ([], config)
    assert notes(None, ["lr_schedule.kind=linear", "lr_schedule.kind=cosine"])[0] == []
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert notes(tmp_path / "c.toml", []) == ([], config)


def test_checkpoints_are_read_under_both_names() -> None:
    source = {"path": "a", "max_epochs": 2.0}
    config = resolve(Config.model_validate({"data": {"train": [source], "on_exhausted": "stop"},
                                            "lr_schedule": {"kind": "wsd", "wsd_decay_steps": 0}}))  # fmt: skip
    tree = config.model_dump(mode="json")
    assert Config.model_validate(tree) == config
    data = tree["data"]
    data["at_max_epochs"], data["changes"] = data.pop("on_exhausted"), data.pop("mixture_schedule")
    tree["lr_schedule"] |= {"kind": "linear", "wsd_decay_steps": 10}
    assert Config.model_validate(tree) == config
    del tree["eval"]
    tree["train"] |= {"eval_interval": 5, "eval_batches": 2}
    assert Config.model_validate(tree) == config.changed(eval={"interval": 5, "batches": 2})


def test_a_checkpoint_with_both_names_is_no_checkpoint_of_any_version() -> None:
    with pytest.raises(ValidationError, match="at_max_epochs"):
        Config.model_validate({"data": {"at_max_epochs": "stop", "on_exhausted": "error"}})
    with pytest.raises(ValidationError, match="eval_interval"):
        Config.model_validate({"train": {"eval_interval": 5}, "eval": {"interval": 6}})


def test_all_problems_at_once_with_their_places(tmp_path: Path) -> None:
    text = 'tp = 3\n[parallel]\nshedule = "1f1b"\npp = "2"\n[model]\npreset = "llama3-8b"\n[optimizer]\nlr = -1\n'
    file = tmp_path / "run.toml"
    assert problems(["parallel.tp=3", "batch.micro_batch_size=3", "oops"], text, tmp_path) == [
        f"{file}: unknown setting 'tp'; did you mean parallel.tp?",
        f"{file}: unknown setting 'parallel.shedule'; did you mean parallel.schedule?",
        "command line: 'oops' has no value; write section.key=value, e.g. parallel.tp=2",
        f'{file}: parallel.pp="2" must be a whole number above 0; for example parallel.pp=1',
        f"{file}: optimizer.lr=-1 must be a number above 0; for example optimizer.lr=0.0003",
        # what hangs on parallel.tp is left out: the file may have meant another one
        "command line: batch.global_batch_size=32 is not a multiple of batch.micro_batch_size=3; use 30 or 33",
    ]


def test_values_from_several_places(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    found = problems(["parallel.tp=64"], '[model]\npreset = "llama3-8b"\nffn_hidden_size = 14400\n', tmp_path)
    assert found == [
        "parallel.tp=64 does not divide model.num_heads=32; use 1, 2, 4, 8, 16 or 32 "
        "(parallel.tp: command line, model.num_heads: preset llama3-8b)"
    ]
    found = problems(["parallel.tp=32"], '[model]\npreset = "llama3-8b"\nffn_hidden_size = 14416\n', tmp_path)
    assert found == [
        "parallel.tp=32 does not divide model.ffn_hidden_size=14416; use 1, 2, 4, 8 or 16 "
        f"(parallel.tp: command line, model.ffn_hidden_size: {file})"
    ]


def test_unreadable_files(tmp_path: Path) -> None:
    absent = tmp_path / "absent.toml"
    with pytest.raises(ConfigError) as caught:
        load(absent, [])
    assert str(caught.value) == (
        f"cannot read the configuration {absent}: No such file or directory; give the path of a TOML file"
    )
    broken = tmp_path / "a.toml"
    broken.write_text("[parallel]\ntp 2\n")
    with pytest.raises(ConfigError, match=r"is not valid TOML: .*line 2.*; write lines like tp = 2 under \[parallel\]"):
        load(broken, [])
    for text, line in (
        ("[parallel]\ntp 2\n", "line 2: tp 2"),
        ("[parallel]\ntp = 1\n\n  tp = 2  # again\n", "line 4: tp = 2  # again"),
        ('[data]\ntrain = ["a",\n', 'line 2: train = ["a",'),
        ("[run]\nfolder = " + "x" * 300, "line 2: folder = " + "x" * 91 + "..."),
        (b'[run]\nfolder = "\xff"\n', 'line 2: folder = "\ufffd"'),
    ):
        broken.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError) as caught:
            load(broken, [])
        assert str(caught.value).split("\n")[1:] == [f"  {line}"]
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load(binary, [])


def test_one_problem_stands_alone() -> None:
    with pytest.raises(MegallamaError) as caught:
        load(None, ["data.synthetic=true", "parallel.tp=0"])
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_of_presets(name: str, tmp_path: Path) -> None:
    file = tmp_path / "out.toml"
    for more in ([], ["model.rope_scaling=none", "model.num_kv_heads=1", 'run.folder=a "b"\\c\x7f\n']):
        config = load(None, [f"model.preset={name}", "data.train=['x', {path='y', weight=0.1}]", *more])
        file.write_text(to_toml(config), encoding="utf-8")
        assert load(file, []) == config
        assert to_toml(load(file, [])) == to_toml(config)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\n\r\0"), min_size=1).filter(str.strip)
values: dict[str, Any] = {
    "optimizer.lr": st.floats(1e-300, 1e300),
    "run.folder": TEXT,
    "train.seed": st.integers(0, 2**63 - 1),
    "data.train": st.lists(st.tuples(TEXT, st.floats(0.01, 9)), min_size=1),
    "train.stop_after_minutes": st.none() | st.floats(0.1, 10),
    "model.rope_theta": st.floats(1, 1e9),
}


@given(st.fixed_dictionaries(values))
@settings(max_examples=25, deadline=None)
def test_round_trip_of_values(tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, Any]) -> None:
    sources = [{"path": p, "weight": w, "name": f"{p} {i}"} for i, (p, w) in enumerate(chosen["data.train"])]
    config = resolve(
        Config.model_validate(
            {
                "optimizer": {"lr": chosen["optimizer.lr"]},
                "run": {"folder": chosen["run.folder"]},
                "train": {"seed": chosen["train.seed"], "stop_after_minutes": chosen["train.stop_after_minutes"]},
                "data": {"train": sources},
                "model": {"rope_theta": chosen["model.rope_theta"]},
            }
        )
    )
    file = tmp_path_factory.mktemp("toml") / "c.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load(file, []) == config


@given(st.lists(st.text(max_size=20).map(lambda s: f"parallel.{s}") | st.text(max_size=20), max_size=3))
@settings(max_examples=150, deadline=None)
def test_nonsense_is_refused_politely(overrides: list[str]) -> None:
    try:
        load(None, overrides, need_data=False)
    except ConfigError as error:
        assert str(error)


TEXTS = [s for s in schema_settings() if str in s.kinds]
SOURCES = ("data.train", "data.valid", "data.test")
UNUSABLE = {  # a value of any text setting, and what is said about it
    "": " is empty (an unset variable of the shell?)",
    "  ": " is empty (an unset variable of the shell?)",
    "a\\nseed = 3": '="a\\nseed = 3" has a line break or NUL in it',
    "a\\r": '="a\\r" has a line break or NUL in it',
    "a\\u0000b": '="a\\u0000b" has a line break or NUL in it',
}


@pytest.mark.parametrize("key", [s.key for s in TEXTS] + [*SOURCES])
def test_a_text_that_no_setting_can_hold(key: str, tmp_path: Path) -> None:
    """From the command line, bare and quoted, and from a file; what is said ends with what to write."""
    optional = any(s.optional for s in TEXTS if s.key == key)
    then = '; write "none" or a value, or leave the setting out'.replace('"none" or ', '"none" or ' * optional)
    section, _, name = key.partition(".")
    for value, message in UNUSABLE.items():
        bare = value.replace("\\n", "\n").replace("\\r", "\r\n.").replace("\\u0000", "\0")
        if value != "a\\r":
            assert problems([f"{key}={bare}"]) == [f"command line: {key}{message}{then}"]
        assert problems([f'{key}="{value}"']) == [f"command line: {key}{message}{then}"]
        file = tmp_path / "run.toml"
        assert problems([], f'[{section}]\n{name} = "{value}"\n', tmp_path) == [f"{file}: {key}{message}{then}"]
    surrogate = problems([f"{key}=x\udcff"])  # what Python makes of an argument that is not UTF-8
    assert surrogate == [f"command line: {key}='x\\udcff' is not valid UTF-8{then}"] and surrogate[0].isascii()


@pytest.mark.parametrize("key", SOURCES)
def test_an_empty_text_inside_a_list_or_table(key: str) -> None:
    for text, where in (("['a', '']", "[1]"), ("[{path=''}]", "[0].path"), ("{path='a', name=' '}", ".name")):
        (message,) = problems([f"{key}={text}"])
        assert message.startswith(f"command line: {key}{where} is empty (an unset variable of the shell?); write")
    (message,) = problems(['run.without_kernels=["apex", ""]'])
    assert message.startswith("command line: run.without_kernels[1] is empty")


@pytest.mark.parametrize("override, message", [
    ("data.train=[a,b]", "data.train=[a,b] is not a TOML value (Invalid value"),
    ("data.train=[{path=a,weight=0.5}]", "data.train=[{path=a,weight=0.5}] is not a TOML value (Invalid value"),
    ("data.valid=['a'", "data.valid=['a' is not a TOML value (Unclosed array"),
    ("data.test=[x]/tokens", "data.test=[x]/tokens is not a TOML value (Invalid value"),
    ("data.train=['a'] 'b'", "data.train=['a'] 'b' is not a TOML value (Expected newline"),
    ("data.train=['a'] # b", "data.train=['a'] # b is not a TOML value (Unclosed array"),
    ("data.train='a'\n'b'", "data.train='a'\\n'b' is not a TOML value (Expected '=' after a key"),
    ("data.train='a'\ntrain.steps=3", "data.train='a'\\ntrain.steps=3 is not a TOML value (Unclosed array"),
    ("data.mixture_schedule=[{step=2,weights={a=x}}]",
     "data.mixture_schedule=[{step=2,weights={a=x}}] is not a TOML value (Invalid"),
    ("run.without_kernels=[apex]", "run.without_kernels=[apex] is not a TOML value (Invalid value"),
    ("run.folder='a'b", "run.folder='a'b is not a TOML value (Expected newline"),
    ('data.tokenizer="a', 'data.tokenizer="a is not a TOML value (Unterminated string'),
])  # fmt: skip
def test_what_only_begins_like_toml(override: str, message: str) -> None:
    text = "\n".join(problems([override]))
    assert text.startswith(f"command line: {message}"), text
    quoted = override.partition("=")[2][0] in "\"'"
    hint = "close the quotes" if quoted else f"""all of it: '{override.partition("=")[0]}=["a", "b"]'"""
    assert hint in text


@pytest.mark.parametrize("value, message", [
    ("5\nseed=3", 'train.steps="5\\nseed=3" has a line break'), ("5\n[x]\ny=1", "has a line break"),
    ("5 # five", 'train.steps="5 # five" must be a whole number'), ("5, 6", "must be a whole number"),
    ("1" + "0" * 30, f"train.steps=1{'0' * 30} is beyond 2**63 - 1"), ("-9223372036854775808", "beyond 2**63 - 1"),
    ("1" + "0" * 5000, f'train.steps="1{"0" * 98}... (5003 characters) must be a whole number'),
])  # fmt: skip
def test_numbers_are_taken_whole_or_refused(value: str, message: str, tmp_path: Path) -> None:
    (found,) = problems([f"train.steps={value}"])
    assert message in found and len(found) < 300
    if value.isdigit():
        (found,) = problems([], f"[train]\nsteps = {value}\n", tmp_path)
        assert "beyond 2**63 - 1" in found or "not valid TOML: Exceeds the limit (4300 digits)" in found


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    for depth in (50, 300, 5000):
        deep = "[" * depth + "]" * depth
        (found,) = problems([f"data.train={deep}"])
        assert len(found) < 1000
        (found,) = problems([], f"[data]\ntrain = {deep}\n", tmp_path)
    assert "not valid TOML: maximum recursion depth exceeded" in found


@pytest.mark.parametrize("key", ["model.hidden_size", "model.num_heads", "parallel.tp"])
def test_a_huge_number_is_answered_at_once(key: str) -> None:
    began = time.monotonic()
    problems([f"{key}=1000000000000000003"])
    assert time.monotonic() - began < 10


def test_a_byte_order_mark_is_no_setting(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf[train]\nsteps = 3\n")
    assert load(tmp_path / "a.toml", [], need_data=False).train.steps == 3


@pytest.mark.parametrize("setting", [s for s in schema_settings() if int in s.kinds], ids=lambda s: s.key)
def test_a_number_that_is_far_too_large_is_refused_or_planned_at_once(setting: Setting) -> None:
    """Sizes that would fill the memory with the plan itself are errors of the configuration."""
    start = time.monotonic()
    try:
        made = make_plan(load(None, ["data.synthetic=true", f"{setting.key}=1000000000000"], ranks=1), 1)
    except ConfigError as error:
        assert setting.key in str(error)
    else:
        assert str(made)
    assert time.monotonic() - start < 20


def test_config_is_frozen_and_hashable() -> None:
    config = load(None, ["data.train=a"])
    assert len({config, load(None, ["data.train=a"]), load(None, ["data.train=b"])}) == 2
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


def test_needs_no_torch() -> None:
    code = (
        "import sys; from megallama.config.load import load; from megallama.plan.plan import make_plan; "
        "str(make_plan(load(None, [], need_data=False), 4)); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_a_path_may_have_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=3e-4").write_text("[train]\nsteps = 7\n", encoding="utf-8")
    files = ("lr=3e-4", "runs/lr=3e-4.toml", "a.b=c.toml", str(tmp_path / "x=y" / "my.toml"), "my.toml")
    assert [is_setting(word) for word in files] == [False] * len(files)
    words = ("train.steps=7", "--train.steps=7", "--lr-schedule.kind=linear", "lr=1", "a.b=3", "run.folder=a/b=c")
    assert [is_setting(word) for word in words] == [True] * len(words)
    assert load(Path("lr=3e-4"), need_data=False).train.steps == 7


def test_a_length_in_tokens() -> None:
    base = ["batch.seq_length=100", "batch.global_batch_size=8", "batch.micro_batch_size=2"]
    for tokens, steps in ((1, 1), (800, 1), (801, 2), (80_000, 100), (80_001, 101)):
        config = load(None, [*base, f"train.tokens={tokens}"], need_data=False)
        assert (config.train.steps, config.lr_schedule.decay_steps) == (steps, steps)
        assert config.lr_schedule.warmup_steps == steps // 10
    ramp = ["batch.ramp_start=2", "batch.ramp_increment=2", "batch.ramp_samples=30"]
    config = load(None, [*base, *ramp, "train.tokens=4000"], need_data=False)
    assert config.train.steps == config.batch.steps_until(40) == 11
    further = load(None, [*base, *ramp, "train.tokens=4000"], need_data=False, begun=lambda c: (50, 20, 1600))
    assert further.train.steps == further.batch.steps_until(20 + 24, 50, 20) == 54
    over = load(None, [*base, "train.tokens=4000"], need_data=False, begun=lambda c: (50, 400, 40_000))
    assert over.train.steps == 50  # nothing is left to do
    preset = load(None, ["model.preset=llama3-8b", "train.tokens=15_000_000_000_000"], need_data=False)
    assert preset.train.steps == -(-15 * 10**12 // (32 * 8192))
    with pytest.raises(ConfigError) as error:
        load(None, [*base, "train.tokens=4000", "train.steps=7"], need_data=False)
    both = "train.steps=7 and train.tokens=4000 are two lengths of one run, the latter of 5 steps; leave one out"
    assert str(error.value) == f"command line: {both}"


def test_an_annealing_ends_with_the_run() -> None:
    words = ["train.steps=40", "lr_schedule.decay_from_step=30", "lr_schedule.min_ratio=0"]
    config = load(None, words, need_data=False)
    assert config.lr_schedule.decay_until_step == 40
    plain = load(None, ["train.steps=40"], need_data=False).lr_schedule
    assert (plain.decay_from_step, plain.decay_until_step) == (None, None)
