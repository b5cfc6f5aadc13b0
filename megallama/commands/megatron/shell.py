"""The words of the training command in a launch script, found by reading the script, never by running it.

Understood: assignments and arrays with ``+=``, quotes, line continuations, comments, ``$NAME``, ``${NAME}``,
``${NAME:-default}``, ``${ARRAY[@]}``, ``$((arithmetic))``, ``if``/``elif``/``else`` on values that are known, ``eval``
and ``sh -c``.  Loops, ``case`` and functions are passed over.  What only running would tell (the output of commands,
positional arguments, the environment) is *unknown*: it stays in a word as `MARK` NAME `MARK`, so that whoever needs the
value can ask for it.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any

from megallama.config.errors import ConfigError

MARK = "\0"
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.S)
PREFIXES = ("export", "declare", "local", "readonly", "typeset", "-a", "-x")
SKIPPED = {"for": "done", "while": "done", "until": "done", "select": "done", "case": "esac"}
PAIRS = {"(": ")", "{": "}"}
TESTS = ("[", "[[", "test")
Env = Mapping[str, str | list[str]]


@dataclass(frozen=True)
class Statement:
    """A simple command as written: its words with their quotes, the operator behind it, its line."""

    words: tuple[str, ...]
    end: str
    line: int


@dataclass
class Script:
    """What reading a script gave."""

    command: list[str] = field(default_factory=list)
    line: int = 0
    notes: list[str] = field(default_factory=list)


def unknown(word: str) -> list[str]:
    """Names without a value in a word, as one would write them: $DATA_PATH, $1, $(nproc)."""
    return [f"${name}" for name in dict.fromkeys(re.findall(f"{MARK}([^{MARK}]*){MARK}", word))]


def plain(word: str) -> str:
    """The word with its unknown parts written as in the script."""
    return re.sub(f"{MARK}([^{MARK}]*){MARK}", r"$\1", word)


def statements(text: str) -> list[Statement]:
    """Cut a script into simple commands. Raises: ConfigError for a quote or bracket that is never closed."""
    out: list[Statement] = []
    words: list[str] = []
    word, i, begin = "", 0, 0
    while i <= len(text):
        c = text[i : i + 1] or "\n"
        if not words and not word:
            begin = i
        test = words.count("[[") > [*words, word].count("]]")  # then && and || belong to the condition
        ends = c in "\n;" or (c in "&|" and not test and not word.endswith((">", "<")) and text[i + 1 : i + 2] != ">")
        if (ends or c in " \t\r" or (c == "#" and not word)) and word:
            words, word = [*words, word], ""
        elif ends:
            end = re.match(r"&&|\|\||\|&|;;|.", text[i : i + 2] or "\n", re.S)[0]  # type: ignore[index]
            if words or end == ";;":
                out.append(Statement(tuple(words), end, 1 + text.count("\n", 0, begin)))
            words, i = [], i + len(end)
        elif c == "\\":
            word, i = word + ("" if text[i + 1 : i + 2] == "\n" else text[i : i + 2]), i + 2
        elif c == "#" and not word:
            i = (text + "\n").index("\n", i)
        elif c in " \t\r":
            i += 1
        else:
            j = _group_end(text, i, 1 + text.count("\n", 0, i))
            word, i = word + text[i:j], j
    return out


def _group_end(text: str, i: int, line: int) -> int:
    """Where the quoted or bracketed group that begins at `i` ends; i + 1 if none begins."""
    c = text[i]
    if c == "$" and text[i + 1 : i + 2] in PAIRS:
        return _group_end(text, i + 1, line)
    if c not in "'\"`(" and not (c == "{" and text[i - 1 : i] == "$"):
        return i + 1
    closing, j = PAIRS.get(c, c), i + 1
    while j < len(text):
        if text[j] == "\\" and c != "'":
            j += 2
        elif text[j] == closing:
            return j + 1
        elif c in PAIRS and text[j] == "#" and text[j - 1] in " \t\n" and c == "(":
            j = (text + "\n").index("\n", j)
        elif (c in PAIRS and text[j] in "'\"`(") or (c != "'" and text[j] == "$" and text[j + 1 : j + 2] in PAIRS):
            j = _group_end(text, j, line)
        else:
            j += 1
    raise ConfigError(f"line {line}: {c} is never closed; close it, or give the flags themselves behind --")


def expand(raw: str, env: Env, split: bool = True) -> list[str]:
    """The words that a raw word becomes: quotes removed, variables put in, split where the shell would."""
    fields, current, i = [], "", 0
    begun = False

    def add(text: str, quoted: bool) -> None:
        nonlocal current, begun
        pieces = [text] if quoted or not split else re.split(r"[ \t\n]+", text)
        for n, piece in enumerate(pieces):
            if n and begun:
                fields.append(current)
                current, begun = "", False
            current, begun = current + piece, begun or quoted or bool(piece)

    while i < len(raw):
        c = raw[i]
        j = _group_end(raw, i, 1)
        if c == "\\":
            j = i + 2
            add(raw[i + 1 : j] if raw[i + 1 : j] != "\n" else "", True)
        elif c == "'":
            add(raw[i + 1 : j - 1], True)
        elif c == '"':
            inner = re.sub(r"\\\n", "", raw[i + 1 : j - 1])
            whole = re.fullmatch(r"\$\{(\w+)\[@\]\}", inner)
            if whole and isinstance(value := env.get(whole[1]), list):
                if begun:
                    fields.append(current)
                fields += value
                current, begun = "", False
            else:
                add(_double(inner, env), True)
        elif c in "$`":
            match = re.match(r"\$(\w+|[@*#?$!-])", raw[i:])
            j = i + len(match[0]) if match else j
            add(_value(raw[i:j], env), False)
        else:
            add(raw[i:j], True)
        i = j
    return [*fields, current] if begun else fields


def _double(text: str, env: Env) -> str:
    """The inside of double quotes."""
    out, i = "", 0
    while i < len(text):
        if text[i] == "\\" and text[i + 1 : i + 2] in ("$", '"', "\\", "`"):
            out, i = out + text[i + 1], i + 2
        elif text[i] in "$`":
            match = re.match(r"\$(\w+|[@*#?$!-])", text[i:])
            j = i + len(match[0]) if match else _group_end(text, i, 1)
            out, i = out + (_value(text[i:j], env) if j > i + 1 else text[i]), j
        else:
            out, i = out + text[i], i + 1
    return out


def _value(raw: str, env: Env) -> str:
    """What $NAME, ${...}, $((...)), $(...) or `...` stands for."""
    if raw in ("$@", "$*", "$#", "${@}", "${*}"):
        return ""
    if raw.startswith("$(("):
        return _arithmetic(raw[3:-2], env)
    inner = raw[2:-1] if raw.startswith("${") else raw[1:]
    match = re.fullmatch(r"(\w+)(?:\[[@*]\])?(?:(:?[-=+])(.*))?", inner, re.S)
    if raw.startswith(("$(", "`")) or not match:
        command = re.findall(r"[\w./-]+", raw)
        return f"{MARK}({command[0] if command else ''}...){MARK}"
    name, default, other = match.groups()
    value = env.get(name)
    if isinstance(value, list):
        value = " ".join(value)
    empty = value is None or (value == "" and (default or "").startswith(":"))
    if default and default.endswith("+") == (not empty):
        return " ".join(expand(other, env, split=False))
    if value is None and not default:
        return f"{MARK}{name}{MARK}"
    return "" if empty else str(value)


OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod,
    ast.Div: lambda a, b: a // b if a * b >= 0 else -(-a // b),
    ast.Gt: operator.gt, ast.Lt: operator.lt, ast.GtE: operator.ge, ast.LtE: operator.le,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip


def _arithmetic(text: str, env: Env) -> str:
    """The whole number that shell arithmetic gives, or an unknown."""
    known = _double(re.sub(r"(?<![\w$\{])([A-Za-z_]\w*)", r"${\1}", text), env)
    if MARK in known:
        return "".join(f"{MARK}{name[1:]}{MARK}" for name in unknown(known))

    known = re.sub(r"^(.+?)\?(.+?):(.+)$", r"(\2) if (\1) else (\3)", known.strip())  # C's ternary

    def run(node: ast.AST) -> int:
        if isinstance(node, ast.Expression):
            return run(node.body)
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -run(node.operand)
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](run(node.left), run(node.right))
        if isinstance(node, ast.IfExp):
            return run(node.body) if run(node.test) else run(node.orelse)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return int(OPERATORS[type(node.ops[0])](run(node.left), run(node.comparators[0])))
        raise ValueError(known)

    try:
        return str(run(ast.parse(known.strip(), mode="eval")))
    except (ValueError, SyntaxError, KeyError, ZeroDivisionError):
        return f"{MARK}(({text})){MARK}"


NUMERIC = {"-eq": "==", "-ne": "!=", "-gt": ">", "-ge": ">=", "-lt": "<", "-le": "<="}


def _test(raw: list[str], env: Env) -> bool | None:
    """Whether a condition holds; None if only running the script would tell."""
    if raw[:1] == ["test"]:
        raw = ["[", *raw[1:], "]"]
    if len(raw) == 1 and raw[0].startswith("(("):
        said = _arithmetic(raw[0][2:-2], env)
        return None if MARK in said else said != "0"
    if raw[:1] == ["!"]:
        inner = _test(raw[1:], env)
        return None if inner is None else not inner
    opening, closing = raw[0], raw[-1]
    if raw[0] not in TESTS:
        return {"true": True, "false": False}.get(raw[0]) if len(raw) == 1 else None
    raw = raw[1:-1]
    for joint, decide in (("||", any), ("-o", any), ("&&", all), ("-a", all)):
        if joint in raw:
            at = raw.index(joint)
            sides = [_test([opening, *part, closing], env) for part in (raw[:at], raw[at + 1 :])]
            return None if None in sides else decide(side is True for side in sides)
    if raw[:1] == ["!"]:
        return _test(["!", opening, *raw[1:], closing], env)
    # what is unset is empty here, as in the shell; what a command would print is not known
    double, words = opening == "[[", []
    for word in raw:
        found = [re.sub(f"{MARK}\\w+{MARK}", "", w) for w in expand(word, env, split=not double)]
        words += [" ".join(found)] if double else [w for w in found if w or word[:1] in "'\""]
    if any(MARK in word for word in words):
        return None
    match words:
        case [one]:
            return bool(one)
        case ["-z", one]:
            return not one
        case ["-n", one]:
            return bool(one)
        case [a, ("=" | "==" | "!=") as op, b]:
            same = fnmatchcase(a, b) if double and raw[2][:1] not in "'\"" else a == b
            return same == (op != "!=")
        case [a, op, b] if op in NUMERIC:
            if not double and not (a and b):
                return False  # bash complains, and goes on
            said = _arithmetic(f"{a or 0} {NUMERIC[op]} {b or 0}", env)
            return None if MARK in said else said != "0"
    # what is left bash asks the file system, or calls an error, which counts as no
    unary = len(words) == 2 and words[0][:1] == "-" and words[0] not in NUMERIC
    return None if double or unary or (len(words) == 3 and words[1][:1] == "-") else False


class Reader:
    """Goes through the statements in order and keeps the variables."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self.env: dict[str, str | list[str]] = dict(given)
        self.given = given
        self.found: list[tuple[list[str], int]] = []
        self.notes: list[str] = []
        self.branches: list[bool | None] = []  # of every open `if`: in the branch taken; None: in no branch any more
        self.until: list[str] = []  # words that end what is passed over
        self.before, self.holds = "", True  # the operator before a statement; whether what stands before it succeeded

    def read(self, script: list[Statement]) -> None:
        """Run through a script's statements."""
        condition: list[str] | None = None
        for statement in script:
            words = list(statement.words)
            if condition is None and self.before in ("&&", "||") and self.holds is not (self.before == "&&"):
                self.before = statement.end
                continue
            self.before, self.holds = statement.end, True
            while words:
                if condition is not None:  # between `if` and `then`
                    if words[0] == "then":
                        self._branch(condition, statement.line)
                        condition, words = None, words[1:]
                        continue
                    condition += [*words, *([statement.end] if statement.end in ("&&", "||") else [])]
                    break
                words, condition = self._word(words, statement.line)

    def _word(self, words: list[str], line: int) -> tuple[list[str], list[str] | None]:
        """Deal with the first word of a statement; what is left of it, and the beginning of a condition."""
        first, rest = words[0], words[1:]
        if self.until:
            if first in SKIPPED:
                self.until.append(SKIPPED[first])
            elif first in ("do", "{") and len(rest):
                return rest, None
            elif first == self.until[-1] or words[-1] == self.until[-1]:
                self.until.pop()
            return [], None
        if first in SKIPPED:
            self.until.append(SKIPPED[first])
        elif first == "function" or re.fullmatch(r"[\w-]+\(\)", first):
            self.until.append("}")
        elif first == "if":
            self.branches.append(False if all(b is True for b in self.branches) else None)
            return rest, []
        elif first == "elif" and self.branches:
            self.branches[-1] = None if self.branches[-1] is not False else False
            return rest, []
        elif first == "else" and self.branches:
            self.branches[-1] = True if self.branches[-1] is False else None
            return rest, None
        elif first == "fi" and self.branches:
            self.branches.pop()
        elif all(b is True for b in self.branches):
            self._simple(words, line)
        return [], None

    def _branch(self, condition: list[str], line: int) -> None:
        """Enter a branch if its condition holds and none before it did."""
        if self.branches[-1] is None:
            return
        said: bool | None = None
        parts: list[list[str]] = [[]]
        ops: list[str] = []
        for word in condition:
            if word in ("&&", "||") and parts[-1].count("[[") == parts[-1].count("]]"):
                ops.append(word)
                parts.append([])
            else:
                parts[-1].append(word)
        values = [_test(part, self.env) for part in parts if part]
        if None not in values:
            said = any(values) if "||" in ops else all(values)
        if said is None:
            self._doubt(condition, line, "neither branch was read")
            self.branches[-1] = None
        elif said:
            self.branches[-1] = True

    def _doubt(self, condition: list[str], line: int, so: str) -> None:
        self.notes.append(f"line {line}: only running would tell whether `{' '.join(condition)}`; {so}")

    def _simple(self, words: list[str], line: int) -> None:
        """An assignment, or a command that may be the training command."""
        while words and words[0] in PREFIXES:
            words = words[1:]
        while words and (match := ASSIGNMENT.fullmatch(words[0])):
            self._assign(*match.groups())
            words = words[1:]
        if words and (words[0] in (*TESTS, "!") or words[0].startswith("((")):
            said = _test(words, self.env)
            if said is None and self.before in ("&&", "||"):
                self._doubt(words, line, "what follows was not read")
            self.holds = said if said is not None else self.before == "||"
            return
        if not words or words[0] in ("echo", "printf", "{", "}", "set", "source", "cd", "mkdir"):
            return
        full = [w for raw in words for w in expand(raw, self.env)]
        for _ in range(3):  # eval, sh -c: once more through the shell
            at = next((n for n, w in enumerate(full[:-1]) if w == "-c" and full[n - 1].endswith("sh")), None)
            if full[:1] == ["eval"]:
                text = " ".join(full[1:])
            elif at is not None:
                text = full[at + 1]
            else:
                break
            again = statements(text)
            full = [w for raw in (again[0].words if again else ()) for w in expand(raw, self.env)]
        while full and ASSIGNMENT.fullmatch(full[0]):
            full = full[1:]
        full = without_redirections(full)
        at = script_at(full)
        if at is not None and any(w.startswith("--") for w in full[at + 1 :]) or full[:1] and full[0].startswith("--"):
            self.found.append((full, line))

    def _assign(self, name: str, plus: str, raw: str) -> None:
        if name in self.given:
            return
        before = self.env.get(name)
        if raw.startswith("("):
            items = [w for s in statements(raw[1:-1]) for r in s.words for w in expand(r, self.env)]
            self.env[name] = [*(before if isinstance(before, list) else []), *items] if plus else items
        else:
            value = " ".join(expand(raw, self.env, split=False))
            self.env[name] = f"{before}{value}" if plus and isinstance(before, str) else value


