#!/usr/bin/env bash
# megatron-core: its asynchronous checkpoint writer keeps results in the server process of a multiprocessing manager.
# The server waits for requests for ever: when a rank is killed (out of memory, SIGKILL), it stays, with all the memory
# of a Python that has imported torch. Every kill adds one. Linux, no GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 megatron-core==0.19.2 numpy==2.3.5
cat >"$tmp/rank.py" <<'EOF'
import time

from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

if __name__ == "__main__":
    get_write_results_queue()  # what the first save asks for
    print("ready", flush=True)
    time.sleep(600)
EOF
cat >"$tmp/finding.py" <<'EOF'
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path


def memory_mib(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


print("torch", version("torch"), "megatron-core", version("megatron-core"), "python", sys.version.split()[0])
rank = subprocess.Popen([sys.executable, "-W", "ignore", "rank.py"], stdout=subprocess.PIPE, text=True)
assert rank.stdout.readline() == "ready\n"
children = Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split()
servers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
rank.kill()
rank.wait()
time.sleep(10)
left = [pid for pid in servers if Path(f"/proc/{pid}").exists()]
try:
    for pid in left:
        print(f"10 s after SIGKILL: expected no process of the rank, seen a server with {memory_mib(pid):.0f} MiB")
    assert len(left) == 1, (children, servers, left)
finally:
    for pid in left:
        os.kill(pid, signal.SIGKILL)
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1 venv/bin/python finding.py
