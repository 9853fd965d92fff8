"""Start many servers with a single import of SGLang, for tests: `python -m sglang_cpu.farm` reads requests
from stdin, one JSON object per line: {"argv": [SGLang's flags], "log": FILE}. For each it forks a process,
with SGLang already imported, that becomes a server, and prints its process id. Servers end when stdin closes.

SGLang starts its own processes by spawn, which imports everything again (about ten seconds each); here they
are forked too, which is safe while there is a single thread.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import threading

import sglang_cpu

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


def main() -> None:
    sglang_cpu.unpin_host_memory()
    _import_everything()
    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda *_args, **_kwargs: None
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    assert threading.active_count() == 1
    _say("ready")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become_server(request["argv"], request["log"])
        _say(str(child))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _import_everything() -> None:
    import sglang.launch_server
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler
    import sglang.srt.models.qwen3
    import sglang.srt.models.qwen3_moe  # noqa: F401


def _become_server(argv: list[str], log: str) -> None:
    """Run a server in a new session, so that it can be killed with its children; never returns."""
    os.setsid()
    LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["sglang", *argv]
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(argv))
    os._exit(0)


if __name__ == "__main__":
    main()
