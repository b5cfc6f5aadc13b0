"""One rank of benchmarks/checkpoint.py: every way to save or load the same state, alternately; prints JSON lines.

    RANK=0 WORLD_SIZE=1 ... python checkpoint_ranks.py save|load FOLDER ROUNDS PEERS [small]
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from megallama.checkpoint.manager import CheckpointManager  # noqa: E402
from megallama.checkpoint.manifest import STATE  # noqa: E402
from megallama.comm.c10d import C10d  # noqa: E402
from megallama.comm.group import Group, Solo  # noqa: E402
from megallama.config.load import resolve  # noqa: E402
from megallama.config.schema import Config  # noqa: E402
from megallama.layers.param import Shard  # noqa: E402
from megallama.plan.box import Box  # noqa: E402
from megallama.plan.params import ParamBuilder, build_layout, global_shapes  # noqa: E402
from megallama.plan.topology import Topology  # noqa: E402

MODEL = {"hidden_size": 768, "num_layers": 14, "num_heads": 12, "ffn_hidden_size": 2048, "vocab_size": 32000}
SMALL = {"hidden_size": 512, "num_layers": 6, "num_heads": 8, "ffn_hidden_size": 1376, "vocab_size": 16000}  # 0.5 GB
CHUNK = 8 << 20


def boxes(config: Config, grid: Topology, rank: int) -> list[Box]:
    """What the rank of a layout owns of every tensor."""
    at, model = grid.coords(rank), config.model
    layers = [i for i in range(model.num_layers) if i * grid.pp // model.num_layers == at["pp"]]
    builder = ParamBuilder(model, grid.tp, at["tp"], sequence_parallel=True)
    plan = build_layout(builder.stage(layers, first=at["pp"] == 0, last=at["pp"] == grid.pp - 1), grid.dp, 10_000_000)
    segments = [s for b in plan.buckets for s in plan.segments(*b.shard(grid.dp, at["dp"])) if s.part.owner]
    return [box for segment in segments for box in segment.boxes()]


def memory(key: str) -> int:
    """A line of /proc/self/status [bytes]."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


class Bench:
    """The state of one rank, and every way to store it."""

    def __init__(self, folder: Path, model: dict[str, int]) -> None:
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.folder = folder
        self.group: Group = Solo("bench")
        self.own: Group = Solo("checkpoint")  # saves talk from the background, so through a group of their own
        if self.ranks > 1:
            dist.init_process_group("gloo")
            everybody, cpu = tuple(range(self.ranks)), torch.device("cpu")
            self.group = C10d(dist.group.WORLD, "bench", everybody, self.rank, cpu)
            self.own = C10d(dist.new_group(everybody), "checkpoint", everybody, self.rank, cpu)
        settings = {"model": model, "data": {"synthetic": True}, "precision": {"dtype": "bf16"}}
        self.config = resolve(Config.model_validate(settings))
        self.numel = sum(torch.Size(s).numel() for s in global_shapes(self.config.model).values())

    def shards(self, **axes: int) -> list[Shard]:
        """This rank's part of the state under a layout."""
        found = boxes(self.config, Topology.fill(self.ranks, **axes), self.rank)
        sizes = [b.numel for b in found]
        flat = [torch.randn(sum(sizes)).split(sizes) for _ in range(3)]  # views, as the optimizer's are
        return [Shard(b, dict(zip(STATE, three, strict=True))) for b, *three in zip(found, *flat, strict=True)]

    def manager(self, name: str) -> CheckpointManager:
        """A manager of its own folder."""
        return CheckpointManager(self.config, self.folder / name, self.own, None, lambda text: None)

    def timed(self, row: str, round_: int, work: Callable[[], Any], nbytes: float) -> None:
        """Run `work` on all ranks between two barriers and print what it took."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        self.group.barrier()
        before, start = memory("VmRSS"), time.monotonic()
        work()
        self.group.barrier()
        seconds = time.monotonic() - start
        extra = self.group.gather_values(memory("VmHWM") - before)
        if self.rank == 0:
            found = {"row": row, "ranks": self.ranks, "round": round_, "seconds": seconds, "bytes": nbytes}
            print(json.dumps(found | {"extra": max(extra)}), flush=True)

    def clear(self, *names: str) -> None:
        """Remove results, and let the disk finish."""
        self.group.barrier()
        if self.rank == 0:
            for name in names:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            os.sync()
        self.group.barrier()

    def write_raw(self, name: str, source: memoryview) -> None:
        """The bytes of `source` to a new file, durably."""
        (self.folder / name).mkdir(exist_ok=True)
        fd = os.open(self.folder / name / str(self.rank), os.O_RDWR | os.O_CREAT)
        at = 0
        while at < len(source):
            at += os.pwrite(fd, source[at : at + CHUNK], at)
        os.fsync(fd)
        os.close(fd)


def peer_state(bench: Bench, shard: int) -> dict[str, Any]:
    """bf16 weights and three fp32 tensors per weight, as a peer's trainer holds them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (bench.ranks,)) if bench.ranks > 1 else None
    state: dict[str, Any] = {}
    for name, shape in global_shapes(bench.config.model).items():
        for kind, dtype in (("w", torch.bfloat16), ("p", torch.float32), ("m", torch.float32), ("v", torch.float32)):
            whole = torch.randn(shape).to(dtype)
            place = Shard(shard if len(shape) > 1 else 0)
            state[f"{kind}.{name}"] = distribute_tensor(whole, mesh, [place]) if mesh is not None else whole
    return state


