# make env         set up .venv                    make train        the demo, from prompts to a reward curve
# make check       lint, types, layers             make test         the tests
# make sglang-env  SGLang without CUDA, for the    make test-sglang  tests against real SGLang servers
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SGLANG_PIP := .venv-sglang/bin/python -m pip --disable-pip-version-check --quiet
TORCH := 2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: env sglang-env check test test-sglang train clean

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

# SGLang pins another torch and transformers than the trainer: it lives apart, and is spoken to over HTTP.
sglang-env: .venv-sglang/.ready

.venv-sglang/.ready: sglang_cpu/requirements.txt $(wildcard sglang_cpu/*/*.py)
	$(PYTHON) -m venv .venv-sglang
	$(SGLANG_PIP) install torch==$(TORCH)+cpu 2>/dev/null || $(SGLANG_PIP) install torch==$(TORCH) --index-url $(CPU_INDEX)
	$(SGLANG_PIP) install --no-deps -r sglang_cpu/requirements.txt
	$(SGLANG_PIP) install --no-deps --force-reinstall ./sglang_cpu
	touch $@

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

test: env
	$(BIN)/python -m pytest --ignore tests/sglang

test-sglang: env sglang-env
	$(BIN)/python -m pytest tests/sglang

train: env
	$(BIN)/mtroll demo runs/demo
	test -f runs/demo-warm-start/summary.json || $(BIN)/mtroll sft examples/configs/cpu_warm_start.yaml
	$(BIN)/mtroll train examples/configs/cpu_troll.yaml resume=true

clean:
	rm -rf .venv .venv-sglang runs
