"""What the LLaMA models of the paper reach, to stand beside one's own numbers.

Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models": table 3 (zero-shot common sense), 4
(NaturalQuestions), 5 (TriviaQA), 6 (RACE), 7 (MATH, GSM8k), 8 (HumanEval, MBPP pass@1) and 9 (MMLU).  In percent.
"""

from __future__ import annotations

from typing import NamedTuple

SIZES = ("7B", "13B", "33B", "65B")


class Reported(NamedTuple):
    """One task of the paper."""

    shots: int
    metric: str  # of ours, or lm-evaluation-harness's, that is nearest to the paper's
    percent: tuple[float, float, float, float]  # of `SIZES`


PAPER = {
    "boolq": Reported(0, "acc_answer", (76.5, 78.1, 83.1, 85.3)),
    "piqa": Reported(0, "acc_norm", (79.8, 80.1, 82.3, 82.8)),
    "social_iqa": Reported(0, "acc_norm", (48.9, 50.4, 50.4, 52.3)),
    "hellaswag": Reported(0, "acc_norm", (76.1, 79.2, 82.8, 84.2)),
    "winogrande": Reported(0, "acc", (70.1, 73.0, 76.0, 77.0)),
    "arc_easy": Reported(0, "acc_norm", (72.8, 74.8, 80.0, 78.9)),
    "arc_challenge": Reported(0, "acc_norm", (47.6, 52.7, 57.8, 56.0)),
    "openbookqa": Reported(0, "acc_answer", (57.2, 56.4, 58.6, 60.2)),
    "nq_open": Reported(0, "exact_match", (16.8, 20.1, 24.9, 23.8)),
    "triviaqa": Reported(0, "exact_match", (50.0, 56.6, 65.1, 68.2)),
    "race": Reported(0, "acc", (46.9, 47.2, 48.3, 51.6)),  # RACE-high
    "minerva_math": Reported(4, "exact_match", (2.9, 3.9, 7.1, 10.6)),
    "gsm8k": Reported(8, "exact_match", (11.0, 17.8, 35.6, 50.9)),
    "humaneval": Reported(0, "pass@1", (10.5, 15.8, 21.7, 23.7)),
    "mbpp": Reported(3, "pass@1", (17.7, 22.0, 30.2, 37.7)),
    "mmlu": Reported(5, "acc", (35.1, 46.9, 57.8, 63.4)),
}
