"""`mtroll convert` as a script: python tools/convert_hf.py hf2mcore|mcore2hf SRC DST [options]."""

import sys

from megatron_troll.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
