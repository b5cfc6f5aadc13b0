"""Megatron's flags out of the words of a command: names, values, and everything that is wrong with them at once."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any

from megallama.commands.megatron.flags import (
    ALIASES,
    DEFAULTS,
    DIALECT,
    IMPLIED,
    IMPLIED_VALUES,
    LEFT_OUT,
    READ,
    REFUSED,
)
from megallama.commands.megatron.shell import MARK, plain, script_at, unknown

SIZES = ("-size", "-layers", "-heads", "-groups", "-length", "-by", "-rank", "-stage", "-channels")  # from 1 on
KINDS = {int: "a whole number", float: "a number", str: "a word", list: "one word or more"}
LAUNCHER = {"nproc-per-node": "ranks of a node", "nnodes": "nodes", "num-nodes": "nodes", "num-gpus": "ranks of a node"}


@dataclass
class Flags:
    """What a command line says."""

    values: dict[str, Any] = field(default_factory=dict)  # of READ, converted
    implied: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    given: dict[str, str] = field(default_factory=dict)  # flags of READ -> as written
    used: set[str] = field(default_factory=set)  # flags of READ that were asked for
    aside: list[tuple[str, str]] = field(default_factory=list)  # flags left aside, and why
    launcher: str = ""  # the words before the program's own flags
    problems: list[str] = field(default_factory=list)
    ranks: int | None = None
    asked: dict[str, Any] = field(default_factory=dict)  # Megatron's defaults that were taken
    lost: dict[str, list[str]] = field(default_factory=dict)  # variables without a value -> the flags that need them

    def get(self, name: str) -> Any:
        """The value of a flag of READ; where it is not given Megatron's default, else None (False for a switch)."""
        self.used.add(name)
        if name in self.values:
            return self.values[name]  # None: the script gives it no value
        if name in DEFAULTS:
            self.asked[name] = DEFAULTS[name]
            return DEFAULTS[name]
        return False if READ[name] is bool else None


def find(table: dict[str, Any], name: str) -> Any:
    """The entry of a name in a table with patterns, or None."""
    if name in table:
        return table[name]
    return next((value for pattern, value in table.items() if "*" in pattern and fnmatchcase(name, pattern)), None)


def read_flags(words: Sequence[str], without: Sequence[str] = (), *, ignore_unknown: bool = False) -> Flags:
    """Sort the words of a command (with or without launcher and program) into the tables.

    `without` are left aside, and with `ignore_unknown` the flags that are in no table.
    """
    flags = Flags()
    at = script_at(list(words))
    if at is not None:
        flags.ranks, flags.launcher = _ranks(words[:at], flags), plain(" ".join(words[: at + 1]))
        words = words[at + 1 :]
    gone = {_name(w) for w in without}
    seen = set()
    for name, shown, values in _pairs(words, flags):
        seen.add(name)
        if name in gone:
            flags.aside.append((" ".join([shown, *map(plain, values)]), "as --without says"))
            continue
        if ALIASES.get(_name(shown)) == "num-query-groups":  # where other programs say it, it counts by itself
            flags.values["group-query-attention"] = True
        extra = DIALECT.get(name) or DIALECT.get(" ".join([name, *values]))
        for more, _, words_of in _pairs(extra or [], flags):
            flags.values[more] = words_of[0] if words_of else True
        if extra:
            flags.implied.append((shown, f"as {' '.join(extra)}"))
        else:
            _take(flags, name, shown, values, ignore_unknown)
    for variable, users in flags.lost.items():
        settable = variable[1:].isidentifier() or variable[1:].isdigit()
        write = f"{variable[1:]}=VALUE behind the script" if settable else f"-- {users[0]} VALUE at the end"
        what = f"{', '.join(users[:3])}{' ...' if len(users) > 3 else ''}"
        flags.problems.append(f"{variable}, for {what}, has no value in the script; write {write}")
    for name in sorted(gone - seen):
        flags.problems.append(f"--without {name}: the command line has no --{name}; remove it from --without")
    return flags


def _name(word: str) -> str:
    return word.lstrip("-").replace("_", "-")


def _pairs(words: Sequence[str], flags: Flags) -> list[tuple[str, str, list[str]]]:
    """(name, the flag as written, values) of every flag; a later one wins over an earlier one of the same name."""
    out: dict[str, tuple[str, str, list[str]]] = {}
    current: list[str] | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2 and not word.startswith(f"--{MARK}"):
            shown, equals, value = word.partition("=")
            name = ALIASES.get(_name(shown), _name(shown))
            current = [value] if equals else []
            if earlier := out.pop(name, None):
                flags.aside.append((plain(" ".join([earlier[1], *earlier[2]])), "given again later, which counts"))
            out[name] = (name, plain(shown), current)
        elif current is not None:
            current.append(word)
        elif unknown(word):
            flags.notes.append(f"{plain(word)} has no value in the script; left out")
        else:
            flags.problems.append(f"{word!r} stands before the first flag; flags begin with --, values follow them")
    return list(out.values())


