"""Reading a configuration: defaults, the preset, the TOML file, ``section.key=value``."""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megallama.config import rules
from megallama.config.describe import Setting, literal, settings
from megallama.config.errors import ConfigError, counted, say
from megallama.config.presets import PRESETS, preset_seq_length
from megallama.config.schema import LINEAR, REMOVED, RENAMED, Config, MixtureChange, PhaseConfig, SourceConfig

COMMAND_LINE = "command line"
SECTIONS = tuple(Config.model_fields)
TABLES: dict[str, type[BaseModel]] = {  # settings that are lists of tables
    **dict.fromkeys(("data.train", "data.valid", "data.test"), SourceConfig),
    "data.mixture_schedule": MixtureChange,
    "train.phases": PhaseConfig,
}

# other programs' names of our settings, where not alike: for suggestions
_ELSEWHERE = """
    tensor_model_parallel_size=parallel.tp tp_size=parallel.tp
    pipeline_model_parallel_size=parallel.pp pp_size=parallel.pp
    context_parallel_size=parallel.cp cp_size=parallel.cp
    virtual_pipeline_model_parallel_size=parallel.chunks num_attention_heads=model.num_heads
    num_query_groups=model.num_kv_heads intermediate_size=model.ffn_hidden_size
    rotary_base=model.rope_theta max_position_embeddings=batch.seq_length
    learning_rate=optimizer.lr train_iters=train.steps max_steps=train.steps
    adam_beta1=optimizer.beta1 adam_beta2=optimizer.beta2 rampup_batch_size=batch.ramp_start
    save=checkpoint.folder save_interval=checkpoint.interval data_path=data.train
    recompute_granularity=memory.recompute bf16=precision.dtype fp16=precision.dtype
"""
_WORDS = "gpu=cuda nvidia=cuda half=fp16 float=fp32 single=fp32 double=fp64"  # the same for values
ELSEWHERE, OTHER_WORDS = (dict(pair.split("=") for pair in text.split()) for text in (_ELSEWHERE, _WORDS))
ELSEWHERE["dp"] = "parallel.tp and parallel.pp"


Begun = tuple[int, int, int]  # steps, samples, tokens read
NOTHING = (0, 0, 0)


def is_setting(word: str) -> bool:
    """Whether a word is section.key=value, not a file's path, which may have a "="."""
    key, equals, _ = word.removeprefix("--").partition("=")
    known = any(key.replace("-", "_") == setting.key for setting in settings())
    return bool(equals) and (known or not (os.path.exists(word) or "/" in key or word.endswith(".toml")))


def load(
    file: Path | None,
    overrides: Sequence[str] = (),
    *,
    ranks: int | None = None,
    need_data: bool = True,
    begun: Callable[[Config], Begun] = lambda config: NOTHING,
    note: Callable[[str], None] = say,
    decide: Callable[[Config], Config] | None = None,
) -> Config:
    """The configuration that the file and the overrides describe, with every derived value filled in.

    `ranks` adds the rules that need the number of ranks; `need_data=False` leaves out those about data.
    begun: what lies behind such a run, whose batch sizes need not fit; of phases the one at hand counts (`Config.at`).
    decide: what "auto" is on this machine; default: precision.dtype="bf16", run.compile=false.
    note: told, for each setting under a name of earlier versions, what it is called now.
    Raises: ConfigError listing every problem at once, each with where it comes from.
    """
    reader = _Reader()
    if file is not None:
        reader.take_tree(read_toml(file, "the configuration"), "", str(file))
    for text in overrides:
        reader.read_override(text)
    reader.apply_preset()
    reader.apply_linear()
    for line in reader.notes:
        note(line)
    config = (decide or planned)(resolve(reader.validate(), begun))
    preset = (key.split(".")[1] for key, source in reader.sources.items() if source.startswith("preset "))
    config.model.model_fields_set.difference_update(preset)  # "set" is what the user wrote
    behind = begun(config) if config.batch.ramp_start or config.train.phases else NOTHING
    ahead = config.model_copy(update={"batch": config.batch.remaining(behind[1])})
    found = rules.check_phases(ahead, ranks, need_data=need_data, tokens=behind[2])
    train, steps = config.train, reader.values.get("train.steps", config.train.steps)
    length = "train.phases" if train.phases else f"train.tokens={train.tokens}"
    if (train.tokens is not None or train.phases) and steps != train.steps:
        both = f"train.steps={steps} and {length} are two lengths of one run"
        found.append(f"{both}, the latter of {counted(train.steps, 'step')}; leave one out")
    found = [p for p in found if not any(re.search(rf"\b{re.escape(key)}\b", p) for key in reader.bad)]
    if problems := reader.problems + [reader.locate(p) for p in found]:  # each once
        many = f"{len(problems)} problems in the configuration:\n" + "\n".join(f"  - {p}" for p in problems)
        raise ConfigError(problems[0] if len(problems) == 1 else many)
    return config.at(train.phase_after(behind[2]))


