"""Checkpoints of one format as another: what tools/reshard_checkpoint.py calls, and nothing that trains imports."""
