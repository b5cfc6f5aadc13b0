"""Every buffer of a training run is written and read in an order that streams, events and waits enforce."""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megallama.checkpoint.manager import CheckpointManager
from megallama.checkpoint.memory import MemoryCopies
from megallama.comm.group import Groups
from megallama.config.schema import Config
from megallama.data.loader import Loader
from megallama.data.samples import Samples
from megallama.layers.batch import MicroBatch
from megallama.layers.linear import ColumnParallelLinear, RowParallelLinear
from megallama.layers.param import Param
from megallama.optim.update import GradSync
from megallama.pipeline.runtime import PipelineRuntime
from megallama.plan.plan import make_plan
from megallama.train.step import train_step
from tests.cuda.order import HOST, Recorder, Stream, fake_cuda, over_nccl
from tests.small import build, small_config
from tests.threads import run_threads

SHORT = {"global_batch_size": 4, "seq_length": 16, "micro_batch_size": 1}
BASE: dict[str, Any] = {"precision": {"dtype": "bf16"}, "batch": SHORT, "model": {"num_layers": 2}}
STEPS = 2
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp": (2, {"parallel": {"tp": 2}}),
    "dp": (2, {}),
    "pp": (2, {"parallel": {"pp": 2}, "model": {"num_layers": 2, "tie_embeddings": True}}),
    "cp": (2, {"parallel": {"cp": 2, "cp_exchange": "gather"}, "overlap": {"context_parallel_heads": 2}}),
    "heads over cp": (2, {"parallel": {"cp": 2, "cp_exchange": "heads"}}),
    "pp and dp": (4, {"parallel": {"pp": 2, "schedule": "zb-h1"}}),
    "tp in pieces and dp": (4, {"parallel": {"tp": 2}, "overlap": {"bucket_mb": 0.01, "tensor_parallel_chunks": 2}}),
}
PLACES = {  # what must have been recorded
    "tp": {"TensorParallel.all_gather_sequence", "TensorParallel.reduce_scatter_sequence", "GradSync._sum_copies"},
    "dp": {"Update.gather", "GradSync._reduce", "CheckpointManager._snapshot", "MemoryCopies.keep", "MicroBatch.each"},
    "cp": {"_Gather.start", "_Gather.backward", "_in_order"},
    "heads": {"_Exchange.forward"},
    "pp": {"PipelineRuntime._send", "PipelineRuntime._recv", "consensus"},
}


def config_of(layout: str) -> tuple[int, Config]:
    ranks, settings = LAYOUTS[layout]
    return ranks, small_config(**BASE | settings)


def read(ids: Sequence[int]) -> Samples:
    return Samples(np.array([np.arange(i, i + 17) % 61 for i in ids]))


def body(recorder: Recorder, config: Config, groups: Groups, folder: Path | None, whole: bool) -> None:
    """Two steps with a save behind each, on one rank."""
    worker = build(make_plan(config, groups.world.size), over_nccl(groups, recorder))
    dp, size = worker.groups.dp, config.batch.global_batch_size

    def ids_of_step(step: int) -> Sequence[Sequence[int]]:
        return config.batch.sample_ids(step * size, size, dp.size, dp.rank)

    manager = None if folder is None else CheckpointManager(config, folder, groups.world, None, lambda text: None)
    shards = worker.optimizer.shards(owned_only=False)
    copies = MemoryCopies(os.memfd_create("copies"), shards, {}, pinned=False) if manager is not None else None
    with (
        recorder,
        Loader(read, ids_of_step, stop_step=STEPS, device=torch.device("cuda", 0), share=worker.share) as loader,
    ):
        for step in range(STEPS):
            while loader._queue.empty() and loader._ahead is None:
                time.sleep(0.001)
            batches = next(loader)
            result = train_step(worker, worker.plan.schedule_for(len(batches)), batches, 1e-3)
            assert not whole or (result.applied and result.loss < 10)
            if manager is not None:
                manager.save(step, worker.optimizer.shards(owned_only=True), {})
            if copies is not None:
                copies.keep(step, {})
                for copy in copies._copies[1 - copies._next]:  # from here on another process may take it
                    recorder.host_reads(copy, "resume in MemoryCopies.keep")
        del batches
        worker.optimizer.wait()
        recorder._settle()
        if manager is not None:
            manager.finish()


