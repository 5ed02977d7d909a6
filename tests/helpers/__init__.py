"""What several tests use: no test imports another."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Published models and data, beside the repository.
SHARED = Path(os.environ.get("ASTRA_SHARED", ROOT.parent / "shared")) / "data"
# The installed command.
ASTRA = str(Path(sys.executable).parent / "astra")
