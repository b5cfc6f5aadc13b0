"""The report: what each rule took and why, documents to read, distributions; as HTML in one file, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megallama.curate.stage import UTF8

if TYPE_CHECKING:
    from megallama.curate.recipe import Recipe

NONE = {"documents": 0, "bytes": 0}
STYLE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Curation</title><style>
body{font:15px/1.4 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse}td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}.two{display:grid;grid-template-columns:1fr 1fr;gap:1em}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:.6em;font-size:12px}
.raw{fill:#bbb}.kept{fill:#2a7}</style>"""


def write_report(recipe: Recipe, tree: dict[str, Any], folder: Path, publish: Callable[..., None]) -> None:
    """Write report.json and report.html of the counts of all units."""
    shares = sum(source.share for source in recipe.sources)
    for source in recipe.sources:
        rows = [row for name, row in sorted(tree["stages"].items()) if name.startswith(f"{source.name} ")]
        raw, kept = (rows[i].get("out", NONE) if rows else NONE for i in (0, -1))
        counted = tree["tokens"].get(source.name, 0)
        per_token = kept["bytes"] / counted if counted else recipe.bytes_per_token
        wanted, there = recipe.run_tokens * source.share / (shares or 1), kept["bytes"] / per_token
        row = {"raw": raw, "kept": kept, "share": source.share, "bytes_per_token": per_token}
        row |= {"tokens": round(there), "epochs": round(wanted / max(there, 1), 4)}
        tree.setdefault("sources", {})[source.name] = row
    text = json.dumps(tree, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    publish(folder / "report.json", lambda path: path.write_text(text, *UTF8))
    page = "\n".join([STYLE, *_page(recipe, tree)])
    publish(folder / "report.html", lambda path: path.write_text(page, *UTF8))


def _table(head: str, rows: list[list[Any]]) -> str:
    cells = [[escape(f"{v:,}" if isinstance(v, (int, float)) else str(v)) for v in row] for row in rows]
    lines = [f"<tr><th>{head.replace('|', '<th>')}", *("<tr><td>" + "<td>".join(row) for row in cells)]
    return f"<table>{''.join(lines)}</table>"


def _page(recipe: Recipe, tree: dict[str, Any]) -> Iterator[str]:
    how = f"an estimate: bytes / {recipe.bytes_per_token:g}; a <code>tokenizer</code> counts them"
    if recipe.tokenizer:
        how = f"counted by {escape(recipe.tokenizer)}; those before are an estimate by their mean size"
    yield f"<h1>What became of the documents</h1><p>Tokens kept are {how}."
    rows = []
    for name, row in tree["sources"].items():
        both = [row[side][what] for what in NONE for side in ("raw", "kept")]
        tokens = round(row["raw"]["bytes"] / row["bytes_per_token"]), row["tokens"]
        rows.append([name, *both, *tokens, row["share"], row["epochs"]])
    head = "source|documents read|kept|bytes read|kept|tokens read|kept|share of the mixture|"
    yield _table(f"{head}epochs in {recipe.run_tokens:,.0f} tokens", rows)
    for source in recipe.sources:
        yield f"<h2>{source.name}</h2>"
        rows_of = {n: row for n, row in sorted(tree["stages"].items()) if n.startswith(f"{source.name} ")}
        yield from _stages(rows_of, tree["sources"][source.name]["bytes_per_token"])
        yield from _examples(source.name, tree["samples"])
    yield "<h2>Distributions</h2><p>Grey: read. Green: kept."
    for name, counts in sorted(tree["histograms"].items()):
        yield f"<h3>{escape(name)}</h3>{_bars(counts)}"
    rows = [[file, why, count] for file, faults in sorted(tree["bad"].items()) for why, count in sorted(faults.items())]
    yield f"<h2>What was not read, by file</h2>{_table('file|why|records', rows)}"


def _stages(stages: dict[str, dict[str, Any]], per_token: float) -> Iterator[str]:
    """The funnel of a source, as a picture and in numbers, and the reasons for which documents went."""
    rows, reasons, bars = list[list[Any]](), list[list[Any]](), list[str]()
    for name, row in stages.items():
        out, into = row.get("out", NONE), row.get("in", row.get("out", NONE))
        sizes = [side[what] for what in NONE for side in (into, out)]
        done = row.get("changed", NONE)["documents"]
        rows.append([name, *sizes, *(round(side["bytes"] / per_token) for side in (into, out)), done])
        reasons += [[name, why, *count.values()] for why, count in sorted(row.get("reasons", {}).items())]
        left = out["bytes"] / max(rows[0][4], 1)
        box = f"<rect class=kept y={20 * len(bars)} width={700 * left:.0f} height=17 opacity=.5 />"
        bars.append(f"{box}<text x=4 y={20 * len(bars) + 13} font-size=12>{escape(name)}: {left:.1%}</text>")
    yield f"<svg width=720 height={20 * len(bars)}>{''.join(bars)}</svg>"
    yield _table("stage|documents in|out|bytes in|out|tokens in|out|documents changed", rows)
    yield _table("stage|reason|bytes dropped|documents dropped", reasons)


def _examples(source: str, samples: dict[str, list[Any]]) -> Iterator[str]:
    """Documents that went beside documents that stayed, those that changed before and after."""
    kept = samples.get(f"{source}: kept", [])
    for kind in sorted(kind for kind in samples if kind.startswith(f"{source} ")):
        yield f"<h3>{escape(kind)}</h3>"
        for number, (_, name, text, after, scores) in enumerate(samples[kind]):
            other = after or (kept[number][2] if number < len(kept) else "")
            right = f"<pre>{escape(other)}</pre>" if other else "<div></div>"
            yield f"{escape(name)} {escape(scores)}<div class=two><pre>{escape(text)}</pre>{right}</div>"


def _bars(counts: dict[str, dict[str, int]]) -> str:
    """A distribution: for each value how many were read, and over it how many were kept."""
    try:
        values = sorted(counts, key=float)
    except ValueError:
        values = sorted(counts, key=lambda value: (-max(counts[value].values()), value))[:30]
    most, out = max(max(count.values()) for count in counts.values()), list[str]()
    for x, value in enumerate(values):
        for kind, wide in (("raw", 30), ("kept", 20)):
            count = counts[value].get(kind, 0)
            tip = f"<title>{escape(value)}: {count:,} {kind}</title>"
            out.append(f"<rect class={kind} x={36 * x} y={120 - 120 * count / most:.1f} width={wide} "
                       f"height={120 * count / most:.1f}>{tip}</rect>")  # fmt: skip
        out.append(f"<text x={36 * x} y=134 font-size=9>{escape(value)}</text>")
    return f"<svg width={36 * len(values)} height=140>{''.join(out)}</svg>"
