"""Raw text to tokens: documents, preprocessing, tokenizers' training, merging; beside the engine."""
