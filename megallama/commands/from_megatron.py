"""A Megatron-LM command line as our TOML: `megallama from-megatron train.log > my.toml`.

    megallama from-megatron train.log            a log with the arguments, as Megatron prints them
    megallama from-megatron train.sh TP=2 X=64   a launch script; NAME=VALUE wins over its variables
    megallama from-megatron train.sh -- --lr 1   flags behind -- win over all others
    megallama from-megatron -- torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 32 ...

A script is read, never run: what it computes, or sets under a condition, is asked for. Standard error lists every flag
once, and what to look at. Exit status 2, with all reasons: no LLaMA, or wrong flags. Needs neither torch nor Megatron.
"""

from __future__ import annotations

import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from megallama.commands.megatron.convert import convert, summary, to_toml
from megallama.commands.megatron.flags import ALIASES, MARK, NOT_CHOSEN, TABLE, Flags, find, parse, plain
from megallama.commands.parser import Parser, filled
from megallama.config.errors import ConfigError, counted

QUOTED = r"'[^']*'|\"(?:\\.|[^\"\\])*\"|\\."
ASIDE = re.compile(rf"({QUOTED})|(?<!\S)#[^\n]*|\d*(?:&>>?|[<>]+&?)[ \t]*[^\s;|&)]*", re.S)  # comments, redirections
ARRAY = re.compile(rf"({QUOTED})|=\(((?:{QUOTED}|[^)'\"])*)\)", re.S)
COMPUTED = re.compile(r"\$\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|`[^`]*`")
DEFAULT = r"(?P<op>:?)[-=](?P<other>(?:[^{}]|\{[^{}]*\})*)"
NAMED = rf"\{{(?P<name>\w+)(?P<all>\[[@*]\])?(?:{DEFAULT})?\}}|(?P<short>\w+|[@*])"
VARIABLE = re.compile(rf"\\\$|\$(?:{NAMED}|\{{[^{{}}]*\}}?)")
UNKNOWN = f"{MARK}{{...}}{MARK}"
ASSIGNED = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.S)
BEGINS, ENDS = ("if", "for", "while", "until", "case", "select", "{"), ("fi", "done", "esac", "}")
BEFORE = ("export", "declare", "local", "readonly", "then", "do", "else", "-a", "-A", "-x")


class Script:
    """A launch script: its commands with flags, and its variables, which are text; arrays too."""

    def __init__(self, text: str, given: dict[str, str]) -> None:
        """Go through the statements in order. Raises: ConfigError for quotes without an end."""
        self.given, self.variables, self.commands = given, dict(given), list[list[str]]()
        text = COMPUTED.sub(UNKNOWN, ASIDE.sub(r"\1", text)).replace("\\\n", "")
        text = ARRAY.sub(lambda f: f[1] or '=" ' + " ".join(re.sub(r"['\"\\]", "", f[2]).split()) + '"', text)
        lexer = shlex.shlex(text + "\n", posix=True, punctuation_chars=";&|()\n")
        lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t", "", True
        try:
            tokens = list(lexer)
        except ValueError as error:
            raise ConfigError(f"{error}; close it, or give the flags themselves behind --") from None
        words, depth, doubtful = list[str](), 0, False
        for token in tokens:
            found, value = ASSIGNED.fullmatch(token), VARIABLE.sub(self.value, token)
            if token and set(token) <= set(";&|()\n"):
                self.command(words)
                words, doubtful = [], depth > 0 or "&&" in token or "||" in token
            elif found and not words:
                self.assign(found[1], found[2], VARIABLE.sub(self.value, found[3]), doubtful)
            elif words or token not in BEFORE:
                opened = token == "{" or (token in BEGINS and not words)
                depth += opened - (token in ENDS and not words)
                words += value.split() if VARIABLE.fullmatch(token) else [value]

    def command(self, words: list[str]) -> None:
        """Keep a command that gives flags to a program."""
        words = [w for word in words for w in (word.split() if re.search(r"\.py\s|^--[^=\s]+\s", word) else [word])]
        words = words[: next((n for n, word in enumerate(words) if re.match(r"\d*>|&|\|", word)), None)]
        at = next((n for n, word in enumerate(words) if word.endswith(".py")), len(words))
        if any(word.startswith("--") for word in words[at:]) and words[0] not in ("echo", "printf"):
            self.commands.append(words)

    def assign(self, name: str, more: str, text: str, doubtful: bool) -> None:
        """NAME=text or NAME+=text; a mark stands for what is computed, or set under a condition."""
        old = self.variables.get(name, "")
        if doubtful:
            grown = more or (old and text.startswith(f"{old} "))
            flags = grown or "--" in old + text or f"+{MARK}" in old
            mark = f"{MARK}{name}{'+' if flags else ''}{MARK}"
            text = mark if not grown else old if mark in old else f"{old} {mark}"
        elif text == UNKNOWN:
            text = f"{MARK}{name}{MARK}"
        elif more:
            text = old + text
        self.variables |= {name: text.strip()} if name not in self.given else {}

    def value(self, found: re.Match[str]) -> str:
        """What $NAME, ${NAME}, ${NAME:-other} stand for; a mark for all else that begins with $."""
        name = found["name"] or found["short"]
        if name is None:
            return "$" if found[0] == "\\$" else f"{MARK}{found[0][1:]}{MARK}"
        text = self.variables.get(name, "" if found["all"] or name in ("@", "*") else None)
        if found["other"] is not None and not (text if found["op"] else text is not None):
            return VARIABLE.sub(self.value, found["other"])
        return f"{MARK}{name}{MARK}" if text is None else text


