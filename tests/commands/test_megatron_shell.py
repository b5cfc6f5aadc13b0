"""Launch scripts are read as the shell would where they are plain, and never run; the rest is asked for."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from megallama.commands.from_megatron import read_script
from megallama.commands.from_megatron import run as main
from megallama.commands.megatron.flags import Flags, plain
from megallama.config.errors import ConfigError

SCRIPT = r"""#!/bin/bash
# every way of writing it that published scripts have
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
SAVE=${1:-"ck/llama"}
TP="${TP:-8}"
NODES=2
STAMP=$(date +"%Y-%m-%d_%H-%M-%S")
for ARGUMENT in "$@"
do
   KEY=$(echo $ARGUMENT | cut -f1 -d=)
   export "$KEY"="--num-layers 1"
done
while [[ $# -gt 0 ]]; do
  case $1 in
    --tp) TP="$2"; shift; shift;;
    *) echo "unknown $1"; exit 1;;
  esac
done
help () {
  echo "torchrun pretrain_gpt.py --num-layers 2"
}
if [ "$DATA" = none ]; then # don't
   echo "no data"
fi
MODEL_ARGS=(
   --num-layers 80
   # --not-this 3
   --hidden-size 8192  # nor this, it's a comment
   "--split '99,1,0'"
   --wandb-exp-name "a b"
)
MODEL_ARGS+=("--mock-data" "--data-cache-path ${SAVE}/cache")
TRAIN_ARGS="
    --lr 3e-4 \
    --global-batch-size 1$NODES --num-attention-heads ${HEADS-64} \
    --save $SAVE --run 'a b' \
"
TRAIN_ARGS="$TRAIN_ARGS --sequence-parallel"
TRAIN_ARGS+=" --bf16"
run="
  torchrun --nproc_per_node 8 --nnodes=$NODES pretrain_gpt.py \
   $TRAIN_ARGS \
"
run="$run |& tee log"
echo $run
if [ "${NO_TRAINING:-0}" -eq 0 ]; then
 OMP_NUM_THREADS=1 eval $run
fi
OMP_NUM_THREADS=1 torchrun --nproc_per_node 8 --nnodes=$NODES pretrain_gpt.py ${MODEL_ARGS[@]} "${EXTRA[@]}" \
  $TRAIN_ARGS 2>&1 | tee log
echo 'import x
if __name__ == "__main__": print("--num-layers 3")' > mean.py
"""

CONDITIONS = r"""
TP=${TP:-8}
SIZE=7
WORLD=$(($TP*8))
if [ "$FSDP" -eq 1 ]; then
    TP=1
fi
if [[ $SIZE -eq 7 ]]; then
   HIDDEN=4096
else
   HIDDEN=8192
fi
ARGS="--num-layers 2 --hidden-size $HIDDEN --tensor-model-parallel-size $TP --global-batch-size $WORLD"
if [ "$MOCK" = 1 ]; then ARGS="$ARGS --mock-data"; fi
[ -n "$DATA" ] && ARGS+=" --data-path $DATA"
if [ $PR = bf16 ]; then
    pr_options=" \
        --bf16"
elif [ $PR = fp16 ]; then
    pr_options=" --fp16"
