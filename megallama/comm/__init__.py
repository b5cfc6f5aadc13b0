"""The only code that talks to other ranks: groups, the regions built on them, and launching."""
