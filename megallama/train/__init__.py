"""The training run and what it reports."""