def save_rounds(bench: Bench, rounds: int, peers: bool, small: bool) -> None:
    """Raw, ours and the peers, in turn; not `small`: then also behind the caller's back."""
    total = bench.numel * 14
    shards = bench.shards()
    raw = memoryview(bytearray(os.urandom(CHUNK)) * -(-total // bench.ranks // CHUNK))[: total // bench.ranks]
    state = peer_state(bench, 0) if peers else {}
    ways: dict[str, Callable[[], Any]] = {"raw write + fsync": lambda: bench.write_raw("raw", raw)}
    ours = bench.manager("ours")
    ways["ours, to durable"] = lambda: ours.save(1, shards, {}, behind=False)
    if bench.ranks > 1:
        cut = bench.shards(tp=bench.ranks)
        ways["ours, cut by tensor parallelism, to durable"] = lambda: ours.save(1, cut, {}, behind=False)
    if peers:
        ways |= peer_ways(bench, state)
    for number in range(rounds):
        for row, work in ways.items():
            bench.clear("raw", "ours", "peer")
            bench.timed(row, number, work, total)
    if not small:
        async_rounds(bench, shards, state, rounds)


def peer_ways(bench: Bench, state: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """torch.distributed.checkpoint, and safetensors and torch.save with fsync."""
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file

    def durable(write: Callable[[str], None]) -> None:
        (bench.folder / "peer").mkdir()
        path = str(bench.folder / "peer" / "state")
        write(path)
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

    def by_dcp(threads: int) -> None:
        writer = dcp.FileSystemWriter(bench.folder / "peer", thread_count=threads)
        dcp.save(state, storage_writer=writer, no_dist=bench.ranks == 1)

    ways: dict[str, Callable[[], Any]] = {f"DCP, {n} threads": lambda n=n: by_dcp(n) for n in (1, 2)}
    if bench.ranks == 1:
        ways["safetensors"] = lambda: durable(lambda path: save_file(state, path))
        ways["torch.save"] = lambda: durable(lambda path: torch.save(state, path))
    return ways


def memcpy(bench: Bench, nbytes: int, rounds: int) -> None:
    """What any snapshot must take."""
    target, source = torch.zeros(nbytes // 4), torch.ones(nbytes // 4)
    target.zero_()
    for number in range(rounds + 1):
        bench.timed("one memcpy of the state", number, lambda: target.copy_(source), nbytes)


def async_rounds(bench: Bench, shards: list[Shard], state: dict[str, Any], rounds: int) -> None:
    """How long the training waits for a save that goes on behind it."""
    nbytes = 12 * sum(s.box.numel for s in shards)
    memcpy(bench, nbytes, rounds)
    bench.clear("ours", "peer")
    ours = bench.manager("ours")
    bench.timed("ours, host buffer made at the start", 0, lambda: ours.prepare(shards), nbytes)
    for number in range(rounds + 1):
        bench.timed("ours, training waits", number, lambda n=number: ours.save(n + 1, shards, {}), nbytes)
        bench.timed("ours, until durable", number, ours.finish, 14 * bench.numel)
        bench.clear(f"ours/step-{number:08d}")
    if state:
        import torch.distributed.checkpoint as dcp

        dist.is_initialized() or dist.init_process_group("gloo")
        for number in range(rounds + 1):
            bench.clear("peer")
            later: list[Any] = []

            def start(later: list[Any] = later) -> None:
                later.append(dcp.async_save(state, checkpoint_id=str(bench.folder / "peer")))

            bench.timed("DCP async, training waits", number, start, nbytes)
            bench.timed("DCP async, until durable", number, lambda later=later: later[0].result(), 14 * bench.numel)


def cold(folder: Path) -> int:
    """Drop a folder's files from the page cache; their bytes."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            total += os.fstat(fd).st_size
            os.close(fd)
    return total


def read_raw(bench: Bench, folder: Path) -> None:
    """This rank's share of all bytes of a folder."""
    buffer = bytearray(CHUNK)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        fd, size = os.open(path, os.O_RDONLY), path.stat().st_size
        for at in range(CHUNK * bench.rank, size, CHUNK * bench.ranks):
            os.preadv(fd, [memoryview(buffer)[: min(CHUNK, size - at)]], at)
        os.close(fd)


def tensors(state: dict[str, Any]) -> Iterator[Tensor]:
    """Local tensors of a peer's state."""
    return (t.to_local() if hasattr(t, "to_local") else t for t in state.values())


def load_rounds(bench: Bench, rounds: int, peers: bool, small: bool) -> None:
    """Saved with tp, read with pp (DCP: saved along rows, read along columns), from the disk."""
    import torch.distributed.checkpoint as dcp

    ours, step = bench.manager("ours"), bench.folder / "ours" / "step-00000001"
    ours.save(1, bench.shards(tp=bench.ranks), {}, behind=False)
    shards = bench.shards(pp=bench.ranks)
    ways: dict[str, tuple[Path, Callable[[], Any]]] = {
        "raw read": (step, lambda: read_raw(bench, step)),
        "ours, into another layout": (step, lambda: ours.load(step, shards)),
    }
    if peers:
        peer = bench.folder / "peer"
        dcp.save(peer_state(bench, 0), checkpoint_id=str(peer), no_dist=bench.ranks == 1)
        state = peer_state(bench, 1)
        ways["DCP, into another layout"] = (
            peer,
            lambda: dcp.load(state, checkpoint_id=str(peer), no_dist=bench.ranks == 1),
        )
    for number in range(rounds):
        for row, (folder, work) in ways.items():
            bench.group.barrier()
            nbytes = cold(folder)
            bench.timed(row, number, work, nbytes)


def main() -> None:
    """Do one of the two series."""
    what, folder, rounds, peers, *more = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    bench = Bench(Path(folder), SMALL if more else MODEL)
    (save_rounds if what == "save" else load_rounds)(bench, int(rounds), peers == "1", bool(more))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
