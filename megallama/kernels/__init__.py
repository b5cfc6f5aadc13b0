"""The arithmetic of one rank; the only package that may use Transformer Engine or apex."""
