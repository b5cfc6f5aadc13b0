"""Memory that cannot suffice, settings far from the usual, and a loss that rises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megallama.config.errors import ConfigError
from megallama.config.load import load
from megallama.config.rules import unusual
from megallama.pretrain import main
from megallama.train import setup as room_module
from megallama.train.progress import HighLoss
from megallama.train.setup import GIB, check_room, room
from tests.faults.test_bad_input import GOOD, refused

CPU = torch.device("cpu")


def system(tmp_path: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A root with /proc/self/cgroup and limits."""
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def limits(root: Path) -> dict[str, int]:
    """By the file's name below the root."""
    found = room(CPU, root)
    assert found.pop("physical memory") > 0
    return {str(Path(name).relative_to(root / "sys/fs/cgroup")): limit for name, limit in found.items()}


def test_limits_of_control_groups_version_2(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/job/memory.max": "5000\n", "sys/fs/cgroup/job/step/memory.max": "max\n"}
    assert limits(system(tmp_path, "0::/job/step\n", files)) == {"job/memory.max": 5000}


def test_limits_of_control_groups_version_1(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory"
    files = {f"{top}/memory.limit_in_bytes": "9223372036854771712\n", f"{top}/job/memory.limit_in_bytes": "7000\n"}
    root = system(tmp_path, "9:cpu,cpuacct:/other\n4:memory,hugetlb:/job\n", files)
    assert limits(root) == {"memory/job/memory.limit_in_bytes": 7000, "memory/memory.limit_in_bytes": (1 << 63) - 4096}


def test_a_container_sees_its_own_limit_at_the_top(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/kubepods/pod-of-the-host\n", {"sys/fs/cgroup/memory.max": "6000"})
    assert limits(root) == {"memory.max": 6000}


def test_without_any_of_it_there_is_physical_memory(tmp_path: Path) -> None:
    assert limits(tmp_path) == {}


def needs(host: str, certain: float, most: float, **has: float) -> tuple[str, int, int, dict[str, int]]:
    return host, int(certain * GIB), int(most * GIB), {name: int(limit * GIB) for name, limit in has.items()}


def test_ranks_of_a_machine_share_its_memory_and_no_other() -> None:
    assert check_room([needs("a", 5, 5, ram=11), needs("a", 5, 6, ram=11), needs("b", 10, 10, ram=11)]) == []
    with pytest.raises(ConfigError, match=r"of 2 ranks .* takes exactly 12 GiB, but ram on a is 11 GiB"):
        check_room([needs("a", 6, 6, ram=11), needs("a", 6, 6, ram=11), needs("b", 1, 1, ram=11)])


def test_the_least_limit_counts_for_those_it_binds() -> None:
    with pytest.raises(ConfigError, match="but job on a is 7 GiB"):
        check_room([needs("a", 4, 4, ram=100, job=7)] * 2)
    assert check_room([needs("a", 4, 4, ram=100, one=7), needs("a", 4, 4, ram=100, two=7)]) == []


def test_an_estimate_only_warns() -> None:
    (line,) = check_room([needs("a", 5, 12, ram=11)])
    assert line == "with activations 12 GiB are expected, but ram on a is 11 GiB: it may be killed"


def test_a_run_that_cannot_fit_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*GOOD, f"run.folder={tmp_path / 'run'}"]
    monkeypatch.setattr(room_module, "_cgroups", lambda root: [("a small one", 1 << 16)])
    assert "but a small one on " in refused(run, capsys) and not (tmp_path / "run").exists()
    monkeypatch.setattr(room_module, "_cgroups", lambda root: [("a middling one", 400_000)])
    assert main(run) == 0
    assert "warning: with activations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "key", "usual"),
    [
        ("optimizer.lr=10", "optimizer.lr=10", "1e-5 to 3e-3"),
        ("optimizer.lr=1e-8", "optimizer.lr=1e-08", "1e-5 to 3e-3"),
        ("optimizer.beta1=0.0", "optimizer.beta1=0", "0.9"),
        ("optimizer.beta2=0.5", "optimizer.beta2=0.5", "0.95 to 0.999"),
        ("optimizer.eps=0.1", "optimizer.eps=0.1", "1e-8 to 1e-5"),
        ("optimizer.weight_decay=2.0", "optimizer.weight_decay=2", "0 to 0.1"),
        ("optimizer.clip_grad=0.0", "optimizer.clip_grad=0", "1.0"),
        ("model.init_std=1.0", "model.init_std=1", "0.006 to 0.02"),
        ("lr_schedule.warmup_steps=90", "lr_schedule.warmup_steps=90", "0.1 to 10 %"),
        ("batch.global_batch_size=4194304", "67,108,864", "0.5 to 16 million"),
    ],
)
def test_settings_far_from_the_usual_are_named(setting: str, key: str, usual: str) -> None:
    arguments = [*GOOD, "train.steps=100"]
    assert list(unusual(load(None, arguments))) == []
    assert list(unusual(load(None, [*arguments, "lr_schedule.warmup_steps=50"]))) == []  # half of them is not most
    more = ["batch.seq_length=17"] if setting.startswith("batch") else []
    (line,) = unusual(load(None, [*arguments, setting, *more]))
    assert usual in line and (key in line or "tokens; usually" in line)


def test_a_loss_above_its_first_value_for_long() -> None:
    high = HighLoss()
    assert not any(high.seen(loss) for loss in [6.2] + [6.3] * 100)  # within 2 %: random data do that
    lines = [high.seen(loss) for loss in [9.0] * 19 + [6.0] + [9.0] * 40]
    assert [i for i, line in enumerate(lines) if line] == [39]
    assert "above its first value, 6.2000, for 20 steps, now 9.0000" in str(lines[39])


def test_a_run_that_diverges_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*GOOD, f"run.folder={tmp_path}", "optimizer.lr=10", "precision.dtype=fp32", "log.tensorboard=false"]
    assert main([*run, "train.steps=60", "train.stop_after_steps=15", "lr_schedule.warmup_steps=1"]) == 75
    assert main([*run, "train.steps=60", "lr_schedule.warmup_steps=1"]) == 0
    out = capsys.readouterr().out
    assert out.count("warning: optimizer.lr=10 is far from what LLaMA-like models were trained with") == 2
    assert "the loss has been above its first value, 4." in out, "the first value of the run, not of this start"


def test_what_is_kept_for_the_backward_where_nobody_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it where memory is ample; the same bits. A run goes on as it began, and as asked for."""
    line, bits = 'memory.recompute was left open: "none", of which ', []

    def run(name: str, *more: str, status: int = 0) -> bool:
        assert main([*GOOD, f"run.folder={tmp_path / name}", *more]) == status
        return line in capsys.readouterr().out

    assert run("open", "train.steps=2")
    assert not run("said", "train.steps=2", "memory.recompute=selective")
    for name in ("open", "said"):
        (step,) = (tmp_path / name / "checkpoints").glob("step-*")
        bits.append({f.relative_to(step): f.read_bytes() for f in step.rglob("*.safetensors")})
    assert bits[0] == bits[1] and bits[0]
    assert not run("saved", "train.steps=4", "train.stop_after_steps=2", "memory.recompute=selective", status=75)
    assert not run("saved", "train.steps=4"), "its checkpoint has another choice"
    monkeypatch.setattr(room_module, "_cgroups", lambda root: [("a middling one", 400_000)])
    assert not run("small", "train.steps=2")
