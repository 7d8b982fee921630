"""``python -m galvatron_megatron``: the command line, or a launcher for a Megatron script."""

import sys

from galvatron_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
