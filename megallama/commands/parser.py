"""The one parser of all commands: options, settings, `ranks=N` as well as `--ranks N`, and `--help SECTION`.

What knows the settings is imported where it is used: commands that read text start without it.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megallama.config.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """The command line of `megallama COMMAND`; what is wrong with it is a ConfigError that ends with the usage.

    config: it takes a configuration, `[CONFIG.toml] [section.key=value ...]`, as `words`; `--help SECTION` explains it.
    named: options that may be written NAME=VALUE too, as settings are; each is a list of what was given.
    """

    def __init__(self, command: str, about: str | None, *, config: bool = False, named: Sequence[str] = ()) -> None:
        super().__init__(
            prog=f"megallama {command}",
            description=(about or "").strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
            allow_abbrev=False,  # what is written today must mean the same when another option is added
        )
        self._named, self._config = named, config
        helped: dict[str, Any] = {"nargs": "?", "metavar": "SECTION"} if config else {"nargs": 0}
        what = "this text; with a section or a setting: what may be set there" if config else "this text"
        self.add_argument("-h", "--help", action=_Help, dest=argparse.SUPPRESS, help=what, **helped)
        if config:
            words = "[CONFIG.toml] [section.key=value ...]"
            self.usage = f"%(prog)s {words.replace(' ', ' ranks=N ', 1) if 'ranks' in named else words} [OPTIONS]"
            self.add_argument("words", nargs="*", metavar=words, help="a configuration; the words win over the file")
        if "ranks" in named:
            self.add_argument("--ranks", action="append", metavar="N", help="the number of ranks; also ranks=N")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments, options and words in any order. Raises: ConfigError."""
        known = rf"^(?:--)?(?=(?:{'|'.join(self._named)})=)" if self._named else "^(?!)"
        words = [re.sub(known, "--", word) for word in argv]
        if not self._config:
            return self.parse_args(words)
        return self.parse_intermixed_args([re.sub(r"^--(?=[\w-]+\.[^=]*=)", "", word) for word in words])

    def run_of(self, args: argparse.Namespace, what: str) -> tuple[Path | None, int, list[str]]:
        """File, ranks and settings of a run looked at before it starts. Raises: ConfigError about `what`."""
        file, overrides = self.config_of(args)
        given = args.ranks or []
        if len(given) != 1 or not re.fullmatch("0*[1-9][0-9]{0,8}", given[0]):
            but = f", not {' '.join(f'ranks={count:.40}' for count in given)}" if given else ""
            self.error(f"{what} needs one number of ranks{but}; write for example ranks=8")
        return file, int(given[0]), overrides

    def config_of(self, args: argparse.Namespace) -> tuple[Path | None, list[str]]:
        """File and settings of a configuration. Raises: ConfigError where there are two files."""
        from megallama.config.load import is_setting

        files = [word for word in args.words if not is_setting(word)]
        if len(files) > 1:
            self.error(f"two configuration files, {files[0]} and {files[1]}; give one")
        return Path(files[0]) if files else None, [word for word in args.words if word not in files]

    def error(self, message: str) -> NoReturn:
        """Raises: ConfigError."""
        wrong = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(wrong[1], self._option_string_actions, 1) if wrong else []
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{message}{hint}\n{self.format_usage().strip()}")


class _Help(argparse.Action):
    """Print the help, or what may be set in a section."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        name = values if isinstance(values, str) and "=" not in values and not values.endswith(".toml") else ""
        parser._print_message(explain(name) if name else parser.format_help(), sys.stdout)
        parser.exit()


def filled(text: str) -> str:
    """The type of an option that names something."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a file or a folder")
    return text


def size(text: str) -> float:
    """The type of an option in MB or GB."""
    if not 0 < (value := float(text)) <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no size; write a number above 0 and at most 1,000,000")
    return value


def section_table() -> str:
    """The sections of the configuration, a line each."""
    from megallama.config.describe import sections

    return "\n".join(f"  {name:<12}{_first(about)}" for name, about in sections().items())


def explain(name: str) -> str:
    """The settings of a section, or one: type, default, unit, meaning. Raises: ConfigError if there is none."""
    from megallama.config.describe import literal, sections, settings

    name = name.strip("[]").replace("-", "_")
    found = [s for s in settings() if s.key == name or s.key.startswith(f"{name}.")]
    if not found:
        near = difflib.get_close_matches(name, [*sections(), *(s.key for s in settings())], 1)
        hint = f"did you mean {near[0]}? Sections are" if near else "sections are"
        raise ConfigError(f"there is no section and no setting {name!r}; {hint} {', '.join(sections())}")
    out = [f"[{name}] {_first(sections()[name])}", ""] if name in sections() else []
    fill = textwrap.TextWrapper(100, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False).fill
    for setting in found:
        unit = f" [{setting.unit}]" if setting.unit else ""
        default = "" if setting.default is None else f"; default {literal(setting.default)}"
        out += [f"{setting.key} = {setting.type}{unit}{default}", fill(setting.meaning)]
    return "\n".join(out) + "\n"


def _first(about: str) -> str:
    return about.strip().split("\n\n")[0].replace("\n", " ")
