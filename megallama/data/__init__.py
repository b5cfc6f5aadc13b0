"""The data room: from tokenized text to the exact tokens of sample number n.

A .bin/.idx pair (`indexed`) -> sequences in a keyed order (`samples`) -> several sources mixed by weight (`mixture`,
`sources`) -> micro-batches prepared ahead (`loader`).
Everything that decides which tokens a step sees is a pure function of the seed, the sample number and the files.
"""
