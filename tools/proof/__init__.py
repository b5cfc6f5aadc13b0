"""The proof that the ranks of a job fit together, for tools/dryrun.py."""
