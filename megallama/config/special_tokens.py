"""Which tokens begin and end a document: what a tokenizer declares, else known names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megallama.config.errors import MegallamaError

NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
}
Lookup = Callable[[str], int | None]  # the id of a token, None where there is no such token


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON file of settings; {} without one. Raises: MegallamaError if it cannot be read."""
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise MegallamaError(f"{path} cannot be read ({error}); mend it, or move it away") from error


def usual_id(kind: str, lookup: Lookup) -> int | None:
    """The id of the first of `NAMES` that a tokenizer has."""
    return next((i for i in map(lookup, NAMES[kind]) if i is not None), None)


def special_id(kind: str, tokenizer: Path, lookup: Lookup, own: int | None = None) -> int | None:
    """A tokenizer's "bos" or "eos": by a file beside it, else its `own`, else the usual."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        name = read_settings(tokenizer.with_name(file)).get(f"{kind}_token")
        name = name.get("content") if isinstance(name, dict) else name
        if isinstance(name, str) and (declared := lookup(name)) is not None:
            return declared
    return usual_id(kind, lookup) if own is None else own


def merges_of(tokenizer: Path) -> Path | None:
    """The merges.txt of GPT-2's vocab.json; None for other kinds, which are one file."""
    name = tokenizer.name
    return tokenizer.with_name(name.removesuffix("vocab.json") + "merges.txt") if name.endswith("vocab.json") else None
