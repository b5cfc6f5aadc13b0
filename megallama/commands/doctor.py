"""What this machine can train with: kernels, versions, GPUs, processor, and what to install for more.

    megallama doctor [--json] [--measure] [--table FILE] [--dtype bf16] [--device auto] [--compile]

Of every operation what a run would take, and why not the others; --measure times all that work here, forward and
backward, and says what to leave out (let nothing else run). --table writes what is fastest on this processor, in bf16
and fp32, for run.processor_table. What fails is reported, not raised. The last line is the verdict, and exit status 0.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from megallama.commands.parser import Parser
from megallama.config.errors import counted

GIB = 2**30
NEEDED = ("torch", "numpy", "pydantic")
OPTIONAL = {  # distribution -> what it is for
    "transformer-engine": "fused attention, norms, fp8 and fp32 accumulation on GPUs",
    **dict.fromkeys([f"transformer-engine-{part}" for part in ("cu12", "cu13", "torch")], ""),
    "sentencepiece": "LLaMA 1 and 2 tokenizers",
    "tokenizers": "LLaMA 3 and GPT-2 tokenizers",
    "regex": "the check of a GPT-2 tokenizer",
    "tensorboard": "curves of a run",
    "matplotlib": "<run.folder>/loss.png",
    "zstandard": "reading .zst text",
    "pyarrow": "reading Parquet",
    "mpi4py": "preprocessing on many nodes under mpirun",
    "wandb": "",
}
APEX_IS = "build NVIDIA/apex from source (APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation .)"
WRONG_APEX = f"the package named apex here is an unrelated web toolkit from the package index; for NVIDIA's {APEX_IS}"

# tokens, hidden, ffn, heads, head size, sequence and vocabulary that --measure uses
CUDA_SIZE, CPU_SIZE = (8192, 4096, 11008, 32, 128, 2048, 32000), (1024, 768, 2048, 12, 64, 256, 4096)


def run(argv: Sequence[str]) -> int:
    """Print the report; 0 or 1."""
    parser = Parser("doctor", __doc__)
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")
    parser.add_argument("--measure", action="store_true", help="time every implementation that works here")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32", "fp64"), default="bf16", help="default bf16")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto")
    parser.add_argument("--compile", action="store_true", help="with torch.compile (run.compile=true)")
    parser.add_argument("--table", metavar="FILE", help="measure this processor into a table of processors")
    args = parser.read(argv)
    if args.table:
        return write_table(Path(args.table))
    report = examine(args.dtype, args.device, args.measure, args.compile)
    print(json.dumps(report, indent=2) if args.json else text(report))
    return 0 if report["can_train"] else 1


def write_table(path: Path) -> int:
    """Measure in bf16 and fp32 on the CPU, and write this processor's entry; 2 where a file is already."""
    if path.exists():
        print(f"error: {path} is there already; name a new file, and join tables by hand", file=sys.stderr)
        return 2
    rows = {dtype: kernels(dtype, "cpu", True, False, table=False) for dtype in ("bf16", "fp32")}
    written = entry(rows, str(cpu()["model"]))
    path.write_text(written, encoding="utf-8")
    print(f"{written}\nwritten to {path}; a new run reads it with run.processor_table={path}")
    return 0


def entry(rows: dict[str, list[dict[str, Any]]], model: str) -> str:
    """An entry of a table of processors: what is 5 % faster than what is taken, by format and operation."""
    from megallama.config.describe import literal
    from megallama.kernels.processors import FEATURES, Processor

    best: dict[str, dict[str, str]] = {dtype: {} for dtype in rows}
    total = dict.fromkeys(rows, 0.0)  # microseconds of products and attention
    for dtype, row in ((dtype, row) for dtype, of in rows.items() for row in of if row.get("named")):
        times = {k: us for k, us in (row["microseconds"] | row["named"]).items() if us is not None}
        fastest = min(times, key=lambda name: times[name])
        if times[fastest] < 0.95 * times[row["taken"]]:
            best[dtype][row["operation"]] = fastest
        total[dtype] += min(times[fastest], times[row["taken"]])
    here = Processor.here()
    lines = ["[[processor]]", f"name = {literal(f'{model}, measured by megallama doctor')}"]
    lines += [f"vendor = {literal(here.vendor)}", f"has = {literal(sorted(here.features))}"]
    lines += [f"lacks = {literal([f for f in FEATURES if f not in here.features])}"]
    lines += [f"bf16 = {literal(total['bf16'] <= total['fp32'])}"]
    lines += [f"kernels.{dtype} = {literal(named)}" for dtype, named in best.items() if named]
    return "\n".join(lines) + "\n"


