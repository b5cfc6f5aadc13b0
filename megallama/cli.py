"""The `megallama` command."""
