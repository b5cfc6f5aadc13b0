"""Text from a checkpoint; beside the engine."""