def examine(dtype: str = "bf16", device: str = "auto", measure: bool = False, compiled: bool = False) -> dict[str, Any]:
    """Everything that the report says."""
    found: dict[str, Any] = {"versions": guarded(versions, {}), "gpus": guarded(gpus, []), "cpu": guarded(cpu, {})}
    found |= {"kernels": [], "advice": []}
    if dtype in ("bf16", "fp16"):
        found["cpu"]["product_time_over_fp32"] = guarded(lambda: product_time(dtype), None)
    problem = "" if sys.version_info >= (3, 11) else f"Python {platform.python_version()} is older than 3.11"
    try:
        found["kernels"] = kernels(dtype, device, measure, compiled)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what keeps this machine from training
        problem = problem or f"{type(error).__name__}: {reason(error)}"
    found["advice"] = guarded(lambda: advice(found, dtype), [])
    seen = {gpu["name"] for gpu in found["gpus"] if device != "cpu"}
    where = f"{counted(found['cpu'].get('usable_cores', 'some'), 'CPU core')}, without a GPU"
    where = f"{counted(len(found['gpus']), 'GPU')}: {', '.join(sorted(seen))}" if seen else where
    verdict = f"cannot train: {problem}" if problem else f"can train in {dtype} on {where}"
    return found | {"can_train": not problem, "verdict": verdict}


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def guarded(probe: Callable[[], Any], otherwise: Any) -> Any:
    """What `probe` returns, or `otherwise` if it raises; in a dictionary the reason is kept."""
    try:
        return probe()
    except Exception as error:  # noqa: BLE001 - a report is never lost to a broken package
        why = f"not known ({type(error).__name__}: {error})"
        return {"problem": why} if otherwise == {} else why if isinstance(otherwise, str) else otherwise


def versions() -> dict[str, str]:
    """Name -> version, or why there is none."""
    out = {"python": platform.python_version()} | dict.fromkeys((*NEEDED, *OPTIONAL), "not installed")
    for name in (*NEEDED, *OPTIONAL):
        with suppress(importlib.metadata.PackageNotFoundError):
            out[name] = importlib.metadata.version(name)
    out["apex"] = guarded(which_apex, "")
    out["MPI library"] = guarded(mpi_library, "") if out["mpi4py"] != "not installed" else "not asked without mpi4py"
    out.update(guarded(built_with, {}))
    out["C++ compiler"] = shutil.which("g++") or shutil.which("clang++") or "none"
    return out


def which_apex() -> str:
    """Which apex this is: NVIDIA's with extensions, or the index package of that name."""
    parts = [name for name in ("amp_C", "fused_weight_gradient_mlp_cuda", "fused_layer_norm_cuda") if has(name)]
    if not has("apex") and not parts:
        return "not installed"
    if not parts and not has("apex.optimizers"):
        return "not NVIDIA's: an unrelated web toolkit of the same name"
    return f"NVIDIA's, with {', '.join(parts)}" if parts else "NVIDIA's, Python only: built without CUDA extensions"