def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA that takes notes, and saves whose thread reads what was copied."""
    fake_cuda(monkeypatch)
    monkeypatch.setattr(MicroBatch, "to", lambda batch, device: batch.each(torch.clone))
    snapshot, finish = CheckpointManager._snapshot, CheckpointManager.finish

    def tracked(self: CheckpointManager, shards: Any) -> Any:
        recorder = torch.cuda.current_stream().recorder
        copies = snapshot(self, shards)
        recorder.join("writer", recorder.clock(HOST))  # a thread begins where the host stands
        self.reading = recorder, copies  # type: ignore[attr-defined]
        return copies

    def joined(self: CheckpointManager, *who: str) -> None:
        finish(self, *who)
        recorder = torch.cuda.current_stream().recorder
        recorder.join(HOST, recorder.clock("writer"))

    def write(self: CheckpointManager, *_: Any) -> None:
        recorder, copies = self.reading  # type: ignore[attr-defined]
        for shard in copies:
            for tensor in shard.state.values():
                recorder.host_reads(tensor, "write_checkpoint in CheckpointManager._write", "writer")

    monkeypatch.setattr(CheckpointManager, "_snapshot", tracked)
    monkeypatch.setattr(CheckpointManager, "finish", joined)
    monkeypatch.setattr(CheckpointManager, "_write", write)


def recorded(layout: str, folder: Path | None = None, whole: bool = True) -> list[Recorder]:
    """The recorders of all ranks of a short run."""
    ranks, config = config_of(layout)
    recorders = [Recorder() for _ in range(ranks)]
    plan = make_plan(config, ranks)
    heads = config.model.num_kv_heads or 1
    one = lambda groups: body(recorders[groups.rank], config, groups, folder, whole)  # noqa: E731
    run_threads(ranks, one, plan.topology, num_kv_heads=heads)
    return recorders


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_access_is_ordered(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch)
    recorders = recorded(layout, tmp_path if layout == "dp" else None)
    for recorder in recorders:
        assert recorder.races == []
        assert sum(recorder.seen.values()) > 1000
        assert PLACES[layout.split()[0]] <= recorder.seen.keys()


def without(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, line: str, instead: str = "pass") -> None:
    """The same method with another text in place of one of its lines."""
    method = inspect.getattr_static(owner, name)
    function = method.fget if isinstance(method, property) else method
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(line) == 1, f"{name} has {source.count(line)} lines '{line}'"
    module, made = sys.modules[function.__module__], dict[str, Any]()
    text = "from __future__ import annotations\n" + source.replace(line, instead)
    exec(compile(text, inspect.getfile(function), "exec"), vars(module) | {"__class__": owner}, made)  # noqa: S102
    monkeypatch.setattr(owner, name, made[name])


# what is left out: class, method, line, what stands there instead; layout; what is then not ordered
OMISSIONS: list[tuple[Any, str, str, str, str, str]] = [
    (Loader, "__next__", "current.wait_event(arrived)", "pass", "dp",
     r"read by .* \(compute\) is not ordered after write by clone in .* \(copies\)"),
    (Param, "weight", "self._gather.wait()", "pass", "dp",
     r"read by .* \(compute\) is not ordered after write by all_gather in Update.gather \(dp\)"),
    (GradSync, "finish", "handle.wait()", "pass", "dp",
     r"by .* \(compute\) is not ordered after write by reduce_scatter in GradSync._reduce \(dp\)"),
    (ColumnParallelLinear, "backward", "gather.wait()", "pass", "tp",
     r"read by .* \(compute\) is not ordered after write by all_gather in TensorParallel.all_gather_sequence \(tp\)"),
    (ColumnParallelLinear, "backward", "scatter.wait()", "pass", "tp",
     r"read by .* \(compute\) is not ordered after write by reduce_scatter in .* \(tp\)"),
    (RowParallelLinear, "forward", "handle.wait()", "pass", "tp",
     r"by .* \(compute\) is not ordered after write by reduce_scatter in .* \(tp\)"),
    (PipelineRuntime, "_take", "handle.wait()", "pass", "pp",
     r"by .* \(compute\) is not ordered after write by recv in PipelineRuntime._recv \(pp of .\)"),
    (PipelineRuntime, "run", "[send for send in self._sends if not send.done()]", "[]", "pp",
     r"memory of compute is used again before read by send in PipelineRuntime._send \(pp to .\)"),
    (CheckpointManager, "_snapshot", ".synchronize()", "", "dp",
     r"read by write_checkpoint .* \(writer\) is not ordered after write by copy_ in _snapshot \(compute\)"),
    (CheckpointManager, "save", 'self.finish(f"checkpoint of step {step}")', "pass", "dp",
     r"write by copy_ in CheckpointManager._snapshot \(compute\) is not ordered after read by write_checkpoint"),
    (MemoryCopies, "keep", "self._tensors]).tolist()", "self._tensors]).dim()", "dp",
     r"read by resume in MemoryCopies.keep \(host\) is not ordered after write by copy_ in keep \(compute\)"),
]  # fmt: skip


@pytest.mark.parametrize("omission", OMISSIONS, ids=lambda o: f"{o[0].__name__}.{o[1]}: {o[2][:30]}")
def test_a_wait_that_is_left_out_is_found(omission: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, line, instead, layout, found = omission
    without(monkeypatch, owner, name, line, instead)
    patched(monkeypatch)
    recorders = recorded(layout, tmp_path if layout == "dp" else None, whole=False)
    races = [race for recorder in recorders for race in recorder.races]
    assert any(re.search(found, race) for race in races), races[:5]


@pytest.mark.parametrize("known", [True, False])
def test_a_batch_that_is_dropped_at_once_keeps_its_memory(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an evaluation, say: nothing but the allocator's knowledge of the stream orders what comes into its place."""
    if not known:
        without(monkeypatch, Loader, "__next__", "tensor.record_stream(current)")
    patched(monkeypatch)
    device = torch.device("cuda", 0)
    with Recorder() as recorder, Loader(read, lambda step: [[2 * step]], stop_step=3, prefetch=0, device=device) as it:
        for batches in it:
            batches[0].tokens.sum()
            del batches
        recorder._settle()
    expected = "memory of copies is used again before read by sum"
    assert known == (recorder.races == []) and all(race.startswith(expected) for race in recorder.races)


def test_the_recorder_by_itself() -> None:
    """Streams are ordered by events alone, the host by its waits; who reads does not disturb who reads."""
    with Recorder() as recorder:
        a, side = torch.zeros(8), Stream(recorder, "side")
        recorder.launch("side")
        recorder.access("side", a[:4], False, "early in test")
        assert [race[:13] for race in recorder.races] == ["read by early"]
        recorder.races.clear()
        side.wait_event(recorder.current.record_event())
        recorder.launch("side")
        recorder.access("side", a[:4], True, "late in test")
        a[4:].sum()
        assert recorder.races == []
        a[3:].sum()
        assert recorder.races == ["read by sum in " + recorder.races[0].partition(" in ")[2]]
        recorder.races.clear()
        recorder.host_reads(a[4:], "host in test")
        assert len(recorder.races) == 1, "it was made by a stream for which nobody has waited"
        recorder.races.clear()
        recorder.current.synchronize()
        recorder.host_reads(a[4:], "host in test")
        recorder.host_reads(a[:4], "host in test")
        assert [race.partition(" is ")[2][:45] for race in recorder.races] == [
            "not ordered after write by late in test (side"
        ]
