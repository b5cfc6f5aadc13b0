"""A Megatron-LM command line as our TOML: `megallama from-megatron train.log > my.toml`.

    megallama from-megatron train.log               a log that begins with the arguments, as Megatron prints them
    megallama from-megatron train.sh TP=2 GBS=64    a launch script; NAME=VALUE wins over its own variables
    megallama from-megatron train.sh -- --lr 3e-4   flags behind -- win over all others
    megallama from-megatron -- torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 32 ...

A script is read, never run: what it computes, or sets under a condition, is asked for. Standard error lists every flag
once: what became settings, what is implied here, what has no counterpart or no effect, what is left aside; then what
to look at. Exit status 2, and no TOML, if the flags ask for a model that is not a LLaMA, or hold mistakes; all of them
are listed. Needs neither torch nor Megatron.
"""

from __future__ import annotations

import ast
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from megallama.commands.megatron.convert import LLAMA, convert, summary, to_toml
from megallama.commands.megatron.flags import ALIASES, MARK, NOT_CHOSEN, TABLE, Flags, find, plain
from megallama.commands.parser import Parser
from megallama.config.errors import ConfigError, counted

QUOTED = r"'[^']*'|\"(?:\\.|[^\"\\])*\""
COMPUTED = r"\$\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|`[^`]*`|\$\{[^}]*\}"
OTHER = r"(?P<op>:?)[-=](?P<other>(?:[^{}]|\{[^{}]*\})*)"
VARIABLE = rf"\$(?:\{{(?P<name>\w+)(?:\[[@*]\])?(?:{OTHER})?\}}|(?P<short>\w+|[@*]))"
OUTSIDE = re.compile(rf"\\.|{QUOTED}|{VARIABLE}|{COMPUTED}", re.S)
INSIDE = re.compile(rf"\\.|{VARIABLE}|{COMPUTED}", re.S)
STATEMENT = re.compile(
    rf"""(?P<joint>&&|\|\|)?\s*(?:(?:export|declare|local|readonly|then|do|else|-[ax])\s+)*
    (?:(?P<name>[A-Za-z_]\w*)(?P<plus>\+?)=
        (?P<value>\((?:{QUOTED}|[^)'"])*\)|(?:\\.|{QUOTED}|{COMPUTED}|[^\s;&|'"`\\])*)
    |(?P<command>(?:{QUOTED}|{COMPUTED}|\\.|[>|]&|&>|[^;\n&|'"`\\])+))""",
    re.S | re.X,
)


