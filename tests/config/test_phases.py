"""train.phases: what is inherited, where steps end, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config.errors import ConfigError
from megallama.config.load import load, to_toml

BASE = """
[model]
rope_theta = 500.0
[data]
train = [{path = "a"}, {path = "b", weight = 0}]
"""
TWO = """
[[phases]]
until_tokens = 10_000
[[phases]]
until_tokens = 20_000
seq_length = 512
rope_theta = 1e5
rope_scaling = {kind = "linear", factor = 2.0}
weights = {b = 1}
"""


def test_a_phase_has_what_it_names_and_the_rest_of_the_sections(tmp_path: Path) -> None:
    """Steps of 8,192 and 16,384 tokens: the first phase ends inside its second step, the other with the third."""
    file = tmp_path / "run.toml"
    file.write_text(BASE + TWO)
    config = load(file, ["lr_schedule.kind=wsd"], ranks=1)
    assert (config.batch.seq_length, config.model.rope_theta, config.model.rope_scaling) == (256, 500.0, None)
    assert [s.weight for s in config.data.train] == [1.0, 0.0]
    assert (config.train.steps, config.lr_schedule.decay_steps) == (3, 3)
    assert (config.train.phase_ends(), config.train.phase_ends(1, 8192)) == ([2, 3], [2, 3])
    assert [config.train.phase_after(n) for n in (0, 9999, 10_000, 90_000)] == [0, 0, 1, 1]
    later = config.at(1)
    assert (later.batch.seq_length, later.batch.global_batch_size, later.model.rope_theta) == (512, 32, 1e5)
    assert later.model.rope_scaling is not None and later.model.rope_scaling.factor == 2.0
    assert [s.weight for s in later.data.train] == [1.0, 1.0] and later.at(0) == config
    file.write_text(to_toml(config))
    assert load(file, ranks=1) == config
    begun = load(file, ranks=1, begun=lambda config: (2, 64, 16_384))
    assert begun == later and begun.train.steps == 3


MISTAKES = {
    "not in order": (
        "train.phases=[{until_tokens=20000},{until_tokens=20000}]",
        "train.phases[1].until_tokens=20000 is not above 20000, where the phase before it ends",
    ),
    "no step left": (
        "train.phases=[{until_tokens=20000},{until_tokens=20001}]",
        "train.phases[1].until_tokens=20001 lies in the last step of the phase before it; use at least 28192",
    ),
    "no end": (
        "train.phases=[{until_tokens=20000},{seq_length=512}]",
        "train.phases[1] has no until_tokens; a phase is a table with until_tokens, seq_length, global_batch_size, "
        "micro_batch_size, rope_theta, rope_scaling, weights",
    ),
    "unknown key": ("train.phases=[{until_tokens=9,length=512}]", "train.phases[0].length=512 is not known"),
    "a wrong value": (
        "train.phases=[{until_tokens=9,seq_length=-1}]",
        "train.phases[0].seq_length=-1 must be a whole number above 0",
    ),
    "a wrong scaling": (
        "train.phases=[{until_tokens=9,rope_scaling={kind='alibi'}}]",
        "train.phases[0].rope_scaling.kind=",
    ),
    "an unknown source": (
        "train.phases=[{until_tokens=9,weights={c=1}}]",
        'train.phases[0].weights gives a weight to "c", which data.train does not have; its sources are "a" or "b"',
    ),
    "no source": ("train.phases=[{until_tokens=9,weights={a=0}}]", "data.train has only weights of 0"),
    "cp cannot cut it": (
        "train.phases=[{until_tokens=9},{until_tokens=90000,seq_length=511}] parallel.cp=2",
        "train.phases[1]: parallel.cp=2 cuts a sequence into 2 x 2 = 4 chunks, of which batch.seq_length=511",
    ),
    "ranks cannot share it": (
        "train.phases=[{until_tokens=9},{until_tokens=90000,global_batch_size=12}]",
        "train.phases[1]: batch.global_batch_size=12 is not a multiple of batch.micro_batch_size=4 x dp=2",
    ),
    "a ramp": (
        "train.phases=[{until_tokens=9}] batch.ramp_start=16 batch.ramp_increment=8 batch.ramp_samples=100",
        "batch.ramp_start=16 and train.phases exclude one another; leave it out, and write until_tokens, "
        "global_batch_size and weights in the phases",
    ),
    "a schedule of mixtures": (
        "train.phases=[{until_tokens=9}] data.mixture_schedule=[{step=2,weights={b=1}}]",
        "data.mixture_schedule=[{step = 2, weights = {b = 1.0}}] and train.phases exclude one another",
    ),
    "tokens": ("train.phases=[{until_tokens=9}] train.tokens=7", "train.tokens=7 and train.phases exclude one another"),
    "steps": (
        "train.phases=[{until_tokens=9}] train.steps=7",
        "train.steps=7 and train.phases are two lengths of one run, the latter of 1 step; leave one out",
    ),
    "rollback": (
        "train.phases=[{until_tokens=9}] train.on_spike=rollback",
        'train.on_spike="rollback" and train.phases exclude one another; use train.on_spike="skip"',
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_has_its_message(tmp_path: Path, name: str) -> None:
    words, message = MISTAKES[name]
    file = tmp_path / "run.toml"
    file.write_text(BASE.replace("weight = 0", "weight = 1" if name != "no source" else "weight = 0"))
    with pytest.raises(ConfigError) as error:
        load(file, words.split(" "), ranks=2)
    assert message in str(error.value)
