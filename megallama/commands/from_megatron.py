"""A Megatron-LM command line as our TOML: `python tools/from_megatron_args.py SCRIPT > my.toml`.

    python tools/from_megatron_args.py train_llama2.sh MODEL_SIZE=7 TP=2       variables win over the script's own
    python tools/from_megatron_args.py train_llama2.sh -- --hidden-dropout 0   flags behind -- win over the script's
    python tools/from_megatron_args.py -- torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 32 ...
    python tools/from_megatron_args.py train.sh --without apply-layernorm-1p   a flag that is left aside
    python tools/from_megatron_args.py train.sh --ignore-unknown               flags that are not known here, listed
    python tools/from_megatron_args.py train.sh -o my.toml --ranks 64          a file, checked for 64 ranks

SCRIPT is a launch script or a file of flags; it is read, never run. Further words are its arguments. Standard error
lists every flag once: what became settings, what is implied here, what has no counterpart or no effect, what is left
aside; then what to look at. Exit status 2, and no TOML, if the flags ask
for a model that is not a LLaMA, or hold mistakes; all of them are listed. Needs neither torch nor Megatron.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from megallama.commands.megatron.convert import convert, summary, to_toml
from megallama.commands.megatron.shell import plain, read_script
from megallama.commands.megatron.words import Flags, read_flags
from megallama.config.errors import ConfigError, exit_status
from megallama.config.words import counted

USAGE = (
    "usage: python tools/from_megatron_args.py [-o FILE] [--ranks N] [--without FLAG,...] "
    "[--ignore-unknown] [SCRIPT [ARGUMENT ...] [NAME=VALUE ...]] [-- FLAGS]"
)
OWN = ("-o", "--output", "--ranks", "--without")
LAUNCHERS = ("torchrun", "python", "python3", "srun", "mpirun", "deepspeed", "accelerate")


@dataclass
class Request:
    """What was asked for."""

    script: Path | None = None
    given: dict[str, str] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    output: Path | None = None
    ranks: int | None = None
    without: list[str] = field(default_factory=list)
    ignore_unknown: bool = False


def parse(argv: Sequence[str]) -> Request:
    """The command line. Raises: ConfigError."""
    asked, words = Request(), list(argv)
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if word == "--":
            asked.flags += words
            break
        if word == "--ignore-unknown":
            asked.ignore_unknown = True
        elif option in OWN:
            if not equals and not words:
                raise ConfigError(f"{word} has no value\n{USAGE}")
            _option(asked, option, value if equals else words.pop(0))
        elif word.startswith("-") or (not asked.script and PurePath(word).name in LAUNCHERS):
            asked.flags += [word, *words]
            break
        elif re.fullmatch(r"\w+=.*", word, re.S):
            asked.given[option] = value
        elif asked.script is None:
            asked.script = Path(word)
        else:  # an argument of the script
            asked.given[str(1 + sum(name.isdigit() for name in asked.given))] = word
    if asked.script is None and not asked.flags:
        raise ConfigError(f"nothing to convert; give a launch script, or flags behind --\n{USAGE}")
    return asked


def _option(asked: Request, option: str, value: str) -> None:
    if option == "--without":
        asked.without += [name.strip() for name in value.split(",") if name.strip()]
    elif option != "--ranks":
        asked.output = Path(value)
    elif value.isdecimal() and int(value) > 0:
        asked.ranks = int(value)
    else:
        raise ConfigError(f"--ranks {value!r} is not a number of ranks; write for example --ranks 64")


def report(flags: Flags, line: str) -> str:
    """What is implied, left out, taken over from Megatron, and to be looked at."""
    said = {flag.split()[0].lstrip("-").replace("_", "-") for flag, _ in flags.implied}
    given = {name: text for name, text in flags.given.items() if name not in said}
    idle = "no effect beside the other flags"
    aside = [*flags.aside, *((text, idle) for name, text in given.items() if name not in flags.used)]
    read = ", ".join(text for name, text in given.items() if name in flags.used)
    defaults = [(f"--{name} {value}", "") for name, value in flags.asked.items() if not _silent(name, flags)]
    size = f"for {counted(flags.ranks, 'rank')}" if flags.ranks else None
    out = [line, size or "for how many ranks is not said; --ranks N checks that"]
    if flags.launcher:
        out += ["", f"the launcher: {flags.launcher}"]
    if read:
        out += ["", "became settings, or decided about them:", *_filled(read)]
    for title, rows in (
        ("implied: so here without a setting", flags.implied),
        ("not given: Megatron's default, now written out", defaults),
        ("left aside", aside),
    ):
        if rows:
            width = min(44, max(len(flag) for flag, _ in rows))
            out += ["", f"{title}:", *(f"  {flag:<{width}}  {why}".rstrip() for flag, why in rows)]
    if flags.left_out:
        out += ["", "no counterpart, left out; the model and what it learns stay the same:"]
    for reason in dict.fromkeys(why for _, why in flags.left_out):
        names = ", ".join(flag for flag, why in flags.left_out if why == reason)
        out += [f"  {reason}:", *_filled(names)]
    if flags.notes:
        out += ["", "to look at:", *(f"  - {note}" for note in flags.notes)]
    return "\n".join(out)


def _filled(text: str) -> list[str]:
    return [textwrap.fill(text, 118, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)]


def _silent(name: str, flags: Flags) -> bool:
    """Defaults that say nothing: parts that are off, and what is refused or shown elsewhere."""
    given = flags.values
    return (
        name in ("context-parallel-size", "make-vocab-size-divisible-by", "num-query-groups", "rope-scaling-factor")
        or (name.endswith("dropout") or name in ("normalization", "position-embedding-type"))
        or (name == "split" and "data-path" not in given)
        or (name.startswith("eval-") and "data-path" not in given and "valid-data-path" not in given)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 is success, 2 an error of the input."""
    return exit_status(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Print the TOML, or write it; the report goes to standard error."""
    if any(word in ("-h", "--help") for word in argv):
        print((__doc__ or "").strip())
        return 0
    asked = parse(argv)
    words, notes, source = list(asked.flags), [], "the command line"
    if asked.script is not None:
        try:
            text = asked.script.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"cannot read {asked.script}: {reason}; give a launch script, or flags behind --"
            ) from None
        script = read_script(text, asked.given, str(asked.script))
        words, notes, source = [*script.command, *words], script.notes, asked.script.name
    flags = read_flags(words, asked.without, ignore_unknown=asked.ignore_unknown)
    flags.notes[:0] = notes
    name = asked.script.stem if asked.script is not None else "from_megatron"
    config, said = convert(flags, re.sub(r"[^\w.-]", "_", name), asked.ranks)
    line = summary(config)
    toml = to_toml(said, [f"From Megatron-LM's flags in {plain(source)}, by tools/from_megatron_args.py.", line])
    print(report(flags, line), file=sys.stderr)
    if asked.output is None:
        print(toml, end="")
    else:
        asked.output.write_text(toml, encoding="utf-8")
    return 0
