"""Raw text to tokens: reading, encoding, merging, and training tokenizers."""