def _take(flags: Flags, name: str, shown: str, values: list[str], ignore_unknown: bool) -> None:
    """Put one flag where it belongs."""
    if name in READ:
        flags.given[name] = plain(" ".join([shown, *values]))
        _read(flags, name, shown, values)
    elif name in IMPLIED_VALUES:
        allowed, why, other = IMPLIED_VALUES[name]
        word = " ".join(v for v in values if not unknown(v))
        if word.lower() in allowed:
            flags.implied.append((f"{shown} {word}", why))
        else:
            flags.problems.append(
                f"{shown} {plain(word)}: {other}; write {shown} {allowed[0]}, or remove it (--without {name})"
            )
    elif (why := find(IMPLIED, name)) is not None:
        flags.implied.append((shown, why))
    elif (why := find(REFUSED, name)) is not None:
        flags.problems.append(f"{' '.join([shown, *map(plain, values)])}: {why.format(flag=name)}")
    elif (why := find(LEFT_OUT, name)) is not None:
        flags.left_out.append((plain(" ".join([shown, *values])), why))
    else:
        known = [*READ, *IMPLIED, *IMPLIED_VALUES, *LEFT_OUT, *REFUSED]
        near = difflib.get_close_matches(name, [k for k in known if "*" not in k], n=1, cutoff=0.75)
        if ignore_unknown:
            why = "not known as Megatron's" + (f"; did you mean --{near[0]}?" if near else "")
            flags.aside.append((plain(" ".join([shown, *values])), why))
            return
        hint = f"did you mean --{near[0]}? If not" if near else "if it is right"
        flags.problems.append(
            f"{shown} is not known as Megatron's; {hint}, leave it aside: --without {name} (--ignore-unknown: all such)"
        )


def _read(flags: Flags, name: str, shown: str, values: list[str]) -> None:
    """Convert the value of a flag of READ."""
    kind = READ[name]
    lost = [v for v in values if v.startswith(MARK) and v.endswith(MARK)]
    if kind is not list and len(values) > (kind is not bool):  # an unset variable behind the value is nothing
        for v in [v for v in lost if v is not values[0] or kind is bool]:
            flags.notes.append(f"{plain(v)} has no value in the script; left out")
            values = [w for w in values if w is not v]
    if kind is bool:
        if values:
            flags.problems.append(f"{shown} takes no value, but {' '.join(map(plain, values))!r} follows; remove it")
        flags.values[name] = True
        return
    if not values:
        flags.problems.append(f"{shown} has no value; write {shown} and {KINDS[kind]}")
        return
    if missing := [u for v in values for u in unknown(v)]:
        flags.values[name] = None
        for variable in missing:
            flags.lost.setdefault(variable, []).append(shown)
        return
    if kind is list:
        flags.values[name] = values
        return
    if len(values) > 1:
        flags.problems.append(f"{shown} takes one value, but got {' '.join(values)!r}; write {shown} {values[0]}")
        return
    try:
        if kind is str:
            flags.values[name] = values[0].strip("'\"")
            return
        number = float(values[0])
        if not isfinite(number):
            raise ValueError
        if kind is int and (number != int(number) or (number < 1 and name.endswith(SIZES))):
            raise ValueError
        flags.values[name] = kind(number)
    except (ValueError, OverflowError):
        what = KINDS[kind] + (" above 0" if kind is int and name.endswith(SIZES) else "")
        flags.problems.append(f"{shown} {values[0]}: this is not {what}; write for example {shown} {_example(name)}")


def _example(name: str) -> str:
    default = DEFAULTS.get(name)
    return f"{default:g}" if isinstance(default, (int, float)) else "8" if READ[name] is int else "0.1"


def _ranks(words: Sequence[str], flags: Flags) -> int | None:
    """Ranks that a launcher's options stand for; None if they do not say."""
    said = {"ranks of a node": None, "nodes": 1}
    launched = False
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        what = LAUNCHER.get(_name(name))
        if what is not None and name.startswith("--"):
            launched = True
            number = value if equals else following
            said[what] = int(number) if number.isdecimal() else None
            if number.isdecimal() is False:
                flags.notes.append(f"the launcher's {name} {plain(number)} is not known here; give --ranks N")
    per, nodes = said["ranks of a node"], said["nodes"]
    return per * nodes if launched and per and nodes else None