fi
DIR=out_$(date)
run="torchrun --nproc_per_node 8 x.py $ARGS $pr_options --tensorboard-dir $DIR"
if [ "$TEE" -eq 0 ]; then run="$run >& log"; else run="$run |& tee log"; fi
eval $run
"""


def words(text: str, **given: str) -> list[str]:
    return [plain([word]) for word in read_script(text, given, "a.sh", Flags())]


def test_the_command_is_the_shells(tmp_path: Path) -> None:
    """The same words as bash makes of it, with torchrun a function that notes them; quotes of quotes do not count."""
    (tmp_path / "run.sh").write_text('torchrun() { printf "%s\\n" torchrun "$@" > words; }\n' + SCRIPT)
    subprocess.run(["bash", "run.sh"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "NO_TRAINING": "1"}, check=True)
    expected = (tmp_path / "words").read_text().splitlines()
    mine = words(SCRIPT)
    assert "--mock-data" in expected and "80" in expected and "'99,1,0'" in expected
    assert [w.strip("'") for w in mine] == [w.strip("'") for w in expected if w]


def test_variables_that_are_given_win() -> None:
    mine = words(SCRIPT, NODES="4", HEADS="32", MODEL_ARGS="--num-layers 2 --x a")
    assert mine[mine.index("--num-attention-heads") + 1] == "32" and "--nnodes=4" in mine and "14" in mine
    assert mine[mine.index("--num-layers") :][:5] == ["--num-layers", "2", "--x", "a", "--lr"]
    assert "--mock-data" not in mine
    mine = words(SCRIPT, **{"1": "out"})
    assert mine[mine.index("--save") :][:5] == ["--save", "out", "--run", "'a", "b'"]


def test_what_is_not_plain_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Conditions, arithmetic and the output of commands are not followed, and nothing of them is lost silently."""
    (tmp_path / "a.sh").write_text(CONDITIONS)
    with pytest.raises(ConfigError) as caught:
        main([str(tmp_path / "a.sh")])
    more = "is not plain in the script; write {0}=FLAGS behind the script ({0}= for none), or convert what Megatron"
    assert [line[: 40 + len(more)] for line in str(caught.value).splitlines()[1:4]] == [
        f"  - $ARGS+ {more.format('ARGS+')} prints",
        f"  - $pr_options+ {more.format('pr_options+')} prints",
        f"  - $run+ {more.format('run+')} prints",
    ]
    why = "this is unset in the script, computed, or set under a condition; write NAME=VALUE behind the script, or"
    assert str(caught.value).splitlines()[4:] == [
        f"  - --hidden-size $HIDDEN: {why} --hidden-size behind --",
        f"  - --tensor-model-parallel-size $TP: {why} --tensor-model-parallel-size behind --",
        f"  - --global-batch-size $WORLD: {why} --global-batch-size behind --",
    ]
    given = {"HIDDEN": "4096", "TP": "2", "WORLD": "64", "ARGS+": "--mock-data --swiglu", "pr_options": "--bf16"}
    given["run+"] = ""
    assert words(CONDITIONS, **given)[5:] == [
        *"--num-layers 2 --hidden-size 4096 --tensor-model-parallel-size 2 --global-batch-size 64".split(),
        *"--mock-data --swiglu --bf16 --tensorboard-dir out_${...}".split(),
    ]
    nothing = words(CONDITIONS, **given | {"ARGS+": "", "pr_options": ""})
    assert "--mock-data" not in nothing and "--bf16" not in nothing and "$ARGS" not in " ".join(nothing)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("python x.py --num-layers 2 \\\n  --lr 1\n", ["python", "x.py", "--num-layers", "2", "--lr", "1"]),
        ("python x.py 2>&1 --lr 1 > log --bf16 | tee", ["python", "x.py", "--lr", "1", "--bf16"]),
        ("A='--lr 1'; mpirun sh x.sh x.py \"$A --bf16\"", ["mpirun", "sh", "x.sh", "x.py", "--lr", "1", "--bf16"]),
        ("run='python x.py --lr 1 |& tee log'\neval $run", ["eval", "python", "x.py", "--lr", "1"]),
        ("A=(\n --lr 1 # it's\n)\nA=(\"${A[@]}\" --bf16)\npython x.py ${A[@]}",
         ["python", "x.py", "--lr", "1", "--bf16"]),
        ("python -u pretrain.py --lr 1 && echo done --it", ["python", "-u", "pretrain.py", "--lr", "1"]),
        ("srun sh -c 'python train.py --lr 1 2>err'", ["srun", "sh", "-c", "python", "train.py", "--lr", "1"]),
        ("A='--lr 1'; python x.py ${A} &> log &", ["python", "x.py", "--lr", "1"]),
        ("A=(--lr 1)\nB=(\"${A[@]}\" --bf16)\npython x.py \"${B[@]}\"", ["python", "x.py", "--lr", "1", "--bf16"]),
        ("python x.py --a \"q \\\" w\" --b '$A' \"\\$A\"", ["python", "x.py", "--a", 'q " w', "--b", "$A", "$A"]),
        ("python tool.py --x 1\npython pretrain.py --x 1 --y 2", ["python", "pretrain.py", "--x", "1", "--y", "2"]),
        ("cd /tmp || exit 1; A=--p; python x.py $A", ["python", "x.py", "--p"]),
        ("A=1 B=\"x $A\"\npython x.py --q \"$B\" \"$B.idx\" ${C:-y} ${A:+n}",
         ["python", "x.py", "--q", "x", "1", "x 1.idx", "y", "${A:+n}"]),
        ("python x.py --name=\"$USER\" # --no\n", ["python", "x.py", "--name=$USER"]),
    ],
)  # fmt: skip
def test_ways_of_writing(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize("text", [
    "TP=1\nif [ $BIG ]; then\nTP=8\nfi", "TP=1; if [ $BIG ]; then TP=8; fi", "TP=1\n[ $BIG ] && TP=8",
    "TP=1\n[ $SMALL ] || export TP=8", "TP=1\ncase $N in\n a|b) TP=8;;\nesac", "TP=1\nf () {\n TP=8\n}\nf",
    "TP=1\nfunction f {\n TP=8\n}\nf", "TP=1\nfor n in 1 2; do TP=$n; done", "TP=`nproc`", "TP=$(( 2 * 4 ))",
    "TP=$NODES",
    "TP=1\nwhile read x; do\n if [ $x ]; then y=1; else TP=8; fi\ndone < list",
])  # fmt: skip
def test_a_variable_that_is_not_plain_is_never_taken(text: str) -> None:
    command = "python x.py --tp $TP --lr 1"
    assert words(f"{text}\n{command}")[2:] in (["--tp", "$TP", "--lr", "1"], ["--tp", "$NODES", "--lr", "1"])
    assert words(f"{text}\n{command}", TP="4")[2:] == ["--tp", "4", "--lr", "1"]
    after = text.partition("\n")[2]
    assert "TP=8" not in text or words(f"{after}\nTP=2\n{command}")[2:] == ["--tp", "2", "--lr", "1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo hello\n", "a.sh holds no `PROGRAM.py --FLAGS ...`; give the launch script, or flags behind"),
        ("--num-layers 2 --lr 1\n", "a.sh holds no `PROGRAM.py --FLAGS ...`; give the launch script, or flags behind"),
        ("A=(--num-layers 2)\n", "a.sh holds no `PROGRAM.py --FLAGS ...`; give the launch script, or flags behind"),
        ("A=1\npython x.py --lr 'one\n", "No closing quotation; close it, or give the flags themselves behind --"),
        ("python x.py --lr $LR --min-lr $LR", "--min-lr $LR: this is unset in the script, computed, or set under a co"),
        ("N=`nproc`\npython x.py --num-layers $N", "--num-layers $N: this is unset in the script, computed, or set un"),
        ("python x.py --num-layers $(nproc)", "--num-layers ${...}: this is unset in the script, computed, or set und"),
        ("python x.py --lr ${11}", "--lr $11: this is unset in the script, computed, or set under a condition; write"),
        ("python x.py --lr 1 $MORE", "--lr 1 $MORE: this is unset in the script, computed, or set under a condition"),
        ("python x.py --bf16 $MORE", "--bf16 $MORE: this is unset in the script, computed, or set under a condition"),
        ("python x.py $MORE --bf16", "$MORE is not plain in the script; write MORE=FLAGS behind the script (MORE= for"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.sh").write_text(text)
    with pytest.raises(ConfigError) as caught:
        main(["a.sh"])
    assert message in str(caught.value)


def test_variables_that_the_script_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_text("TP=1\npython x.py --tensor-model-parallel-size $TP --lr $1\n")
    with pytest.raises(ConfigError, match=r"a\.sh has no variable 2, TPP; remove it, or look at its spelling"):
        main([str(tmp_path / "a.sh"), "TPP=2", "1e-3", "1e-4"])
    with pytest.raises(ConfigError, match=r"a\.sh has no variable T\(P, \[; remove it, or look at its spelling"):
        main([str(tmp_path / "a.sh"), "T(P=2", "[=1"])


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"a\.sh holds no `PROGRAM.py --FLAGS \.\.\.`; give the launch script"):
        main([str(tmp_path / "a.sh")])


@pytest.mark.parametrize("text", [
    "if [ $X ]; then A='--swiglu'; else A=' '; fi", "A='--swiglu'\nif [ $X ]; then A=; fi", "[ $X ] && A=--swiglu",
    "case $X in\n 1) A=--swiglu;;\n 2) A=;;\nesac", "A=--bf16\nif [ $X ]; then\n A+=' --fp16'\nfi",
    "for x in a b; do A=\"$A --$x\"; done",
])  # fmt: skip
def test_flags_that_a_condition_may_add_are_never_lost(text: str, tmp_path: Path) -> None:
    """Not even behind a flag of no effect, whose values do not matter."""
    (tmp_path / "a.sh").write_text(f"{text}\npython x.py --log-throughput $A\n")
    with pytest.raises(ConfigError) as caught:
        main([str(tmp_path / "a.sh")])
    assert "1 problem on" in str(caught.value) and "$A+ is not plain in the script; write A+=FLAGS" in str(caught.value)


class Writer:
    """Random scripts of what is plain."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def one(self, *choices: str) -> str:
        return self.random.choice(choices)

    def word(self) -> str:
        v, a = self.one("A", "B", "C"), self.one("P", "Q")
        return self.one(
            f"${v}", f"${{{v}}}", f"${{{v}:-d}}", f"${{{v}-x}}", f'"${v} q"', "'s'", r"w\-x",
            "7", '"a b"', "-f", "k=v", f"${{{a}[@]}}", f"${{{a}[*]}}",
        )  # fmt: skip

    def statement(self) -> str:
        if self.random.random() < 0.6:
            return f"{self.one('A', 'B', 'C')}{self.one('=', '=', '+=')}{self.word()}"
        return f"{self.one('P', 'Q')}{self.one('=', '+=')}({self.word()} {self.word()} {self.word()})"


@pytest.mark.parametrize("seed", range(60))
def test_random_scripts_give_the_words_that_bash_gives(seed: int) -> None:
    writer = Writer(seed)
    lines = ["N=3; M=4; A=7; B=; C='k l'", "P=()\nQ=(-a 'b c')", *(writer.statement() for _ in range(7))]
    text = "\n".join([*lines, f"python x.py --z {writer.word()} {writer.word()} {writer.word()}"])
    bash = ["bash", "-c", 'python() { printf "%s\\0" python "$@"; }\n' + text]
    done = subprocess.run(bash, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert read_script(text, {}, "a.sh", Flags()) == done.stdout.split("\0")[:-1], text + done.stderr
