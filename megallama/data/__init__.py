"""The data room: from raw text to the exact tokens of sample number n.

Text files -> `preprocess` (with a `tokenizer`) -> a .bin/.idx pair (`indexed`) -> sequences in a keyed order
(`samples`) -> several sources mixed by weight (`blend`, `sources`) -> micro-batches prepared ahead (`loader`).
Everything that decides which tokens a step sees is a pure function of the seed, the sample number and the files.
"""
