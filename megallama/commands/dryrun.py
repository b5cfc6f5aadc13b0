"""Can this job hang?  `megallama dryrun [CONFIG.toml] ranks=N [section.key=value ...]`.

Builds every distinct rank of the job on this CPU, without memory for weights, executes what a few steps communicate,
and proves over all ranks that it fits together: every collective has all its members in one order with the same
shapes and formats, every send its receive, and no rank waits for ever.
Exit status 0 if so, 1 with the first disagreement, 2 if the configuration has errors; all of them are printed.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence

from megallama.analysis.communication import behind
from megallama.commands.parser import Parser
from megallama.config.errors import counted
from megallama.config.load import load
from megallama.plan.plan import make_plan


def run(argv: Sequence[str]) -> int:
    """Print the report; 0, or 1 with the disagreement on stderr. Raises: MegallamaError."""
    parser = Parser("dryrun", __doc__, config=True, named=["ranks"])
    file, ranks, overrides = parser.run_of(parser.read(argv), "a dry run")
    plan = make_plan(load(file, overrides, ranks=ranks, need_data=False, begun=behind), ranks)
    from megallama.analysis.agreement import Disagreement
    from megallama.analysis.dryrun import dry_run

    started = time.perf_counter()
    try:
        done = [dry_run(own) for own in plan.phases(behind(plan.config)[2])][-1]
    except Disagreement as error:
        print(f"this job can hang: {error}", file=sys.stderr)
        return 1
    print(f"ranks     {plan.topology}: {len(set(done.programs))} distinct")
    print(f"executed  {', '.join(done.phases)}" + ", in every phase" * bool(plan.config.train.phases))
    number, waits = sum(len(p.calls) for p in done.programs), sum(len(p.waits) for p in done.programs)
    print(f"proved    over the {counted(number, 'call', ',')} and {counted(waits, 'wait', ',')} of all ranks:")
    print("          every collective has all its members in one order, every send its receive,")
    held, overlap = ", even if every collective held its rank", " (collectives of several groups overlap)"
    print(f"          and no rank waits for ever{held if done.blocking else overlap}")
    step = next(phase for phase in reversed(done.phases) if phase.startswith("step"))
    print(f"in {step}, all ranks together, bytes of whole tensors:")
    count, size = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for program, members in Counter(done.programs).items():
        for call in program.calls:
            if call.label.endswith(step):
                count[call.group, call.op] += members
                size[call.group, call.op] += members * call.nbytes
    if not count:
        print("  nothing: one rank has nobody to talk to")
    for group, op in sorted(count):
        calls = counted(count[group, op], "call", ",")
        print(f"  {group:>9}  {op:<14}  {calls:>18}  {size[group, op] / 1e9:>16,.6f} GB")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"took      {time.perf_counter() - started:.1f} s, {peak:.2f} GiB at most")
    return 0
