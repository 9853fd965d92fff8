"""`mtroll plan` as a script: python tools/plan.py CONFIG [--json] [key=value ...]"""

import sys

from megatron_troll.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