def has(module: str) -> bool:
    """Whether a module can be found; its parent is imported, it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # noqa: BLE001 - a parent that fails to import has no such part
        return False


def mpi_library() -> str:
    """The MPI that mpi4py finds, in a process of its own: a broken MPI ends who loads it."""
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip("\0\n ").splitlines() or ["nothing said"]
    return " ".join(lines[0].split()) if done.returncode == 0 else f"none that works ({lines[-1].strip()})"


def built_with() -> dict[str, str]:
    """What torch brings along."""
    import torch

    cuda = torch.version.cuda
    nccl = guarded(lambda: ".".join(map(str, torch.cuda.nccl.version())), "") if cuda else "none: a CPU build of torch"
    return {
        "CUDA of torch": cuda or "none: a CPU build of torch",
        "cuDNN": guarded(lambda: str(torch.backends.cudnn.version() or "none"), ""),
        "NCCL": nccl,
        "oneDNN": "yes" if torch.backends.mkldnn.is_available() else "no",
    }


def gpus() -> list[dict[str, Any]]:
    """The GPUs that torch sees."""
    import torch

    out = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        seen = torch.cuda.get_device_properties(index)
        capability = f"{seen.major}.{seen.minor}"
        out.append({"name": seen.name, "memory_gib": round(seen.total_memory / GIB, 1), "capability": capability})
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    asked = partial(subprocess.run, query, capture_output=True, text=True, timeout=20, check=True)
    for gpu, driver in zip(out, guarded(lambda: asked().stdout.split(), []) if out else (), strict=False):
        gpu["driver"] = driver  # a line per GPU
    return out


def cpu() -> dict[str, Any]:
    """Processor, cores that this process may use, instructions, caches and memory."""
    lines = (line.partition(":") for line in reversed(read("/proc/cpuinfo").splitlines()))
    fields = {name.strip(): value.strip() for name, _, value in lines}  # the first core's, read last
    flags = fields.get("flags", "").split()
    memory = {k: int(v.split()[0]) * 1024 for k, v in (m.split(":") for m in read("/proc/meminfo").splitlines())}
    quota, _, period = read("/sys/fs/cgroup/cpu.max").partition(" ")
    limit = read("/sys/fs/cgroup/memory.max").strip()
    shm = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    names = {"avx2": "AVX2", "avx512f": "AVX512", "avx512_bf16": "AVX512 bf16", "amx_bf16": "AMX bf16"}
    return {
        "model": fields.get("model name", platform.processor() or "not known"),
        "usable_cores": len(os.sched_getaffinity(0)),
        "quota_cores": int(quota) / int(period) if quota.isdecimal() else None,
        "instructions": [words for flag, words in names.items() if flag in flags],
        "l3_cache": read("/sys/devices/system/cpu/cpu0/cache/index3/size").strip() or "not known",
        "memory_gib": round(memory.get("MemTotal", 0) / GIB, 1),
        "available_gib": round(memory.get("MemAvailable", 0) / GIB, 1),
        "memory_limit_gib": round(int(limit) / GIB, 1) if limit.isdecimal() else None,
        "shm_gib": round(shm / GIB, 2),
    }


def product_time(dtype: str) -> float:
    """How long a matrix product takes in a 16-bit format, in times of fp32."""
    from megallama.train.assemble import DTYPES
    from megallama.train.speed import product_time_over_fp32

    return round(product_time_over_fp32(DTYPES[dtype]), 2)


def read(path: str) -> str:
    """A file of the kernel's; empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def kernels(dtype: str, device: str, measure: bool, compiled: bool, table: bool = True) -> list[dict[str, Any]]:
    """A row per operation, by the package's `table`; with `measure` microseconds of all that works."""
    import torch

    from megallama.kernels.candidate import Target
    from megallama.kernels.processors import Processor
    from megallama.kernels.select import FP8, FP8_PRODUCTS, OPERATIONS, select_kernels
    from megallama.train.assemble import DTYPES

    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no GPU")
    where, kind = torch.device("cuda" if cuda else "cpu"), DTYPES[dtype]
    entry = Processor.here().entry(CPU_SIZE[1]) if table and not cuda else None
    chosen = select_kernels(Target(where, kind, compiled=compiled), named=entry.kernels.get(dtype) if entry else None)
    target = Target(where, kind, compiled=compiled, product=chosen.gemms.fprop)
    rows: list[dict[str, Any]] = [
        {"operation": c.operation, "taken": c.selected, "refused": dict(c.refused)} for c in chosen.choices
    ]
    works: dict[str, str] = {}
    for name, make in FP8_PRODUCTS.candidates:
        try:
            FP8_PRODUCTS.check(make(target), target)
            works.setdefault("taken", name)
        except Exception as error:  # noqa: BLE001 - the reason is what is asked for
            works[name] = reason(error)
    taken = works.pop("taken", "nothing here can")
    rows.append({"operation": f"{FP8} (precision.fp8)", "taken": taken, "refused": works})
    for row in rows[:-1] if measure else ():
        operation, times = OPERATIONS[row["operation"]], {}
        for name, make in (*operation.candidates, operation.last):
            if name not in row["refused"]:  # those after the taken one have not been checked yet
                check = operation.check if name != operation.last[0] else None
                times[name] = guarded(partial(timed, row["operation"], make, target, check), None)
        row["microseconds"] = times
        of = operation.named if not cuda else []
        row["named"] = {n: guarded(partial(timed, row["operation"], m, target, operation.check), None) for n, m in of}
    return rows


def timed(operation: str, make: Callable[[Any], Any], target: Any, check: Callable[[Any, Any], None] | None) -> float:
    """Microseconds of forward and backward at a size that trains: the best in half a second."""
    import torch
    from torch.utils.benchmark import Timer

    made = make(target)
    if check is not None:
        check(made, target)
    timer = Timer("work()", globals={"work": workload(operation, made, target)}, num_threads=torch.get_num_threads())
    return round(min(timer.blocked_autorange(min_run_time=0.5).times) * 1e6, 1)


