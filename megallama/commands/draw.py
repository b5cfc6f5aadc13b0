"""Draw a pipeline schedule: of a configuration, or by its name.

    megallama draw [CONFIG.toml] ranks=N [section.key=value ...] [OPTIONS]
    megallama draw --schedule zb-v --pp 4 --microbatches 8 [OPTIONS]

Prints a chart, the bubble and what every rank holds. Forward, input and weight gradient take 1 ms on each stage; of a
configuration, in proportion to their arithmetic. Exit status 2: schedule, configuration or a file is wrong.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from megallama.commands.parser import Parser
from megallama.config.errors import ConfigError, counted
from megallama.config.load import load
from megallama.config.schema import ParallelConfig
from megallama.plan import timeline
from megallama.plan.builders import FIXED_CHUNKS, build_schedule
from megallama.plan.plan import make_plan
from megallama.plan.schedule import Schedule, parse_action
from megallama.plan.timeline import Report, Span, StageCost, chrome_trace, draw, simulate
from megallama.plan.work import stage_costs

COLOURS = {  # of each kind of work: for the lower and the upper stages of a rank
    "F": ("#7aa6d8", "#3f6fa8"),
    **dict.fromkeys("BI", ("#7fc47f", "#3d8b4a")),
    "W": ("#e3b35c", "#b97f1e"),
}
NAMES = {"F": "forward", "B": "backward", "I": "gradient of the input", "W": "gradient of the weights"}
IDLE = "#eeeeee"
ROW, LABEL, WIDTH = 26, 58, 1400  # pixels


def named(name: str, pp: int | None, microbatches: int | None, chunks: int | None) -> Schedule:
    """A schedule without a configuration. Raises: ConfigError, ScheduleError."""
    if pp is None or microbatches is None or pp < 1 or microbatches < 1:
        raise ConfigError("--schedule needs sizes; write for example --schedule zb-v --pp 4 --microbatches 8")
    own = name.endswith(".csv")
    if own:
        text = Path(name).read_text(encoding="utf-8") if Path(name).exists() else ""
        stages = [int(s) for s in re.findall(r"[FBIW](\d+)\.\d+", text)]
        chunks = chunks or max(1, (max(stages, default=0) + 1) // pp)
    known = ParallelConfig.model_fields["schedule"].annotation.__args__  # type: ignore[union-attr]
    if not own and name not in known:
        raise ConfigError(f"--schedule {name} is unknown; write {', '.join(known[:-1])} or a file that ends in .csv")
    chunks = chunks or FIXED_CHUNKS.get(name, (1, None))[0]
    kind: Any = "csv" if own else name
    parallel = ParallelConfig(pp=pp, chunks=chunks, schedule=kind, schedule_file=name if own else None)
    return build_schedule(parallel, microbatches)


def measured(file: Path, num_stages: int) -> tuple[list[StageCost], dict[str, list[Span]]]:
    """Median times of each stage [ms], without waits, and timelines, in a trace. Raises: ConfigError."""
    spans, times = defaultdict[str, list[Span]](list), defaultdict[tuple[str, int], list[float]](list)
    other = ("waits", timeline.COMMUNICATION, timeline.BLOCKED)
    try:
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
        titles = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
        waits = {(e["pid"], e["tid"], e["ts"]): e["dur"] for e in events if e["name"] == "waits"}
        for e in (e for e in events if e["ph"] == "X" and e["cat"] not in other):
            waited = waits.get((e["pid"], e["tid"], e["ts"]), 0.0)
            start, end = e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6
            spans[titles[e["pid"]]].append(Span(e["tid"], e["name"], start, start + waited / 1e6, end))
            if e["cat"] in ("F", "B", "I", "W"):
                times[e["cat"], parse_action(e["name"]).stage].append((e["dur"] - waited) / 1e3)
        if not times:
            raise ValueError("it has no actions of a pipeline")
    except (OSError, ValueError, KeyError, TypeError) as error:  # traces of other programs have other events
        raise ConfigError(f"--like {file} is no trace of a run: {error}; log.trace_steps=[2,3] writes them") from None
    mean = {key: median(values) for key, values in times.items()}
    if max(stage for _, stage in mean) != num_stages - 1:
        raise ConfigError(f"--like {file} is the trace of another number of stages than {num_stages}")
    halves = enumerate(mean.get(("B", stage), 0.0) / 2 for stage in range(num_stages))
    costs = [StageCost(mean["F", s], mean.get(("I", s), half), mean.get(("W", s), half)) for s, half in halves]
    return costs, dict(spans)


def simulated(report: Report, unit: float) -> list[Span]:
    """The spans of a simulation, rank by rank; `unit` is one unit of its costs [s]."""
    spans = [Span(e.rank, str(e.action), e.start * unit, e.start * unit, e.end * unit) for e in report.events]
    return sorted(spans, key=lambda span: (span.rank, span.start))


def boxes(schedule: Schedule, report: Report) -> Iterator[tuple[int, float, float, str, str]]:
    """(rank, start, length, colour, label) of every action."""
    for e in report.events:
        upper = e.action.stage >= schedule.num_stages / 2 and len(schedule.stages_of(e.rank)) > 1
        yield e.rank, e.start, e.end - e.start, COLOURS[e.action.kind][upper], str(e.action.microbatch)


def caption(schedule: Schedule, report: Report) -> str:
    """One line about the whole."""
    ranks, stages = counted(schedule.num_ranks, "rank"), counted(schedule.num_stages, "stage")
    batches = counted(schedule.num_microbatches, "micro-batch")
    return f"{schedule.name}: {ranks}, {stages}, {batches}; {report.makespan:.4g} ms, idle {report.bubble:.2%}"


def legend(schedule: Schedule, report: Report) -> list[tuple[tuple[str, ...], str]]:
    """(colours, meaning) of everything in the picture."""
    kinds = {event.action.kind.value for event in report.events}
    shades = 2 if any(len(schedule.stages_of(rank)) > 1 for rank in range(schedule.num_ranks)) else 1
    dark = " (dark: upper stages)" if shades > 1 else ""
    return [(COLOURS[k][:shades], f"{text}{dark}") for k, text in NAMES.items() if k in kinds] + [((IDLE,), "idle")]


def svg(schedule: Schedule, report: Report) -> str:
    """The chart as an SVG document."""
    scale, height = (WIDTH - LABEL - 10) / report.makespan, ROW * (schedule.num_ranks + 2)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif">']

    def rect(x: float, y: float, width: float, tall: int, colour: str, more: str = "") -> None:
        out.append(f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{tall}" fill="{colour}"{more}/>')

    def text(x: float, y: float, size: int, words: str, more: str = "") -> None:
        out.append(f'<text x="{x:.2f}" y="{y}" font-size="{size}"{more}>{words}</text>')

    rect(0, 0, WIDTH, height, "white")
    text(4, 17, 13, caption(schedule, report))
    for rank in range(schedule.num_ranks):
        text(4, ROW * (rank + 1) + 17, 12, f"rank {rank}")
        rect(LABEL, ROW * (rank + 1), report.makespan * scale, ROW - 2, IDLE)
    for rank, start, length, colour, label in boxes(schedule, report):
        x, y, w = LABEL + start * scale, ROW * (rank + 1), length * scale
        rect(x, y, w, ROW - 2, colour, ' stroke="white" stroke-width="0.5"')
        if w > 6 * len(label) + 1:
            text(x + w / 2, y + 16, 10, label, ' text-anchor="middle" fill="white"')
    y = ROW * (schedule.num_ranks + 1)
    for i, (colours, words) in enumerate([*legend(schedule, report), ((), "numbers: micro-batches")]):
        x = LABEL + 265 * i
        for k, colour in enumerate(colours):
            rect(x + 14 * k, y + 6, 12, 12, colour)
        text(x + 14 * len(colours) + 4, y + 16, 11, words)
    return "\n".join([*out, "</svg>"]) + "\n"


def png(schedule: Schedule, report: Report, file: Path) -> None:
    """The chart as a PNG. Raises: ConfigError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ConfigError("--png needs matplotlib; pip install matplotlib, or use --svg, which needs nothing") from None
    figure = Figure(figsize=(14, 1.3 + 0.32 * schedule.num_ranks), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    for rank, start, length, colour, label in boxes(schedule, report):
        axes.broken_barh([(start, length)], (rank - 0.45, 0.9), facecolors=colour, edgecolor="white", linewidth=0.4)
        if length / report.makespan > 0.007 * len(label):
            axes.text(start + length / 2, rank, label, ha="center", va="center", fontsize=7, color="white")
    axes.set(ylim=(schedule.num_ranks - 0.5, -0.5), xlim=(0, report.makespan))
    axes.set(xlabel="ms", title=caption(schedule, report))
    axes.set_yticks(range(schedule.num_ranks), [f"rank {r}" for r in range(schedule.num_ranks)])
    axes.set_facecolor(IDLE)
    handles = [Patch(facecolor=colours[0], label=text) for colours, text in legend(schedule, report)]
    handles.append(Patch(facecolor="none", label="numbers: micro-batches"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


def table(schedule: Schedule, report: Report) -> str:
    """What every rank does and holds."""
    lines = ["rank  stages            busy ms  idle    in flight  received"]
    for rank, busy in enumerate(report.busy):
        stages = ",".join(map(str, schedule.stages_of(rank)))
        idle = f"{1 - busy / report.makespan:.1%}"
        held = f"{report.peak_in_flight[rank]:>9}  {schedule.peak_received(rank):>8}"
        lines.append(f"{rank:>4}  {stages:<16}  {busy:>7.4g}  {idle:<6}  {held}")
    spread = report.longest_span / max(report.busy) - 1
    longest = f"{report.longest_span:.4g} ms, {spread:.2%} above its work"
    lines.append(f"longest rank from its first action to its last: {longest}")
    return "\n".join([*lines, "in flight: (stage, micro-batch) pairs held for a backward at once"])


def run(argv: Sequence[str]) -> None:
    """Print the chart, write the pictures. Raises: MegallamaError."""
    parser = Parser("draw", __doc__, config=True, named=["ranks"])
    parser.add_argument("--schedule", metavar="NAME", help="a schedule without a configuration, also a .csv file")
    parser.add_argument("--pp", type=int, metavar="P", help="its pipeline ranks")
    parser.add_argument("--microbatches", type=int, metavar="M", help="its micro-batches")
    parser.add_argument("--chunks", type=int, metavar="V", help="its chunks per rank (default: what it needs)")
    times = "ms of forward, input gradient and weight gradient of a micro-batch on every stage"
    parser.add_argument("--costs", metavar="F,I,W", help=times)
    parser.add_argument("--hop", type=float, default=0.0, metavar="T", help="ms until another rank has a value (0)")
    like = "take the costs from the trace of a real run (log.trace_steps), and put both into --trace"
    parser.add_argument("--like", type=Path, metavar="TRACE.json", help=like)
    parser.add_argument("--width", type=int, default=120, metavar="N", help="columns of the chart (120)")
    for name, what in (("svg", "picture"), ("png", "picture"), ("trace", "trace for ui.perfetto.dev")):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write a {what}")
    args = parser.read(argv)
    if args.schedule:
        schedule = named(args.schedule, args.pp, args.microbatches, args.chunks)
        costs = [StageCost()] * schedule.num_stages
    else:
        file, ranks, overrides = parser.run_of(args, "a drawing without --schedule")
        plan = make_plan(load(file, overrides, ranks=ranks, need_data=False), ranks)
        found = stage_costs(plan.config, plan.stages)
        unit = sum(c.forward for c in found) / len(found)  # the mean forward takes 1 ms
        schedule, costs = plan.schedule, [StageCost(*(x / unit for x in c)) for c in found]
    costs, real = measured(args.like, schedule.num_stages) if args.like else (costs, {})
    if args.costs:
        try:
            f, i, w = map(float, args.costs.split(","))
            if min(f, i, w) <= 0:
                raise ValueError
        except ValueError:
            wrong = f"--costs {args.costs} are not three times above 0"
            raise ConfigError(f"{wrong}; write for example --costs 1,1,0.7") from None
        costs = [StageCost(f, i, w)] * schedule.num_stages
    report = simulate(schedule, costs, args.hop)
    print(f"{caption(schedule, report)}\n{draw(report, args.width)}\n{timeline.LEGEND}\n\n{table(schedule, report)}")
    if args.svg:
        args.svg.write_text(svg(schedule, report), encoding="utf-8")
    if args.png:
        png(schedule, report, args.png)
    if args.trace:
        timelines = {f"simulated {schedule.name}": simulated(report, 1e-3), **real}
        args.trace.write_text(chrome_trace(timelines), encoding="utf-8")
