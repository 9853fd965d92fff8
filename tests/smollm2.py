"""SmolLM2-135M-Instruct for tests: made once for a checkout, whichever test asks first."""

import fcntl
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def folder() -> Path:
    """runs/lm/base of the checkout, where the recipe has it too. Processes that ask meanwhile wait."""
    target = ROOT / "runs" / "lm" / "base"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "base.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run([sys.executable, str(ROOT / "tools" / "smollm2.py"), str(target)], check=True)
    return target
