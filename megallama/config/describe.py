"""The settings as a table, off the schema: name, type in words, default, unit, meaning."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel

from megallama.config.schema import Config, SourceConfig


@dataclass(frozen=True)
class Setting:
    """One field of the schema."""

    key: str  # dotted
    type: str  # in words
    kinds: tuple[Any, ...]  # the types it accepts, without None
    optional: bool
    default: Any
    unit: str
    meaning: str


def settings(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[Setting]:
    """Every setting, in the schema's order; a nested table comes before its fields."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        said = [kind for kind in members if kind is not NoneType]
        kinds = tuple(get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in said)
        tables = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if annotation not in tables:  # else a section
            meaning, _, unit = (field.description or "").partition(" [")
            words = " or ".join(_words(kind, tuple(field.metadata)) for kind in said)
            default = None if field.is_required() else field.get_default()
            yield Setting(prefix + name, words, kinds, NoneType in members, default, unit.rstrip("]"), meaning)
        for table in tables:
            yield from settings(table, f"{prefix}{name}.")


def sections() -> Mapping[str, str]:
    """Section name -> what it is about."""
    return {name: (field.annotation.__doc__ or "") for name, field in Config.model_fields.items() if field.annotation}


def literal(value: Any) -> str:
    """A value as one would write it in TOML; None is written "none"."""
    if value is None:
        return '"none"'
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, Mapping):
        names = {k: k if re.fullmatch("[A-Za-z0-9_-]+", k) else literal(k) for k in value}
        return "{" + ", ".join(f"{names[k]} = {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")


def _words(kind: Any, limits: tuple[Any, ...]) -> str:
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        limits += tuple(more)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(literal, get_args(kind)))
    if get_origin(kind) is dict:
        return f"a table with {_words(get_args(kind)[1], ())} under each name".replace("a number", "numbers")
    if get_origin(kind) is tuple:
        inner, *rest = get_args(kind)
        if inner is SourceConfig:
            return f"a path, or a list of paths or of tables with {', '.join(inner.model_fields)}"
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            return f"a list of tables with {', '.join(inner.model_fields)}"
        if rest != [...]:
            return f"a list of {1 + len(rest)} numbers"
        return "a list of " + _words(inner, ()).replace("a whole number", "whole numbers")
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a table with {', '.join(kind.model_fields)}"
    words = [{bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]]
    for bound, text in {Gt: "above", Ge: "of at least", Lt: "below", Le: "up to"}.items():
        words += [f"{text} {getattr(m, bound.__name__.lower())}" for m in limits if isinstance(m, bound)]
    return " ".join(words)
