"""`python -m megatron_troll.cli`: the command that starts ranks and servers."""

import sys

from megatron_troll.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