class Script:
    """A launch script: its variables and the commands with flags, as far as they are plain."""

    def __init__(self, text: str, given: dict[str, str]) -> None:
        """Go through the statements in order. Raises: ConfigError for a quote or bracket that is never closed."""
        self.given, self.variables = given, {name: [value] for name, value in given.items()}  # a string is one item
        self.commands: list[list[str]] = []
        text = re.sub(rf"({QUOTED})|(?<!\S)#[^\n]*", r"\1", text, flags=re.S)
        rest = re.sub(rf"{QUOTED}|\\.", lambda found: re.sub(".", "_", found[0]), text, flags=re.S)
        if found := re.search(r"['\"]|(?<==)\([^)]*$", rest):
            where = f"line {1 + text.count(chr(10), 0, found.start())}: {found[0][0]} is never closed"
            raise ConfigError(f"{where}; close it, or give the flags themselves behind --")
        depth = 0
        for found in STATEMENT.finditer(text):
            if found["name"]:
                self.assign(found["name"], found["plus"], found["value"], doubtful=depth > 0 or bool(found["joint"]))
                continue
            first, *_, last = (found["command"].split() or [""]) * 2
            depth += first in ("if", "for", "while", "until", "case", "select") or last == "{"
            depth = max(0, depth - (first in ("fi", "done", "esac", "}")))
            words = [] if first in ("echo", "printf") else self.words(found["command"])
            words = [w for word in words for w in (self.words(word) if re.search(r"\.py\s", word) else [word])]
            words = words[: next((n for n, word in enumerate(words) if re.match(r"\d*>|&>|\|", word)), None)]
            at = next((n for n, word in enumerate(words) if word.endswith(".py")), -1)
            if any(word.startswith("--") for word in words[at + 1 :]) and (at >= 0 or first.startswith("--")):
                self.commands.append(words)

    def assign(self, name: str, more: str, raw: str, *, doubtful: bool) -> None:
        """NAME=raw or NAME+=raw; a mark stands for what is computed, or set under a condition."""
        before, end = self.variables.get(name, []), f"{name}+"
        computed = re.fullmatch(COMPUTED, raw.strip('"')) and not re.fullmatch(VARIABLE, raw.strip('"'))
        if name in self.given:
            self.variables[name] = shlex.split(self.given[name]) if raw.startswith("(") else before
        elif doubtful and (more or re.match(rf'"?\$\{{?{name}\b', raw)):  # it goes on
            mark = self.given.get(end, f"{MARK}+{end}{MARK}")
            self.given |= {end: ""} if end in self.given else {}  # once
            if not re.match(r'["(]?\s*(?:\$\{?\w+\}?)?\s*(?:[|>]|2>)', raw) and mark not in before:
                self.variables[name] = [*before, *mark.split()]
        elif doubtful or computed:
            flags = "--" in raw or f"{MARK}+" in " ".join(before)
            self.variables[name] = [f"{MARK}{'+' if flags else '!'}{name}{MARK}"]
        elif raw.startswith("("):
            self.variables[name] = [*(before if more else ()), *self.words(raw[1:-1])]
        else:
            self.variables[name] = [" ".join(before if more else ()) + " ".join(self.words(raw, r"(\W)"))]

    def words(self, raw: str, special: str = r"(['\"\\])") -> list[str]:
        """The words that the shell makes of a piece of the script; `special` signs of a value are its own."""

        def piece(found: re.Match[str]) -> str:
            text = found[0]
            if array := re.fullmatch(r'"\$\{(\w+)\[@\]\}"', text):
                return self.given.get(array[1]) or shlex.join(self.variables.get(array[1], ()))
            if text[0] == '"':
                return f'"{INSIDE.sub(inside, text[1:-1])}"'
            return text if text[0] in "\\'" else re.sub(special, r"\\\1", self.value(found))

        def inside(found: re.Match[str]) -> str:
            if found[0][0] == "\\":
                return found[0][1:] if found[0][1:] in "$`" else found[0]
            return re.sub(r"([\"\\])", r"\\\1", self.value(found))

        return shlex.split(OUTSIDE.sub(piece, raw.replace("\\\n", "")))

    def value(self, found: re.Match[str]) -> str:
        """What $NAME, ${NAME}, ${NAME:-other} stand for; all else that begins with $ is not read."""
        name = found["name"] or found["short"]
        items = [] if name in ("@", "*") else self.variables.get(name or "")
        if name is None:
            command = re.search(r"[\w./-]+", found[0])
            return f"{MARK}?({command[0] if command else ''}...){MARK}"
        if found["other"] is not None and (items is None or (found["op"] and not " ".join(items))):
            return " ".join(self.words(found["other"]))
        return f"{MARK}?{name}{MARK}" if items is None else " ".join(items)


