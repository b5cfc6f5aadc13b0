"""Checkpoints without a layout: saved by any ranks, read by any ranks, opened by Hugging Face."""
