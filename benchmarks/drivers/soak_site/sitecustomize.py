"""On the path of a soak's processes: Python imports it first of all, and it makes them ranks that are written down."""

import os
import sys
from pathlib import Path

if file := os.environ.get("SOAK_RECORDS"):
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import soak_rank

    soak_rank.install(file)
