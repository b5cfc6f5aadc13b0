"""Greedy text after 8 prompts: our batch of 8 and of 1 beside transformers' batch of 8, same weights, one thread.

    python benchmarks/generate.py                                every row
    python benchmarks/generate.py --shapes S --dtypes fp32 --rounds 5

The prompts have 24 to 64 tokens, 64 are made of each; the rate is new tokens per second of the whole
call, the prompts' forward pass included, in turns, the median of the rounds.  Shapes:
`drivers/work.py`; weights are random (standard deviation 0.05).  "equal rows": whose 64 tokens are
those of transformers.  In bf16 both round at other places, so that a row goes its own way where two
tokens are about as likely; "equal tokens" are those before that, and "margin" is how far
apart, in the fp32 logits of the same weights, the two choices are where they first differ, beside
the rounding error of transformers' bf16 logits there [standard deviation].
Results: `benchmarks/results/generate.json` and `generate.md`.
"""
