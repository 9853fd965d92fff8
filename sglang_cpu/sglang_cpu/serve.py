"""`python -m sglang_cpu.serve FLAGS`: SGLang's server on a machine without CUDA; the flags are SGLang's own.

This file is not `__main__.py`: spawned children do not import a main module of that name again."""

import os
import sys

from sglang_cpu import unpin_host_memory

unpin_host_memory()

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
