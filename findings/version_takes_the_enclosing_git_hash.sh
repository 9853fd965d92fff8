#!/usr/bin/env bash
# megatron-core: at import it asks git for the commit of whatever repository lies around its installed files and adds
# it to __version__. In a virtual environment inside a checkout of your own project the version has your commit in
# it, so two commits of yours look like two versions of megatron-core. Needs no GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/project/venv"
"$tmp/project/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 megatron-core==0.19.2 numpy==2.3.5
cat >"$tmp/finding.py" <<'EOF'
import os
import subprocess
import sys
from importlib.metadata import version

GIT = ["git", "-c", "user.name=Nobody", "-c", "user.email=nobody@example.com", "-c", "commit.gpgsign=false"]


def git(*arguments):
    return subprocess.run([*GIT, *arguments], cwd="project", check=True, capture_output=True, text=True).stdout.strip()


def imported(**environment):
    """megatron.core.__version__ as a new process sees it."""
    code = "import megatron.core; print(megatron.core.__version__)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, text=True)
    return run.stdout.strip()


print("torch", version("torch"), "megatron-core", version("megatron-core"))
plain = imported()
git("init", "--quiet")
seen = []
for message in ("one", "two"):
    git("commit", "--quiet", "--allow-empty", "--message", message)
    seen.append((git("rev-parse", "--short", "HEAD"), imported()))
print("installed:", version("megatron-core"), "- imported before there was a repository around it:", plain)
print("expected: the same version whatever is committed in the folder around the environment")
for commit, found in seen:
    print(f"seen at commit {commit} of that folder's repository: {found}")
without = imported(NO_VCS_VERSION="1")
print("with NO_VCS_VERSION=1:", without)
assert plain == without == version("megatron-core") == "0.19.2"
assert [found for _, found in seen] == [f"0.19.2+{commit}" for commit, _ in seen]
assert seen[0] != seen[1]
EOF
cd "$tmp"
export CUDA_VISIBLE_DEVICES='' GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 GIT_CEILING_DIRECTORIES="$tmp"
project/venv/bin/python -W ignore finding.py