def read_script(text: str, given: dict[str, str], name: str, flags: Flags) -> list[str]:
    """The words of the command of a script that trains. Raises: ConfigError if there is none."""
    if unused := [word for word in given if not re.search(rf"\b{re.escape(word.rstrip('+'))}\b", text)]:
        raise ConfigError(f"{name} has no variable {', '.join(unused)}; remove it, or look at its spelling")
    commands = Script(text, given).commands
    if not commands:
        raise ConfigError(f"{name} holds no `PROGRAM.py --FLAGS ...`; give the launch script, or flags behind --")
    command = max(commands, key=lambda words: sum(word.startswith("--") for word in words))
    flags.note(f"taken of {len(commands)} commands: {plain(command[:3])} ...", when=len(commands) > 1)
    more = {f"{MARK}{name}{MARK}": value.split() for name, value in given.items() if name.endswith("+")}
    return [word for before in command for word in more.get(before, [before])]


def read_listing(text: str, flags: Flags) -> list[str]:
    """Flags for the last whole list of arguments in a log. Raises: ConfigError if there is none."""
    end = text.rfind("- end of arguments -")
    begin = text.rfind("- arguments -", 0, max(end, 0))
    if begin < 0:
        raise ConfigError("the log holds no whole list of arguments, up to `--- end of arguments ---`; give the flags")
    lines = re.findall(r"(\w+) (?:\.\.+|(?<=\w{47} )\.?) ?(.*)", text[begin:end])
    printed = {name.strip("_").replace("_", "-"): value.strip() for name, value in lines}
    order = sorted(printed, key=lambda name: name not in ALIASES)  # so the newer name counts
    values = {ALIASES.get(name, name): printed[name] for name in order if printed[name] not in ("None", "", "[]")}
    if later := re.search(r"padded vocab \(size: (\d+)\)", text[end:]):
        values.setdefault("vocab-size", later[1])  # the tokenizer's, which Megatron reads later
    if "vocab-size" in values:
        values.pop("padded-vocab-size", None)
    values |= {"disable-bias-linear": str(values.pop("add-bias-linear", "") == "False")}
    flags.ranks, words = parse("size", [values.get("world-size", "")]), list[str]()
    for name, value in values.items():
        row, on = find(name), value not in ("False", "0", "0.0")
        if row is None and (row := find(f"no-{name}")):  # so the switch is called that turns it off
            name, value, on = f"no-{name}", "True", not on
        if row is None:
            title = "printed, but not known here, defaults among them (does one change the model?)"
            flags.told[title] += [f"{name}={value}"] if on else []
            continue
        if row.fate == "setting":
            taken = parse(row.kind, [row.default]) if row.default else None
            same = taken is not None and taken == parse(row.kind, [value.replace(" ", "")])
            silent = same or value in ("False", row.default)
        else:  # start-weight-decay has the value of weight-decay, families have defaults
            derived = values.get(name.partition("-")[2]) == value or name not in TABLE
            silent = not on or row.why == NOT_CHOSEN or (row.fate == "refused" and derived)
        if row.kind == "list":
            words += [f"--{name}", *(a or b for a, b in re.findall(r"'([^']*)'|([^\s,'\[\]]+)", value))]
        elif not silent:
            words.append(f"--{name}" if value == "True" else f"--{name}={value}")
    return words


