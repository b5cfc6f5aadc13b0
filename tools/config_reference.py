"""Writes docs/configuration.md, the reference of every setting, from the schema."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megallama.commands.exit import exit_status  # noqa: E402
from megallama.config.describe import Setting, literal, sections, settings  # noqa: E402
from megallama.config.presets import PRESETS, preset_seq_length  # noqa: E402
from megallama.config.schema import MixtureChange, ModelConfig, PhaseConfig, SourceConfig  # noqa: E402
from megallama.plan.params import num_parameters  # noqa: E402

TARGET = ROOT / "docs" / "configuration.md"

HEAD = ("| key | type | default | unit | meaning |", "|---|---|---|---|---|")
INTRODUCTION = """\
# Configuration

<!-- Written by tools/config_reference.py from megallama/config; do not edit by hand. -->

A run is described by a TOML file, by `section.key=value` on the command line, or by both; later words win:

```
python -m megallama.pretrain run.toml parallel.tp=4 --train.steps=500 data.train=corpus/train
```

Values come from the defaults below, then the preset (`model.preset`), the file, and the command line. A leading
`--` and `-` instead of `_` are accepted. `none` unsets a setting that may be unset. `data.train`, `data.valid` and
`data.test` take a path, a list of paths, or tables: `train = [{path = "a", weight = 0.7}, {path = "b", weight = 0.3}]`,
and `data.mixture_schedule` tables such as `mixture_schedule = [{step = 5000, weights = {a = 0.5}}]`. Everything is
checked before anything starts, and all errors are reported at once. `megallama plan run.toml ranks=8` shows what
a configuration leads to, `megallama plan --data run.toml` what it takes from each source.
"""

PRESET_NOTE = """\
## Presets

`model.preset = "llama-7b"` fills in the sizes; keys of `[model]` that are given besides win. `batch.seq_length`
defaults to the preset's. LLaMA 3.1 scales the rotary frequencies by 8, LLaMA 3.2 by 32 (`model.rope_scaling`).
"""


def reference() -> str:
    """The whole document."""
    parts = [INTRODUCTION]
    for section, about in sections().items():
        inside = (s for s in settings() if s.key.startswith(section + "."))
        parts.append(_table(f"## [{section}]", inside, about.strip().split("\n\n")[0], ""))
        if section == "data":  # with the tables in its lists
            parts.append(_table("### Tables in `data.train`, `data.valid` and `data.test`", settings(SourceConfig)))
            parts.append(_table("### Tables in `data.mixture_schedule`", settings(MixtureChange)))
        if section == "train":
            parts.append(_table("### Tables in `train.phases`", settings(PhaseConfig)))
    return "\n".join([*parts, PRESET_NOTE, _presets()])


def _table(title: str, rows: Iterable[Setting], *about: str) -> str:
    return "\n".join([title, "", *about, *HEAD, *map(_row, rows)]) + "\n"


def _row(setting: Setting) -> str:
    default = "" if setting.default is None else f"`{literal(setting.default)}`"
    kind = setting.type.replace("|", "\\|")
    meaning = setting.meaning.replace("|", "\\|")
    return f"| `{setting.key}` | {kind} | {default} | {setting.unit} | {meaning} |"


def _presets() -> str:
    columns = ["preset", "parameters", "layers", "hidden", "heads", "kv heads", "ffn", "vocabulary", "seq_length"]
    columns += ["norm_eps", "rope_theta", "tied"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, row in PRESETS.items():
        m = ModelConfig(**row)
        cells = [f"`{name}`", f"{num_parameters(m):,}", m.num_layers, m.hidden_size, m.num_heads]
        cells += [m.num_kv_heads or m.num_heads, m.ffn_hidden_size, m.vocab_size, preset_seq_length(name)]
        cells += [m.norm_eps, m.rope_theta, "yes" if m.tie_embeddings else "no"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def run() -> None:
    """Write the document."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    TARGET.write_text(reference(), encoding="utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    sys.exit(exit_status(run))
