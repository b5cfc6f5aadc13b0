"""Gradient synchronisation and the sharded optimizer."""