def report(flags: Flags, line: str) -> str:
    """What became of every flag, the defaults that count, and what is to be looked at."""
    given, asked = flags.given, flags.asked
    told = {
        "became settings, or decided about them": [given[name] for name in given if name in asked],
        "not given: Megatron's defaults": [f"--{n} {v}" for n, v in asked.items() if v is not None],
        "no effect beside the other flags": [given[name] for name in given if name not in asked],
        **flags.told,
    }
    out = [line, f"for {counted(flags.ranks, 'rank')}" if flags.ranks else "--ranks N checks it"]
    for title, texts in told.items():
        text = textwrap.fill(", ".join(texts), 116, break_on_hyphens=False)
        out += ["", f"{title}:", textwrap.indent(text, "    ")] if texts else []
    out += ["", "to look at:", *(f"  - {note}" for note in flags.notes)] if flags.notes else []
    return "\n".join(out)


def run(argv: Sequence[str]) -> None:
    """Print the TOML, or write it; the report goes to standard error. Raises: MegallamaError."""
    at = argv.index("--") if "--" in argv else len(argv)
    words, flags = list(argv[at + 1 :]), Flags()
    parser = Parser("from-megatron", __doc__)
    parser.add_argument("source", nargs="?", type=filled, help="a log or a launch script; - is standard input")
    parser.add_argument("words", nargs="*", metavar="NAME=VALUE", help="variables of the script, or its arguments")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the TOML there")
    parser.add_argument("--ranks", metavar="N", help="check the settings for N ranks")
    parser.add_argument("--without", action="append", default=[], metavar="FLAG,...", help="leave these flags aside")
    parser.add_argument("--ignore-unknown", action="store_true", help="leave aside what is not known as Megatron's")
    args = parser.parse_intermixed_args(argv[:at])
    ranks = parse("size", [args.ranks or "1"])
    if ranks is None or ranks >= 10**9:
        parser.error(f"--ranks {args.ranks!r} is not a number of ranks; write --ranks 64")
    if args.source is None and not words:
        parser.error("nothing to convert; give a log, a launch script, or flags behind --")
    source = Path(args.source or "from_megatron")
    if args.source is not None:
        text = sys.stdin.read() if args.source == "-" else source.read_text(encoding="utf-8", errors="replace")
        given = {str(n): word for n, word in enumerate((w for w in args.words if "=" not in w), 1)}
        given |= dict(word.split("=", 1) for word in args.words if "=" in word)
        listed = re.search(r"-{3,} arguments -{3,}", text)
        if listed and given:
            parser.error(f"{source} is a log, which has no variables; write flags behind --")
        words = [*(read_listing(text, flags) if listed else read_script(text, given, args.source, flags)), *words]
    flags.read(words, ",".join(args.without).split(","), ignore_unknown=args.ignore_unknown)
    flags.ranks = ranks if args.ranks else flags.ranks
    name = re.sub(r"[^\w.-]", "_", source.stem) if args.source != "-" else "from_megatron"
    config, said = convert(flags, name)
    toml = to_toml(said, [f"From Megatron-LM's flags by megallama from-megatron {source}", summary(config)])
    print(report(flags, summary(config)), file=sys.stderr)
    if args.output is None:
        print(toml, end="")
    else:
        args.output.write_text(toml, encoding="utf-8")
