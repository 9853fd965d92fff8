#!/usr/bin/env bash
# Print the path of a Python that can hold the project, and say on stderr which it is.
#   tools/find_python.sh [NAME]     NAME alone is tried where it is given (make PYTHON=NAME)
set -euo pipefail
WANTED="3.12 or newer"
CHECK='import sys, venv, ensurepip
if sys.version_info < (3, 12): sys.exit(1)
print(sys.executable, sys.version.split()[0])'

# A name on the path may be a shim of pyenv that has nothing behind it: only one that runs counts.
runs() { "$1" -c "$CHECK" 2>/dev/null; }

if [ -n "${1:-}" ]; then
  candidates=("$1")
else
  candidates=(python3.12 python3.13 python3)
  root="${PYENV_ROOT:-$HOME/.pyenv}"
  for version in "$root"/versions/3.1[2-9]*; do
    candidates+=("$version/bin/python")
  done
fi
for candidate in "${candidates[@]}"; do
  if found="$(runs "$candidate")"; then
    echo "Python ${found##* }: ${found% *}" >&2
    echo "${found% *}"
    exit 0
  fi
done
if [ -n "${1:-}" ]; then
  echo "PYTHON=$1 is not a Python $WANTED with venv and pip ($("$1" --version 2>&1 | head -1))" >&2
else
  echo "no Python $WANTED with venv was found (tried ${candidates[*]}): install python3.12 and python3.12-venv" \
    "(on Debian 12 by 'pyenv install 3.12'), or name one by 'make PYTHON=/path/to/python3.12'" >&2
fi
exit 1
