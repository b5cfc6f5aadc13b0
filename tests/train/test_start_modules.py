"""What a rank has imported at its first step: nothing that takes long and that no step needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# each takes from 0.1 to some seconds; the reason why it is not there is that nobody asks for it
HEAVY = {
    *("torch._dynamo", "torch._inductor", "torch.onnx", "torch._functorch.aot_autograd", "torch.utils.tensorboard"),
    *(
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch.distributed.elastic",
    ),
    *("torch.utils.cpp_extension", "torch.utils.benchmark"),
    *("matplotlib", "tensorboard", "transformers", "huggingface_hub", "pandas", "scipy", "pyarrow", "PIL", "rich"),
    *("sympy", "sentencepiece", "gigatoken", "safetensors.torch", "triton", "mpi4py", "setuptools", "pytest"),
    *("megallama.cli", "megallama.commands", "megallama.text", "megallama.convert", "megallama.forecast"),
    *("megallama.analysis", "megallama.inference", "megallama.recovery", "megallama.evaluation", "lm_eval"),
}
CODE = """
import gc, json, sys
from megallama import pretrain
def told(frame, event, argument):
    name = frame.f_code.co_name
    if event == "call" and name in ("detect_launch", "train_step"):
        rounds = sum(generation["collections"] for generation in gc.get_stats())
        seen = {"at": name, "collections": rounds, "on": gc.isenabled(), "modules": [*sys.modules]}
        print(json.dumps(seen), flush=True)
        if name == "train_step":
            sys.setprofile(None)
assert "torch" not in sys.modules
sys.setprofile(told)
sys.exit(pretrain.main(sys.argv[1:]))
"""


def test_no_heavy_module_is_there_at_the_first_step(tmp_path: Path) -> None:
    settings = ["model.preset=debug", "data.synthetic=true", "train.steps=1", "batch.global_batch_size=1"]
    settings += ["batch.micro_batch_size=1", "batch.seq_length=32", "log.tensorboard=false", "log.plot=false"]
    settings += [f"run.folder={tmp_path}/run", "train.gc_interval=0"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, *settings]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    imported, first_step = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert (imported["at"], first_step["at"]) == ("detect_launch", "train_step")
    assert {"torch", "pydantic", "megallama.train.loop"} <= {*imported["modules"]}, "this looked at something else"
    found = HEAVY & {*first_step["modules"]}
    assert sorted(found) == [], sorted(found)
    # to collect while modules are imported takes a seventh of the time, and frees nothing
    assert imported["collections"] < 50 and imported["on"]


COMMANDS = {  # what it may not have imported at its end, which needs none of it
    "plan model.preset=llama-65b ranks=512 parallel.tp=8 parallel.pp=8": ("torch", "numpy", "matplotlib", "tokenizers"),
    "train --help": ("torch", "numpy", "matplotlib", "tokenizers"),
    "--help": ("torch", "numpy", "pydantic", "megallama.config.schema"),
}
COMMAND = """
import json, sys
from megallama.cli import main
try:
    status = main(sys.argv[2:])
except SystemExit as left:
    status = left.code
print(json.dumps([status, [name for name in sys.argv[1].split(",") if name in sys.modules]]))
"""


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_that_only_plans_or_explains_imports_no_torch(words: str, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMMAND, ",".join(COMMANDS[words]), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
    said = done.stdout.splitlines()
    assert json.loads(said[-1]) == [0, []], done.stdout + done.stderr
    assert len(said) > 10  # the answer was there