def script_at(words: list[str]) -> int | None:
    """Where the training program stands in a command, or None."""
    return next((n for n, w in enumerate(words) if PurePath(w).suffix == ".py"), None)


def without_redirections(words: list[str]) -> list[str]:
    """A command's words up to a pipe, without redirections of its output."""
    out: list[str] = []
    drop = False
    for word in words:
        match = re.match(r"(\d*|&)(>>?|<)&?", word)
        if drop or match:
            drop = bool(match) and match is not None and match.end() == len(word)
            continue
        out.append(word)
    return out


def read_script(text: str, given: Mapping[str, str], name: str = "the script") -> Script:
    """The training command of a launch script; `given` are variables that win over the script's own.

    Raises: ConfigError if nothing in it looks like Megatron's flags.
    """
    reader = Reader(given)
    reader.read(statements(text))
    found = reader.found
    if not found:
        lists = {
            k: v
            for k, v in reader.env.items()
            if k not in given and "--" in " ".join(v if isinstance(v, list) else [v])
        }
        words = [w for v in lists.values() for w in (" ".join(v) if isinstance(v, list) else v).split()]
        if not any(w.startswith("--") for w in words):
            raise ConfigError(
                f"{name} holds no flags of Megatron; give the launch script, the one with "
                "`torchrun ... pretrain_gpt.py --num-layers ...`, or the flags themselves behind --"
            )
        note = f"no line starts a training program; taken: {', '.join(lists)}"
        return Script(without_redirections(words), 1, [*reader.notes, note])
    command, line = max(found, key=lambda f: sum(w.startswith("--") for w in f[0]))
    others = [str(n) for words, n in found if words is not command]
    if others:
        reader.notes.append(f"commands in lines {', '.join(others)} were left unread: line {line} has the most flags")
    return Script(command, line, reader.notes)
