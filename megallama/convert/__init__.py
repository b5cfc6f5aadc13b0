"""Checkpoints of other programs: reading, writing, comparing; beside the engine."""
