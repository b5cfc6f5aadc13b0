"""The model, built from parallel layers, and its initial weights."""