def workload(operation: str, made: Any, target: Any) -> Callable[[], Any]:
    """A forward and backward of an operation, at the shapes of a 7B layer on a GPU, of a 100M one on a CPU."""
    import torch

    from megallama.config.schema import OptimizerConfig
    from megallama.kernels.candidate import accumulate_dtype

    tokens, h, f, heads, d, seq, vocab = CUDA_SIZE if target.device.type == "cuda" else CPU_SIZE
    acc_dtype = accumulate_dtype(target.dtype)

    def rand(*shape: int, dtype: Any = target.dtype) -> Any:
        return torch.rand(shape, device=target.device).sub_(0.5).to(dtype)

    if operation == "attention":
        attend, leaves = made(heads, heads, d), [rand(tokens // seq, seq, heads, d).requires_grad_() for _ in range(3)]
        dout = rand(tokens // seq, seq, heads, d)
        return lambda: torch.autograd.grad(attend(*leaves), leaves, dout)
    if operation == "RMSNorm":
        (x, dy, weight), grad = (rand(tokens, h), rand(tokens, h), rand(h)), rand(h, dtype=acc_dtype)
        return lambda: (made[0](x, dy, weight, 1e-5), made[1](dy, x, weight, 1e-5, dy, grad, False, True))
    if operation == "RoPE":
        cos, sin = (rand(seq, 1, d // 2, dtype=acc_dtype) for _ in range(2))
        packed, parts = rand(tokens // seq, seq, 3 * heads, d), rand(3, tokens // seq, seq, heads, d)
        qk = packed[:, :, : 2 * heads]
        return lambda: (made[0](qk, cos, sin, qk), made[1](parts, cos, sin, packed.split(heads, 2), True))
    if operation == "SwiGLU":
        packed, dout = rand(tokens, 2 * f), rand(tokens, f)
        return lambda: (made[0](packed), made[1](dout, packed, True))
    if operation == "cross entropy":
        logits, scale = rand(512, vocab), rand(512, dtype=acc_dtype)
        index, sums = torch.zeros(512, 1, dtype=torch.int64, device=target.device), rand(2, 512, dtype=acc_dtype)
        return lambda: (made[0](logits, index, *sums, scale), made[1](logits, index, scale, scale, None, sums[0]))
    x, dy = rand(tokens, h), rand(tokens, f)
    if operation == "matrix product":
        weight = rand(f, h)
        return lambda: (made(x, weight), made(dy, weight.t()))
    grad = rand(f, h, dtype=acc_dtype)
    if operation == "weight gradient":
        return lambda: made(grad, dy, x, False)
    if operation == "gradient norm":
        return lambda: made([grad.view(-1)])
    state = [grad, *(torch.zeros_like(grad) for _ in range(3)), torch.zeros((), device=target.device)]
    return lambda: made([[t] for t in state], OptimizerConfig(), 1e-3, 0.1, None)


def advice(found: dict[str, Any], dtype: str) -> list[str]:
    """What to install or set for more, most important first."""
    have, processor, out = found["versions"], found["cpu"], []
    if missing := [name for name in NEEDED if have.get(name) == "not installed"]:
        out.append(f"install {', '.join(missing)}: make quickstart sets up .venv with everything")
    if have.get("apex", "").startswith("not NVIDIA's"):
        out.append(WRONG_APEX)
    out += gpu_advice(found, dtype) if found["gpus"] else cpu_advice(have, processor, dtype)
    if processor.get("shm_gib", 1) < 1:  # NCCL's and the loader's shared memory may run out
        out.append(f"/dev/shm holds {processor['shm_gib']} GiB; start the container with --shm-size=1g or more")
    for name, use in OPTIONAL.items():
        if use and have.get(name) == "not installed" and name != "transformer-engine":
            extra = " mpich (no system package needed)" if name == "mpi4py" else ""
            out.append(f"pip install {name}{extra}: {use}")
    if have.get("MPI library", "").startswith("none that works"):
        out.append("pip install mpich: mpi4py is there but finds no MPI")
    if have.get("C++ compiler") == "none":
        out.append("run.compile=true would need a C++ compiler (g++), Triton a C compiler")
    return out + slower(found["kernels"])


def cpu_advice(have: dict[str, str], processor: dict[str, Any], dtype: str) -> list[str]:
    """For a machine without a GPU."""
    out = []
    if not have.get("CUDA of torch", "none").startswith("none"):
        out.append("torch is a CUDA build but finds no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES")
    times = processor.get("product_time_over_fp32")
    flags = {"AVX512 bf16", "AMX bf16"} & set(processor.get("instructions", ()))
    if times is not None and times > 1.5:
        out.append(
            f"this processor has no {dtype} instructions: precision.dtype=fp32 is faster, matrix products take "
            f"{times:.1f} times as long in {dtype}"
        )
    elif times is None and dtype == "bf16" and not flags:
        out.append("this processor has no bf16 instructions: precision.dtype=fp32 is probably faster")
    return out


def gpu_advice(found: dict[str, Any], dtype: str) -> list[str]:
    """For a machine with GPUs."""
    have, out = found["versions"], []
    cuda = have.get("CUDA of torch", "")
    core = f"transformer-engine-cu{cuda.split('.')[0]}"
    if have.get("transformer-engine") == "not installed":
        which = "2.12.0 (later ones want a newer cuBLAS than CUDA 13.0's)" if cuda == "13.0" else "the newest for it"
        out.append(
            f"Transformer Engine: {core} and transformer-engine-torch, {which}, with pip install --no-build-isolation; "
            f"this torch is {have.get('torch')} for CUDA {cuda}"
        )
    elif have.get(core) == "not installed" or have.get("transformer-engine-torch") == "not installed":
        out.append(f"Transformer Engine is there in part; it also needs {core} and transformer-engine-torch")
    elif len({have[name] for name in ("transformer-engine", core, "transformer-engine-torch")}) > 1:
        out.append(f"transformer-engine, {core} and transformer-engine-torch must have one version")
    broken = {r["refused"].get("Transformer Engine") for r in found["kernels"]} - {None, "not installed"}
    out += [f"Transformer Engine was refused: {reason}" for reason in sorted(map(str, broken))]
    if have.get("apex") == "not installed" and have.get("transformer-engine") == "not installed":
        out.append(f"apex adds fused Adam and fp32 accumulation where there is no Transformer Engine: {APEX_IS}")
    if dtype == "bf16" and any(float(gpu["capability"]) < 8 for gpu in found["gpus"]):
        out.append("a GPU below compute capability 8.0 has no bf16: use precision.dtype=fp16")
    if len({gpu["name"] for gpu in found["gpus"]}) > 1:
        out.append("the GPUs differ: a job runs at the speed of the slowest")
    return out


def slower(rows: list[dict[str, Any]]) -> list[str]:
    """Where what is taken is more than 10 % slower than another: the setting that leaves it out."""
    out = []
    for row in rows:
        times = {name: value for name, value in row.get("microseconds", {}).items() if value is not None}
        best = min(times, key=lambda name: times[name], default=row["taken"])
        if row["taken"] in times and times[row["taken"]] > 1.1 * times[best]:
            names = list(row["microseconds"])
            setting = json.dumps([f"{row['operation']}: {name}" for name in names[: names.index(best)]])
            gain = times[row["taken"]] / times[best]
            out.append(f"{row['operation']}: {best} is {gain:.2f} times as fast here; run.without_kernels={setting}")
    return out


def text(found: dict[str, Any]) -> str:
    """The report for a reader."""
    lines = ["KERNELS"]
    for row in found["kernels"]:
        speeds = row.get("microseconds", {}) | row.get("named", {})
        times = "".join(f"; {name} {us:,.0f} us" for name, us in speeds.items() if us is not None)
        lines.append(f"  {row['operation']}: {row['taken']}{times}")
        lines += [f"      not {name}: {reason}" for name, reason in row["refused"].items()]
    lines += ["", "VERSIONS", *(f"  {name}: {value}" for name, value in found["versions"].items()), "", "GPUS"]
    for gpu in found["gpus"] or [{"none": ""}]:
        lines.append("  " + ", ".join(f"{key} {value}".strip() for key, value in gpu.items()))
    lines += ["", "PROCESSOR AND MEMORY"]
    for key, value in found["cpu"].items():
        words = ", ".join(value) or "none of note" if isinstance(value, list) else "none" if value is None else value
        lines.append(f"  {key.replace('_gib', ' [GiB]').replace('_', ' ')}: {words}")
    lines += ["", "FOR MORE", *(f"  - {line}" for line in found["advice"] or ["nothing: all is there"]), ""]
    return "\n".join([*lines, f"This machine {found['verdict']}."])
