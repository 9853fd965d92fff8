#!/usr/bin/env bash
# Make a virtual environment that sees the project's one torch.
#   tools/environment.sh FOLDER [PYTHON]
# torch stands in .torch/VERSION-PYTHON, once for every environment of the Makefile: a CUDA build takes 4.7 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="$1"
CPU_INDEX=https://download.pytorch.org/whl/cpu
torch="$(sed -n 's/^torch==//p' constraints.txt)"
python="$(tools/find_python.sh "${2:-}")"
version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
shared="$PWD/.torch/$torch-$version"

# An environment of another Python is made anew, one of this Python is kept.
[ -d "$folder/lib/python$version" ] || clear=--clear
"$python" -m venv ${clear:-} "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install --upgrade --constraint constraints.txt pip

# One `pip install --target` that is either whole or not there.
install_torch() {
  rm -rf "$shared.part"
  pip install --constraint constraints.txt --target "$shared.part" "$@" && mv "$shared.part" "$shared"
}
if [ ! -d "$shared" ]; then
  mkdir -p .torch
  if command -v nvidia-smi >/dev/null; then
    echo "torch $torch: the CUDA build, for the GPU of this machine"
    install_torch "torch==$torch"
  else
    echo "torch $torch: a CPU build from the configured index"
    install_torch "torch==$torch+cpu" 2>/dev/null || {
      echo "torch $torch: none there; a CPU build from $CPU_INDEX"
      install_torch "torch==$torch+cpu" --index-url "$CPU_INDEX" --retries 0 --timeout 10 2>/dev/null
    } || {
      echo "torch $torch: none there; the CUDA build, which runs on CPU too (4.7 GB)"
      install_torch "torch==$torch"
    }
  fi
fi
echo "$shared" >"$folder/lib/python$version/site-packages/torch.pth"
# pip puts no script of torch's beside this environment's Python.
printf '#!%s\nfrom torch.distributed.run import main\n\nmain()\n' "$PWD/$folder/bin/python" >"$folder/bin/torchrun"
chmod +x "$folder/bin/torchrun"
