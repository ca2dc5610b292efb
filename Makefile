# `make` lists the targets. Every target makes the virtual environment itself.
VENV := .venv
PYTHON := $(VENV)/bin/python
SETUP := $(VENV)/.installed
RUN ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo report docs pictures bench ablation-allocation test check

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(SETUP)  ## make .venv with the pinned requirements and this package

$(SETUP): requirements.txt requirements-torchao.txt pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet -r requirements.txt
	$(PYTHON) -m pip install --quiet --no-deps --upgrade --target $(VENV)/torchao -r requirements-torchao.txt
	$(PYTHON) -m pip install --quiet --no-deps -e .
	touch $@

demo: $(SETUP)  ## prune the embedded model with the whole method; ends with runs/demo/report.html
	$(PYTHON) -m ftp_lightning run --output $(RUN)

report: $(SETUP)  ## write the report of RUN (runs/demo) anew
	$(PYTHON) -m ftp_lightning report --run $(RUN)

docs: $(VENV)/.docs  ## build these pages into build/site, strictly
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

$(VENV)/.docs: $(SETUP) requirements-docs.txt
	$(PYTHON) -m pip install --quiet -r requirements-docs.txt
	touch $@

pictures: $(SETUP)  ## docs/pictures of reports, by a headless Chromium; fails where its console complains
	$(PYTHON) docs/schedules_study.py runs/schedules-study
	$(PYTHON) -m ftp_lightning report runs/schedules-study
	$(PYTHON) docs/screenshots.py $(RUN)/report.html demo runs/schedules-study/report.html study

bench: $(SETUP)  ## time and memory of a random 110 M Llama on the CPU, dense and pruned
	$(PYTHON) -m ftp_lightning benchmark --config experiments/benchmark_cpu.yaml

ablation-allocation: $(SETUP)  ## compare ways to a schedule at equal forward tokens (hours)
	$(PYTHON) experiments/schedules.py

test: $(SETUP)  ## the fast tests, offline
	$(PYTHON) -m pytest -q -m "not slow and not gpu"

check: $(SETUP)  ## lint, format, tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(MAKE) test