def read_script(text: str, given: dict[str, str], name: str, flags: Flags) -> list[str]:
    """The words of the training command of a launch script. Raises: ConfigError if nothing looks like flags."""
    unused = [word for word in given if not re.search(rf"\b{word.rstrip('+')}\b", text)]
    if unused:
        raise ConfigError(f"{name} has no variable {', '.join(unused)}; remove it, or look at its spelling")
    script = Script(text, given)
    if script.commands:
        command = max(script.commands, key=lambda words: sum(word.startswith("--") for word in words))
        if len(script.commands) > 1:
            flags.notes.append(f"taken of {len(script.commands)} commands: {plain(command[:3])} ...")
        return command
    texts = {name: " ".join(items) for name, items in script.variables.items() if name not in given}
    lists = {name: text for name, text in texts.items() if text.lstrip().startswith("--")}
    if not lists:
        line = "the one with `torchrun ... pretrain_gpt.py --num-layers ...`"
        raise ConfigError(f"{name} holds no flags of Megatron; give the launch script, {line}, or flags behind --")
    flags.notes.append(f"no line starts a training program; taken: {', '.join(lists)}")
    return " ".join(lists.values()).split()


def read_listing(text: str, flags: Flags) -> list[str]:
    """Flags that give the arguments which Megatron printed: the last whole list of a log. Raises: ConfigError."""
    end = text.rfind("- end of arguments -")
    begin = text.rfind("- arguments -", 0, max(end, 0))
    if begin < 0:
        raise ConfigError("the log holds no whole list of arguments, up to `--- end of arguments ---`; give the flags")
    lines = re.findall(r"(\w+) (?:\.\.+|(?<=\w{47} )\.?) ?(.*)", text[begin:end])
    printed = {name.strip("_").replace("_", "-"): value.strip() for name, value in lines}
    values = {name: value for name, value in printed.items() if value not in ("None", "", "[]")}
    flags.ranks = int(values["world-size"]) if values.get("world-size", "").isdecimal() else None
    if later := re.search(r"padded vocab \(size: (\d+)\)", text[end:]):
        values.setdefault("vocab-size", later[1])  # the tokenizer's, which Megatron reads later
    if "vocab-size" in values:
        values.pop("padded-vocab-size", None)
    if values.pop("add-bias-linear", "") == "False":
        values["disable-bias-linear"] = "True"
    words: list[str] = []
    for printed_name, value in values.items():
        name = ALIASES.get(printed_name, printed_name)
        row, on = find(name), value not in ("False", "0", "0.0")
        if row is None and (row := find(f"no-{name}")):  # so the switch is called that turns it off
            name, value, on = f"no-{name}", "True", not on
        again, derived = name != printed_name and name in values, values.get(name.partition("-")[2]) == value
        if row is None:
            flags.unlisted += [f"{name}={value}"] if on else []
        elif row.fate == "setting" and (again or value == "False" or row.default == row.kind(value.replace(" ", ""))):
            continue
        elif row.fate == "refused" and (derived or name not in TABLE):  # start-weight-decay; families have defaults
            continue
        elif row.fate == "setting" or (on and row.why != NOT_CHOSEN):
            several = list(map(str, ast.literal_eval(value))) if row.kind is list else []
            words += [f"--{name}", *several] if several or value == "True" else [f"--{name}={value}"]
    return words


