"""`python -m megatron_troll.cli`: what ranks and servers are started with."""

import sys

from megatron_troll.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
