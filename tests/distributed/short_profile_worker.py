"""One rank of ``galvatron profile`` that spends little time on every point: ``... REQUEST.json``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import short_points  # noqa: F401

from galvatron_megatron.commands.profile_worker import main

if __name__ == "__main__":
    sys.exit(main())