def report(flags: Flags, line: str) -> str:
    """What became of every flag, Megatron's defaults that were taken over, and what is to be looked at."""
    given, asked = flags.given, flags.asked
    idle = [(text, "no effect beside the other flags") for name, text in given.items() if name not in asked]
    parts = {"context-parallel-size", "make-vocab-size-divisible-by", "num-query-groups", "rope-scaling-factor"}
    parts |= {name for name, *_ in LLAMA} | (set() if "data-path" in flags.values else {"split"})
    if not {"data-path", "valid-data-path"} & flags.values.keys():
        parts |= {"eval-iters", "eval-interval"}
    defaults = [(f"--{n} {value}", "") for n, value in asked.items() if value is not None and n not in parts]
    known = f"for {counted(flags.ranks, 'rank')}" if flags.ranks else None
    out = [line, known or "for how many ranks is not said; --ranks N checks that"]
    out += ["", f"the launcher: {flags.launcher}"] if flags.launcher else []
    read = ", ".join(text for name, text in given.items() if name in asked)
    out += ["", "became settings, or decided about them:", filled(read)] if read else []
    for title, rows in (
        ("implied: so here without a setting", flags.implied),
        ("not given: Megatron's default, now written out", defaults),
        ("left aside", [*flags.aside, *idle]),
    ):
        width = min(44, max((len(flag) for flag, _ in rows), default=0))
        out += ["", f"{title}:"] if rows else []
        out += [f"  {flag:<{width}}  {why}".rstrip() for flag, why in rows]
    if flags.left_out:
        out += ["", "no counterpart, left out; the model and what it learns stay the same:"]
    for reason in dict.fromkeys(why for _, why in flags.left_out):
        out += [f"  {reason}:", filled(", ".join(flag for flag, why in flags.left_out if why == reason))]
    if flags.unlisted:
        out += ["", "printed, but not known here, defaults among them; does one change the model?"]
        out.append(filled(", ".join(flags.unlisted)))
    out += ["", "to look at:", *(f"  - {note}" for note in flags.notes)] if flags.notes else []
    return "\n".join(out)


def filled(text: str) -> str:
    """The text in lines."""
    return textwrap.fill(text, 118, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)


def run(argv: Sequence[str]) -> None:
    """Print the TOML, or write it; the report goes to standard error. Raises: MegallamaError."""
    own = list(argv)
    at = own.index("--") if "--" in own else len(own)
    words, flags = own[at + 1 :], Flags()
    own = re.sub("(^|\0)--without\0", r"\1--without=", "\0".join(own[:at])).split("\0") if at else []
    parser = Parser("from-megatron", __doc__)
    parser.add_argument("source", nargs="?", help="a log, a launch script or a file of flags; - is standard input")
    parser.add_argument("words", nargs="*", metavar="NAME=VALUE", help="variables of the script, or its arguments")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the TOML there")
    parser.add_argument("--ranks", metavar="N", help="check the settings for N ranks")
    parser.add_argument("--without", action="append", default=[], metavar="FLAG,...", help="leave these flags aside")
    parser.add_argument("--ignore-unknown", action="store_true", help="leave aside what is not known as Megatron's")
    args = parser.parse_intermixed_args(own)
    if args.ranks is not None and not re.fullmatch("0*[1-9][0-9]{0,8}", args.ranks):
        parser.error(f"--ranks {args.ranks!r} is not a number of ranks; write for example --ranks 64")
    if args.source is None and not words:
        parser.error("nothing to convert; give a log, a launch script, or flags behind --")
    source = Path(args.source or "from_megatron")
    if args.source is not None:
        try:
            text = sys.stdin.read() if args.source == "-" else source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = f"{getattr(error, 'strerror', None) or error}; give a launch script, or flags behind --"
            raise ConfigError(f"cannot read {source}: {why}") from None
        given = {str(n): word for n, word in enumerate((w for w in args.words if "=" not in w), 1)}
        given |= dict(word.split("=", 1) for word in args.words if "=" in word)
        listed = re.search(r"-{3,} arguments -{3,}", text)
        if listed and given:
            parser.error(f"{source} is a log, which has no variables; write flags behind --")
        words = [*(read_listing(text, flags) if listed else read_script(text, given, args.source, flags)), *words]
    without = [name.strip() for names in args.without for name in names.split(",") if name.strip()]
    flags.read(words, without, ignore_unknown=args.ignore_unknown)
    flags.ranks = int(args.ranks) if args.ranks else flags.ranks
    name = re.sub(r"[^\w.-]", "_", source.stem)
    config, said = convert(flags, "from_megatron" if name == "-" else name)
    toml = to_toml(said, [f"From Megatron-LM's flags, by megallama from-megatron {source}", summary(config)])
    print(report(flags, summary(config)), file=sys.stderr)
    if args.output is None:
        print(toml, end="")
    else:
        args.output.write_text(toml, encoding="utf-8")