def resolve(config: Config, begun: Callable[[Config], Begun] = lambda config: NOTHING) -> Config:
    """`config` with every value filled in that is derived from others."""
    m, b, s, c = config.model, config.batch, config.lr_schedule, config.checkpoint
    heads = None if m.hidden_size % m.num_heads else m.hidden_size // m.num_heads
    published = m.preset in PRESETS and "seq_length" not in b.model_fields_set
    config = config.changed(
        model={"num_kv_heads": m.num_kv_heads or m.num_heads, "head_dim": m.head_dim or heads},
        batch={"seq_length": preset_seq_length(str(m.preset))} if published else {},
        checkpoint={"folder": c.folder or str(Path(config.run.folder) / "checkpoints")},
    )
    if config.train.phases:
        config, (steps, _, tokens) = config.filled(), begun(config)
        config = config.changed(train={"steps": max(1, config.train.phase_ends(steps, tokens)[-1])})
    elif config.train.tokens is not None:
        (steps, samples, tokens), b = begun(config), config.batch
        last = samples + -(-max(0, config.train.tokens - tokens) // b.seq_length)
        config = config.changed(train={"steps": max(1, b.steps_until(last, steps, samples))})
    end = s.decay_steps or config.train.steps
    warmup = s.warmup_steps if "warmup_steps" in s.model_fields_set else min(s.warmup_steps, end // 10)
    decay = max(1, end // 10) if s.wsd_decay_steps is None else s.wsd_decay_steps
    schedule = {"decay_steps": end, "wsd_decay_steps": decay, "warmup_steps": warmup}
    if s.decay_from_step is not None:
        schedule["decay_until_step"] = s.decay_until_step or config.train.steps
    return config.changed(lr_schedule=schedule)


def planned(config: Config) -> Config:
    """With what "auto" is in a plan, which may be made on another machine than the run."""
    dtype, compiled = config.precision.dtype, config.run.compile
    new: dict[str, dict[str, Any]] = {"precision": {"dtype": "bf16"}} if dtype == "auto" else {}
    return config.changed(**new | ({"run": {"compile": False}} if compiled == "auto" else {}))


def to_toml(config: Config) -> str:
    """The configuration as a TOML file that `load` reads back to an equal one."""
    preset = PRESETS.get(config.model.preset or "", {})
    lines: list[str] = []
    for section, values in config:
        lines += ["", f"[{section}]"]  # what is absent is None, but for what a preset sets
        lines += [f"{k} = {literal(v)}" for k, v in values if v is not None or preset.get(k) is not None]
    return "\n".join(lines[1:]) + "\n"


class _Reader:
    def __init__(self) -> None:
        self.known: dict[str, Setting] = {s.key: s for s in settings()}
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.spellings: dict[str, tuple[str, str]] = {}  # of two names: the one used, and where
        self.notes: dict[str, None] = {}
        self.problems: list[str] = []
        self.bad: set[str] = set()  # keys or sections whose value is not to be trusted

    def _problem(self, source: str, text: str, *bad: str) -> None:
        self.problems.append(f"{source}: {text}")
        self.bad |= {*bad}

    def read_override(self, text: str) -> None:
        """One ``section.key=value``, TOML or text; also with ``--``, and ``-`` for ``_``."""
        text = "checkpoint.resume=fresh" if text == "--fresh" else text
        key, equals, raw = text.removeprefix("--").partition("=")
        key, raw = self._current(key.strip().replace("-", "_"), COMMAND_LINE), raw.strip()
        if not equals:
            wrong = f"{text!r} has no value; write section.key=value, e.g. parallel.tp=2"
            return self._problem(COMMAND_LINE, wrong)
        words = key in self.known and str in self.known[key].kinds
        quotes = ('"', "'") if words else ('"', "'", "[", "{")
        value: Any = raw
        if raw.startswith(quotes) or not (words or key in TABLES):
            try:
                value = tomllib.loads(f"x = {raw}")["x"]
                tomllib.loads(f"x = [{raw}]")  # fails where something follows
            except (ValueError, RecursionError) as error:
                if raw.startswith(quotes):  # it only begins like TOML
                    around = f'texts in it need quotes, and the shell others around all of it: \'{key}=["a", "b"]\''
                    hint = around if raw.startswith(("[", "{")) else "close the quotes"
                    shown = _short(raw.replace("\n", "\\n"))
                    wrong = f"{key}={shown} is not a TOML value ({error}); {hint}"
                    return self._problem(COMMAND_LINE, wrong, key)
                value = {"True": True, "False": False}.get(raw, raw)
        self._take(key, value, COMMAND_LINE)

    def apply_preset(self) -> None:
        """Put the preset's row under the user's own values."""
        name = self.values.get("model.preset")
        if not isinstance(name, str):
            return
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
            hint = f'did you mean "{near[0]}"? ' if near else ""
            wrong = f"model.preset={literal(name)} is unknown; {hint}presets: {', '.join(PRESETS)}"
            return self._problem(self.sources["model.preset"], wrong, "model", "batch.seq_length")
        own, self.values = self.values, {}
        sources, self.sources = self.sources, {}
        self.take_tree({"model": PRESETS[name]}, "", f"preset {name}")
        for key, value in own.items():
            self._take(key, value, sources[key])

    def apply_linear(self) -> None:
        """What an earlier version called a linear schedule."""
        if self.values.get(key := "lr_schedule.kind") == "linear":
            source, now = self.sources[key], {f"lr_schedule.{name}": value for name, value in LINEAR.items()}
            words = " and ".join(f"{name}={literal(value)}" for name, value in now.items())
            self.notes[f'{source}: {key}="linear" is now {words}, the same curve'] = None
            for name, value in now.items():
                self._take(name, value, source)

    def validate(self) -> Config:
        """The configuration of the values that are right; the others become problems."""
        tree: dict[str, Any] = {}
        for key, value in self.values.items():
            *path, leaf = key.split(".")
            node = tree
            for name in path:
                node = node.setdefault(name, {})
            node[leaf] = node.get(leaf, {}) if value == {} else value
        try:
            return Config.model_validate(tree, strict=True)
        except ValidationError as error:
            refused: set[str] = set()
            for e in error.errors(include_url=False):
                self._refuse(e, refused)
            self.bad |= refused
            prefixes = tuple(f"{key}." for key in refused)
            self.values = {k: v for k, v in self.values.items() if not f"{k}.".startswith(prefixes)}
            return self.validate()

    def locate(self, problem: str) -> str:
        """`problem` with the places where its settings come from."""
        keys = re.findall(r"\b([a-z_]+(?:\.[a-z_0-9]+)+)\b", problem.split(";")[0])
        places = {key: self.sources[key] for key in keys if key in self.sources}
        if len(set(places.values())) <= 1:
            return ": ".join([*set(places.values()), problem])
        return f"{problem} ({', '.join(f'{key}: {source}' for key, source in places.items())})"

    def take_tree(self, tree: Mapping[str, Any], prefix: str, source: str) -> None:
        for name, value in tree.items():
            key = self._current("train.phases" if prefix + name == "phases" else prefix + name, source)
            table = isinstance(value, Mapping) and any(k.startswith(key + ".") for k in self.known)
            if not table or key in self.known:  # an empty nested table is a table with its defaults
                self._take(key, {} if table else value, source)
            if table:
                self.take_tree(value, key + ".", source)

    def _current(self, key: str, source: str) -> str:
        """Today's name of a setting, with a note; both names together are a problem."""
        new = RENAMED.get(key, key)
        if new != key:
            self.notes[f"{source}: {key} is now called {new}; it was read as that"] = None
        if new in RENAMED.values():
            other, place = self.spellings.setdefault(new, (key, source))
            if other != key:
                both = f"{other} ({place}) and {key} ({source})"
                self.problems.append(f"{both} are the old and the new name of one setting; write {new} alone")
                self.bad.add(new)
        return new

    def _take(self, key: str, value: Any, source: str) -> None:
        if key in REMOVED:
            default, why = REMOVED[key]
            wrong = f"{key}={literal(value)} is no setting any more: {why}; leave it out"
            return None if value == default else self._problem(source, wrong)
        if (setting := self.known.get(key)) is None:
            section = f"{key} is a section; write [{key}] and its settings below it"
            unknown = section if key in SECTIONS else f"unknown setting {key!r}; {self._suggest(key)}"
            return self._problem(source, unknown)
        if wrong := _unusable(value):
            none = '"none" or ' if setting.optional else ""
            wrong += f"; write {none}a value, or leave the setting out"
            return self._problem(source, key + wrong, key)
        if setting.optional and isinstance(value, str) and value.lower() == "none":
            value = None
        value = _tuples(_tables(key, value) if key in TABLES else value)
        nested = key.rpartition(".")[0]
        if nested in self.known and not isinstance(self.values.get(nested, {}), dict):
            del self.values[nested]  # a field of a table that was none
        if value is None:
            for k in [k for k in self.values if k.startswith(key + ".")]:
                del self.values[k]
        self.values.pop(key, None)  # later words come later, also in the order of the dict
        self.values[key], self.sources[key] = value, source

    def _refuse(self, error: Any, refused: set[str]) -> None:
        """Turn one of pydantic's errors into a message; its key joins `refused`."""
        path = list(error["loc"])
        key = str(path.pop(0))
        while path and f"{key}.{path[0]}" in self.known or key in SECTIONS:
            key += f".{path.pop(0)}"
        setting, value = self.known[key], self.values.get(key)
        source = self.sources.get(key, "defaults")
        if key in refused and key not in TABLES:
            return  # one message per setting
        refused.add(key)
        if path and key in TABLES:
            return self._problem(source, _table_problem(key, path, error))
        example = f"; for example {key}={literal(setting.default)}" if setting.default not in (None, ()) else ""
        if error["type"] == "literal_error" and isinstance(value, str):
            options = re.findall(r'"([^"]*)"', setting.type)
            word = OTHER_WORDS.get(value.lower(), value.lower())
            near = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
            example = f'; did you mean "{near[0]}"?' if near else ""
        must = "finite, " * (error["type"] == "finite_number") + setting.type + " or none" * setting.optional
        self._problem(source, f"{key}={_short(literal(value))} must be {must}{example}")

    def _suggest(self, key: str) -> str:
        """What may have been meant; messages of the rules about it say nothing new."""
        section, leaf = key.partition(".")[0], key.rpartition(".")[2]
        inside = [k for k in self.known if k.startswith(section + ".")]
        names = [k for k in self.known if k.rpartition(".")[2] == leaf]
        if not names and leaf in ELSEWHERE:
            names = [ELSEWHERE[leaf]]
        for candidates in (inside, list(self.known)):
            leaves = {k.rpartition(".")[2]: k for k in reversed(candidates)}
            names = names or [leaves[n] for n in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)]
        if not names and not inside:
            names = [f"[{s}]" for s in difflib.get_close_matches(section, SECTIONS, n=1)]
        self.bad |= {name for name in names if name in self.known}
        if names:
            return f"did you mean {' or '.join(names)}?"
        if inside:
            return f"[{section}] has {', '.join(k.partition('.')[2] for k in inside if k.count('.') == 1)}"
        return f"the sections are {', '.join(SECTIONS)}"


def _unusable(value: Any) -> str:
    """What no setting can hold, in words that follow its name; "" for what one may."""
    if isinstance(value, dict):
        return next((f".{name}{wrong}" for name, inner in value.items() if (wrong := _unusable(inner))), "")
    if isinstance(value, list):
        return next((f"[{i}]{wrong}" for i, inner in enumerate(value) if (wrong := _unusable(inner))), "")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return f"={_short(str(value))} is beyond 2**63 - 1"
    if not isinstance(value, str):
        return ""
    if not value.strip():
        return " is empty (an unset variable of the shell?)"
    if re.search("[\n\r\0]", value):
        return f"={_short(literal(value))} has a line break or NUL in it"
    return f"={_short(ascii(value))} is not valid UTF-8" if re.search("[\ud800-\udfff]", value) else ""


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"


def _table_problem(key: str, path: list[Any], error: Any) -> str:
    fields = {s.key: s for s in settings(TABLES[key])}
    what = {SourceConfig: "a source is a path or", PhaseConfig: "a phase is"}.get(TABLES[key], "a change is")
    where, hint = f"{key}[{path[0]}]", f"{what} a table with {', '.join(k for k in fields if '.' not in k)}"
    name = str(path[1]) if len(path) > 1 else ""
    if error["type"] == "missing":
        return f"{where} has no {name}; {hint}"
    if name not in fields:
        return f"{where}{name and '.'}{name}={literal(error['input'])} is not known; {hint}"
    inner = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path[2:])
    what = inner and f" is wrong: {name}"
    return f"{where}.{name}{inner}={literal(error['input'])}{what} must be {fields[name].type}; {hint}"


def _tables(key: str, value: Any) -> Any:
    """The shorthands of a list of tables: one table; for sources a path, or paths."""
    items = value if isinstance(value, (list, tuple)) else [value]
    named = TABLES[key] is SourceConfig
    return tuple({"path": item} if named and isinstance(item, str) else item for item in items)


def _tuples(value: Any) -> Any:
    """Lists as the tuples that the schema has, also inside tables."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_tuples, value))
    return {key: _tuples(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def read_toml(file: Path, what: str) -> dict[str, Any]:
    """Read `file`, which is `what` in words. Raises: ConfigError with the wrong line."""
    text = ""
    try:
        text = file.read_text(encoding="utf-8-sig")
        return tomllib.loads(text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot read {what} {file}: {reason}; give the path of a TOML file") from None
    except (ValueError, RecursionError) as error:  # the former also for endless numbers
        wrong, number = f"{file} is not valid TOML: {error}; write lines like tp = 2 under [parallel]", 0
        if isinstance(error, UnicodeDecodeError):
            text = error.object.decode(errors="replace")
            number = error.object.count(b"\n", 0, error.start) + 1
        elif found := re.search(r"at line (\d+)|at end of document", str(error)):
            number = int(found[1] or len(text.rstrip().splitlines()))
        line = [*text.split("\n"), ""][number - 1].strip()
        shown = f"\n  line {number}: {line if len(line) <= 100 else line[:100] + '...'}" if number else ""
        raise ConfigError(wrong + shown) from None
