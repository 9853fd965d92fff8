# make env    set up .venv           make train  the demo, from prompts to a reward curve
# make check  lint, types, layers    make test   the tests
# make test-slurm  the job scripts under a real Slurm of two virtual nodes; installs Slurm (Debian, root)
# make bench       the measured tables of docs/head.md
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH := 2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: env check test test-slurm train bench clean

env: .venv/.ready

# torch comes first and by name: without a GPU nothing may pull a CUDA build. The index already configured is
# asked for a CPU build before PyTorch's own. megatron-core comes without its dependencies, which would
# bring training frameworks that are not used here.
.venv/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(PIP) install --upgrade pip
	if command -v nvidia-smi >/dev/null; then $(PIP) install torch==$(TORCH); \
	else $(PIP) install torch==$(TORCH)+cpu 2>/dev/null || $(PIP) install torch==$(TORCH) --index-url $(CPU_INDEX); fi
	$(PIP) install --no-deps megatron-core==0.16.1
	$(PIP) install -e '.[dev]'
	touch $@

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

test: env
	$(BIN)/python -m pytest

test-slurm: env
	dpkg -s slurmctld slurmd slurm-client munge >/dev/null 2>&1 || \
	{ apt-get update -qq && apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge; }
	$(BIN)/python -m pytest tests/slurm

train: env
	$(BIN)/mtroll demo runs/demo
	test -f runs/demo-warm-start/summary.json || $(BIN)/mtroll sft examples/configs/cpu_warm_start.yaml
	$(BIN)/mtroll train examples/configs/cpu_troll.yaml resume=true

bench: env
	$(BIN)/python tools/bench_head.py --device cpu --json docs/bench_head_cpu.json
	$(BIN)/python tools/bench_step.py --json docs/bench_step_cpu.json
	$(BIN)/python tools/bench_tables.py

clean:
	rm -rf .venv runs
