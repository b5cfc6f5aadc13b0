"""Launch scripts are read as the shell would, and never run."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from megallama.commands.from_megatron import run as main
from megallama.commands.megatron.shell import plain, read_script
from megallama.config.errors import ConfigError

SCRIPT = r"""#!/bin/bash
# every way of writing it that published scripts have
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
SAVE=${1:-"ck/llama"}
TP="${TP:-8}"
SIZE="${SIZE:-70}"
NODES=2
WORLD=$(($NODES*8))
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
if [ "$FSDP" -eq 1 ] && [ "$TP" -gt 1 ]; then
    TP=1
fi
if [[ $SIZE -eq 7 ]]; then # a comment
   HIDDEN=4096
elif [[ $SIZE -eq 70 ]]; then
   HIDDEN=8192 # another
   if [ "$TP" = 8 ]; then LAYERS=80; else LAYERS=79; fi
else
   echo "no size"
   exit 1
fi
MODEL_ARGS=(
   --num-layers $LAYERS
   # --not-this 3
   --hidden-size $HIDDEN  # nor this
   "--split '99,1,0'"
)
if [[ "$DATA" == "MOCK" ]] || [[ -z "$DATA" ]]; then
   MODEL_ARGS+=("--mock-data" "--data-cache-path ${SAVE}/cache")
fi
HEADS=$(( ($TP > 1) ? 64 : 32 ))
TRAIN_ARGS="
    --lr 3e-4 \
    --global-batch-size $WORLD --num-attention-heads $HEADS \
    --save $SAVE --wandb-exp-name 'a b' \
"
if (( TP > 4 )); then
TRAIN_ARGS="$TRAIN_ARGS --sequence-parallel"
fi
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
  $TRAIN_ARGS 2>&1
