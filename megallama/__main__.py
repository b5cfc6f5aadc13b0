"""`python -m megallama COMMAND`, also under a launcher: `torchrun ... -m megallama train run.toml`."""

from megallama.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
