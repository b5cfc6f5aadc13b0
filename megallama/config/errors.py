"""The errors a user can cause. `pretrain.main` prints them without a traceback and exits with status 2."""

from __future__ import annotations


class MegallamaError(Exception):
    """Something the user can put right; the message says what is wrong, the values, and what to write instead."""

    shared = False  # True: every rank raises it alike, so one of them says it


class ConfigError(MegallamaError):
    """A configuration that cannot be used; the message lists every problem found, one per line."""
