# make env    set up .venv           make train  the demo, from prompts to a reward curve
# make check  lint, types, layers    make test   the tests
# make lm     the same with a real model, SmolLM2-135M, on 2 cores (docs/lm.md)
# make test-slurm       the job scripts under a real Slurm of two virtual nodes; installs Slurm (Debian, root);
#                       SLURM="goes_on or refuses": those of these names
# make sglang-env       SGLang without CUDA, in .venv-sglang, 3 GB, for
# make test-sglang      tests against real SGLang servers
# make nemo-env         set up .venv-nemo: nemo-run and what it needs
# make test-nemo        nemo-run experiments, run on this machine
# make test-nemo-slurm  the same under a real Slurm
# make bench            the measured tables of docs/head.md
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
# Empty: the first Python of 3.12 or newer that runs (tools/find_python.sh).
PYTHON ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
NEMO_PIP := .venv-nemo/bin/python -m pip --disable-pip-version-check --quiet
SGLANG_PIP := .venv-sglang/bin/python -m pip --disable-pip-version-check --quiet

.PHONY: env nemo-env sglang-env check test test-unit test-dist test-e2e slurm test-slurm test-nemo test-nemo-slurm test-sglang train lm bench clean

env: .venv/.ready

# torch comes first and by name: without a GPU nothing may pull a CUDA build where a CPU build is to be had.
.venv/.ready: pyproject.toml constraints.txt tools/environment.sh tools/find_python.sh
	tools/environment.sh .venv $(PYTHON)
	$(PIP) install --constraint constraints.txt -e '.[dev]'
	touch $@

# nemo-run's dependencies hold anyio and httpx below what the trainer's environment has.
nemo-env: .venv-nemo/.ready

.venv-nemo/.ready: examples/nemo_run/requirements.txt tools/environment.sh tools/find_python.sh
	tools/environment.sh .venv-nemo $(PYTHON)
	$(NEMO_PIP) install -r examples/nemo_run/requirements.txt
	$(NEMO_PIP) install --no-deps -e .
	touch $@

# SGLang pins another transformers than the trainer: it lives apart, and is spoken to over HTTP.
sglang-env: .venv-sglang/.ready

.venv-sglang/.ready: sglang_cpu/requirements.txt constraints.txt tools/environment.sh $(wildcard sglang_cpu/*/*.py)
	tools/environment.sh .venv-sglang $(PYTHON)
	$(SGLANG_PIP) install --no-deps -r sglang_cpu/requirements.txt
	$(SGLANG_PIP) install --no-deps --force-reinstall ./sglang_cpu
	touch $@

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Threads only wait for each other on tensors as small as these.
test-unit test-dist test-e2e: export OMP_NUM_THREADS = 1
# Megatron compiles functions at import that nothing without a GPU calls: a fifth of the start of every process.
test-unit test-dist test-e2e: export TORCHDYNAMO_DISABLE = 1
# Compiled modules save another twentieth.
unexport PYTHONDONTWRITEBYTECODE

test: test-unit test-dist test-e2e

test-unit: env
	$(BIN)/python -m pytest -n 2 tests/unit tests/house

# Two sets of up to seven ranks each: 19 GB of memory. A file stays on one set, which makes its fixtures once.
test-dist: env
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/dist

test-e2e: env
	$(BIN)/python -m pytest tests/e2e

test-sglang: env sglang-env
	$(BIN)/python -m pytest tests/sglang

slurm:
	dpkg -s slurmctld slurmd slurm-client munge >/dev/null 2>&1 || \
	{ apt-get update -qq && apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge; }

test-slurm: env slurm sglang-env
	$(BIN)/python -m pytest tests/slurm $(if $(SLURM),-k "$(SLURM)")

test-nemo: env nemo-env
	$(BIN)/python -m pytest tests/nemo -m "not slurm"

test-nemo-slurm: env nemo-env slurm sglang-env
	$(BIN)/python -m pytest tests/nemo -m slurm

train: env
	test -f runs/demo/hybrid/config.json || $(BIN)/mtroll demo runs/demo
	# A warm start that was stopped is not continued but run again.
	test -f runs/demo-warm-start/summary.json || rm -rf runs/demo-warm-start
	test -f runs/demo-warm-start/summary.json || $(BIN)/mtroll sft examples/configs/cpu_warm_start.yaml
	$(BIN)/mtroll train examples/configs/cpu_troll.yaml resume=true

lm: env
	$(BIN)/python tools/smollm2.py runs/lm/base
	test -f runs/lm-answers/eval.json || $(BIN)/mtroll eval examples/configs/lm_answers.yaml
	$(BIN)/python tools/lm_demonstrations.py runs/lm-answers runs/lm/demonstrations.jsonl
	test -f runs/lm-warm-start/summary.json || rm -rf runs/lm-warm-start
	test -f runs/lm-warm-start/summary.json || $(BIN)/mtroll sft examples/configs/lm_warm_start.yaml
	test -f runs/lm-before/eval.json || $(BIN)/mtroll eval examples/configs/lm_before.yaml
	$(BIN)/mtroll train examples/configs/lm_troll.yaml resume=true
	test -f runs/lm-after/eval.json || $(BIN)/mtroll eval examples/configs/lm_after.yaml
	$(BIN)/python tools/lm_report.py runs/lm-before runs/lm-after

bench: env
	$(BIN)/python tools/bench_head.py --device cpu --json docs/bench_head_cpu.json
	$(BIN)/python tools/bench_step.py --json docs/bench_step_cpu.json
	$(BIN)/python tools/bench_tables.py

clean:
	rm -rf .venv .venv-nemo .venv-sglang .torch runs