echo 'import x
if __name__ == "__main__": print("--num-layers 3")' > mean.py
"""


def words(text: str, **given: str) -> list[str]:
    return [plain(word) for word in read_script(text, given).command]


def test_the_command_is_the_shells(tmp_path: Path) -> None:
    """The same words as bash makes of it, with torchrun a function that notes them."""
    (tmp_path / "run.sh").write_text('torchrun() { printf "%s\\n" torchrun "$@" > words; }\n' + SCRIPT)
    subprocess.run(["bash", "run.sh"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "NO_TRAINING": "1"}, check=True)
    expected = (tmp_path / "words").read_text().splitlines()
    mine = words(SCRIPT)
    assert "--mock-data" in expected and "80" in expected
    assert [w for w in mine if w != "$EXTRA"] == [w for w in expected if w]
    assert mine[mine.index("--num-attention-heads") + 1] == "64" and mine[mine.index("--nnodes=2") - 1] == "8"


def test_variables_that_are_given_win() -> None:
    mine = words(SCRIPT, SIZE="7", TP="2", LAYERS="32", DATA="here")
    assert mine[mine.index("--num-layers") + 1] == "32" and mine[mine.index("--hidden-size") + 1] == "4096"
    assert "--sequence-parallel" not in mine and "--mock-data" not in mine and mine[-1] == "--bf16"
    assert words(SCRIPT, **{"1": "out"})[-4:-1] == ["'a", "b'", "--sequence-parallel"]


def test_what_only_running_would_tell_stays_open() -> None:
    text = "N=$(nvidia-smi -L | wc -l)\nif [ -d data ]; then D=1; else D=2; fi\n"
    script = read_script(text + "torchrun --nproc_per_node $N pretrain.py --num-layers $D --lr $LR", {})
    assert [plain(w) for w in script.command[2:]] == [
        "$(nvidia-smi...)",
        "pretrain.py",
        "--num-layers",
        "$D",
        "--lr",
        "$LR",
    ]
    assert script.notes == ["line 2: only running would tell whether `[ -d data ]`; neither branch was read"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--num-layers 2 --lr 1", ["--num-layers", "2", "--lr", "1"]),
        ("--num-layers 2 \\\n  --lr 1\n", ["--num-layers", "2", "--lr", "1"]),
        ("python -u pretrain.py --lr 1 && echo done --it", ["python", "-u", "pretrain.py", "--lr", "1"]),
        ("srun bash -c 'python pretrain.py --lr 1 2>err'", ["python", "pretrain.py", "--lr", "1"]),
        ("A='--lr 1'; python x.py ${A} &> log &", ["python", "x.py", "--lr", "1"]),
        ("A=(--lr 1)\nB=(\"${A[@]}\" --bf16)\npython x.py \"${B[@]}\"", ["python", "x.py", "--lr", "1", "--bf16"]),
        ("X=5; python x.py --n $((X * 2 / 3 - 1)) --m $((X % 3))", ["python", "x.py", "--n", "2", "--m", "2"]),
        ("python x.py --a \"q \\\" w\" --b", ["python", "x.py", "--a", 'q " w', "--b"]),
        ("python tool.py --x 1\npython pretrain.py --x 1 --y 2", ["python", "pretrain.py", "--x", "1", "--y", "2"]),
        ("if ! [ 1 -eq 2 ] && [ a != b ]; then A=--p; else A=--q; fi\npython x.py $A", ["python", "x.py", "--p"]),
        ("if [[ llama2 == llama* && -n x ]]; then A=--p; fi\npython x.py $A", ["python", "x.py", "--p"]),
        ("A=; [ 1 = 2 ] && A=--p\n[[ 1 == 1 ]] && A+=--q || A+=--r\npython x.py $A", ["python", "x.py", "--q"]),
        ("[ -n \"$B\" ] || B=--s && C=--t; python x.py $B $C ${D:+--u} ${B:+--v}",
         ["python", "x.py", "--s", "--t", "--v"]),
        ("cd /tmp || exit 1; mkdir -p a && A=--p; python x.py $A", ["python", "x.py", "--p"]),
        ("! [[ a == b || -n x ]] || A=--p; if ! [[ 1 -eq 2 && -n x ]]; then B=--q; fi; python x.py $A $B",
         ["python", "x.py", "--p", "--q"]),
        ("[ -e /tmp ] && A=--p\npython x.py --q $A", ["python", "x.py", "--q", "$A"]),
        ("if [ 1 -gt 2 -o 3 -le 3 ]; then A=--p; fi\npython x.py $A", ["python", "x.py", "--p"]),
    ],
)  # fmt: skip
def test_ways_of_writing(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_arrays_alone() -> None:
    script = read_script("GPT_ARGS=(\n --num-layers 2 # two\n)\nDATA=x\nDATA_ARGS='--data-path x'\n", {})
    assert script.command == ["--num-layers", "2", "--data-path", "x"]
    assert script.notes == ["no line starts a training program; taken: GPT_ARGS, DATA_ARGS"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo hello\n", "a.sh holds no flags of Megatron; give the launch script, the one with `torchrun"),
        ("A=1\npython x.py --lr 'one\n", "line 2: ' is never closed; close it, or give the flags themselves behind --"),
        ("A=(--lr\n", "line 1: ( is never closed"),
        ("python x.py --lr $LR --min-lr $LR", "$LR, for --lr, --min-lr, has no value in the script; write LR="),
        ("N=`nproc`\npython x.py --num-layers $N", "$(nproc...), for --num-layers, has no value in the script"),
        ("python x.py --lr ${11}", "$11, for --lr, has no value in the script; write 11=VALUE behind the script"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.sh").write_text(text)
    with pytest.raises(ConfigError) as caught:
        main(["a.sh"])
    assert message in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read .*a\.sh: .*; give a launch script, or flags behind --"):
        main([str(tmp_path / "a.sh")])


class Writer:
    """Random scripts of what `megallama/commands/megatron/shell.py` says it understands."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def one(self, *choices: str) -> str:
        return self.random.choice(choices)

    def word(self) -> str:
        v, a = self.one("A", "B", "C"), self.one("P", "Q")
        return self.one(
            f"${v}", f"${{{v}}}", f"${{{v}:-d e}}", f"${{{v}-x}}", f"${{{v}:+y z}}", f'"${v} q"', "'s $A'", r"w\ x",
            "7", f"$((2+{self.one('1', '5', '-9')}*3))", r'"a\"b"', "--f", "k=v", f"${{{a}[@]}}", f'"${{{a}[@]}}"',
            f"${{{a}[*]}}",
        )  # fmt: skip

    def number(self) -> str:
        return self.one("$N", "${N}", "$M", "2", "5")

    def test(self) -> str:
        v, compared = self.one("A", "B", "C"), self.one("-eq", "-ne", "-gt", "-lt", "-ge", "-le")
        return self.one("", "", "", "! ") + self.one(
            f"[ {self.number()} {compared} {self.number()} ]", f"test -n ${v}",
            f'[ "${v}" {self.one("=", "==", "!=")} {self.one("7", "k*")} ]',
            f"[[ ${v} == {self.one('7', '*', 'k*')} ]]", f'[ {self.one("-z", "-n")} "${v}" ]',
            f"(( {self.number()} {self.one('>', '<', '==', '!=')} {self.number()} ))",
            f"[[ -n ${v} {self.one('&&', '||')} {self.number()} -gt {self.number()} ]]",
        )  # fmt: skip

    def statement(self, depth: int = 0) -> str:
        kind = self.random.random()
        if kind < 0.35:
            return f"{self.one('A', 'B', 'C')}{self.one('=', '=', '+=')}{self.word()}"
        if kind < 0.5:
            return f"{self.one('P', 'Q')}{self.one('=', '+=')}({self.word()} {self.word()} {self.word()})"
        if kind < 0.6:
            return f"N=$(( {self.number()} {self.one('+', '-', '*')} {self.number()} ))"
        if kind < 0.75 or depth > 1:
            return f"{self.test()} {self.one('&&', '||')} M=3"
        inner = [self.statement(depth + 1) for _ in range(3)]
        joined = f"{self.test()}{self.one('', f' && {self.test()}', f' || {self.test()}')}"
        middle = self.one("", f"elif {self.test()}; then {inner[1]}\n")
        last = self.one("", f"else # not\n{inner[2]} # c\n")
        return f"if {joined}; then\n{inner[0]}\n{middle}{last}fi"


@pytest.mark.parametrize("seed", range(60))
def test_random_scripts_give_the_words_that_bash_gives(seed: int) -> None:
    writer = Writer(seed)
    lines = ["N=3; M=4; A=7; B=; C='k l'", "P=()\nQ=(--a 'b c')", *(writer.statement() for _ in range(7))]
    text = "\n".join([*lines, f"python x.py --z {writer.word()} {writer.word()} {writer.word()}"])
    bash = ["bash", "-c", 'python() { printf "%s\\0" python "$@"; }\n' + text]
    done = subprocess.run(bash, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    script = read_script(text, {})
    assert (script.command, script.notes) == (done.stdout.split("\0")[:-1], []), text + done.stderr
