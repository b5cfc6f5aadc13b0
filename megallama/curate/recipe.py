"""The recipe of a corpus: its sources, the stages of each, and the stages that all go through together."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from megallama.config.describe import literal
from megallama.config.errors import ConfigError, DataError
from megallama.config.load import read_toml
from megallama.config.schema import Section, option
from megallama.curate.contamination import Contamination
from megallama.curate.duplicates import Files, NearDuplicates, Paragraphs
from megallama.curate.latex import Macros
from megallama.curate.models import Perplexity, Reference
from megallama.curate.rules import Code, Filter, Language, Licence, Replace
from megallama.curate.stage import Stage

Stages = Annotated[
    Filter | Replace | Code | Licence | Language | Macros | Contamination
    | Paragraphs | Files | NearDuplicates | Perplexity | Reference,
    Field(discriminator="kind"),
]  # fmt: skip
KINDS: dict[str, type[Stage]] = {
    str(kind.model_fields["kind"].annotation.__args__[0]): kind for kind in Stages.__args__[0].__args__
}


class Source(Section):
    """One source of the corpus: its files and what is done to them."""

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="folder of its shards; small letters, digits, _")
    inputs: tuple[str, ...] = Field(min_length=1, description="files, folders or patterns, in their order")
    keys: tuple[str, ...] = option((), "keys of JSON lines that stages need, or that become the id: id, license")
    share: float = option(0.0, "share of the mixture, for the report's epochs", ge=0)
    largest: int = option(0, "only so many of the largest files; 0: all [files]", ge=0)
    stages: tuple[Stages, ...] = option((), "what its documents go through, in this order")


class Recipe(Section):
    """A recipe: sources first, then what goes over all of them."""

    include: tuple[str, ...] = option((), "recipes beside this, whose sources come behind its own")
    sources: tuple[Source, ...] = Field(min_length=1, description="the sources")
    stages: tuple[Stages, ...] = option((), "stages of all sources together")
    seed: int = option(0, "which documents are shown in the report")
    unit_mb: float = option(64.0, "input of a unit of work, which becomes a shard [MB]", ge=1e-6, le=1e6)
    max_document_mb: float = option(16.0, "longer documents are counted and left out [MB]", ge=1e-6, le=1e6)
    tokenizer: str = option("", "a tokenizer's file, which counts the tokens that stay")
    bytes_per_token: float = option(4.0, "estimates tokens without a tokenizer", gt=0)
    run_tokens: float = option(1.4e12, "length of the run whose epochs the report tells [tokens]", gt=0)


def load_recipe(file: Path, included: bool = False) -> Recipe:
    """Read a recipe. Raises: ConfigError with everything that is wrong with it."""
    tree = read_toml(file, "the recipe")
    if included and (other := sorted({*tree} - {"sources"})):
        only = "of a recipe that is included only sources can be used"
        raise ConfigError(f"{file} has {', '.join(other)}; {only}")
    if isinstance(names := tree.get("include"), list):
        for name in names:
            others = load_recipe(file.parent / str(name), included=True).sources
            tree["sources"] = [*tree.get("sources", []), *others]
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        told = [e for e in error.errors(include_url=False) if e["type"] != "too_short" or not e["input"]]  # else why
        found = [f"{file}: {_problem(e)}" for e in told]
        many = "\n".join([f"{len(found)} problems in the recipe:", *(f"  - {line}" for line in found)])
        raise ConfigError(found[0] if len(found) == 1 else many) from None
    names = ["work", *(source.name for source in recipe.sources)]  # the folder of what is unfinished
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{file}: two sources are called {', '.join(twice)}; each needs a name of its own, not work")
    return recipe


def _problem(error: Any) -> str:
    """One of pydantic's errors, with where it stands and what may be written."""
    path, owner = "", list[type[Section]]([Recipe])
    for part in error["loc"]:
        path += f"[{part}]" if isinstance(part, int) else "" if part in KINDS else f".{part}" if path else part
        owner += [KINDS[part]] if part in KINDS else [Source] if path == f"sources[{part}]" else []
    name = path.rpartition(".")[2]
    known = [*(KINDS if error["type"] == "union_tag_invalid" else owner[-1].model_fields)]
    value = error["ctx"]["tag"].strip("'") if error["type"] == "union_tag_invalid" else name
    near = difflib.get_close_matches(str(value), known, 1)
    hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
    if error["type"] == "union_tag_invalid":
        return f"{path}.kind={literal(value)} is no stage{hint}"
    if error["type"] == "union_tag_not_found":
        return f'{path} has no kind; write kind = "filter" or another of {", ".join(KINDS)}'
    if error["type"] == "extra_forbidden":
        return f"{path} is not known{hint}"
    if error["type"] == "missing":
        return f"{path} is missing: {owner[-1].model_fields[name].description}"
    about = owner[-1].model_fields[name].description if name in owner[-1].model_fields else ""
    return f"{path}={error['input']!r}: {error['msg']}{about and f' ({about})'}"


def train(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Train the models of all stages. Raises: DataError."""
    for stage in dict.fromkeys([*(s for source in recipe.sources for s in source.stages), *recipe.stages]):
        if getattr(stage, "model", "-") == "":
            raise DataError(f"{stage.kind}.model is not set; name where its model goes")
        stage.train(say)
