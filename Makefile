# `make` alone makes the environment; every other target makes it first when it is missing or out of date.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SEED ?= 0
GRID ?= single_task
# Tests at a time; a debugger needs JOBS=0. Of the slow ones those of a file run one after another: some go on with what
# the one before has started. (5: none of the kind is among those asked for.)
JOBS ?= 2

# The first interpreter on this machine that is new enough.
PYTHON ?= $(shell for python in python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo $$python; break; }; done)
# uv of the machine when it has one, else the locked one, installed into the environment.
UV = $(shell uv --version >/dev/null 2>&1 && echo uv || echo $(BIN)/uv)

# What requirements.lock is made for.
LOCKED = --extra metaworld --extra eo1 --extra evo1 --extra groot --extra molmoact2 --extra multi_task_dit --extra pi --extra smolvla --extra vla_jepa --extra xvla --extra peft --extra pusht --extra gym_hil --extra dev --universal --python-version 3.12
# Where the environment with another LeRobot is made.
OTHER := build/lerobot_main

export UV_HTTP_TIMEOUT ?= 300

.DEFAULT_GOAL := setup
.PHONY: setup test test-lerobot-main check format bench grid demo lock clean help

setup: $(READY)  ## the environment, from requirements.lock

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.12 or newer is needed: install it, or say make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "'$(PYTHON) -m venv' failed: install Python's venv module (Debian: python3-venv)" >&2; exit 1; }

# The lock first, exactly; then this package on top of it, which can change no pin.
$(READY): requirements.lock pyproject.toml | $(BIN)/python
	@rm -f $@
	@$(UV) --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet --constraint requirements.lock uv
	@echo "Installing requirements.lock (several GB with torch's CUDA libraries on Linux; minutes the first time)"
	@$(UV) pip sync --compile-bytecode --python $(BIN)/python requirements.lock
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

test: setup  ## the tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(ARGS) || [ $$? -eq 5 ]
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m slow --durations=15 $(ARGS) || [ $$? -eq 5 ]

# As the lock, but for LeRobot and what it needs otherwise. MolmoAct2 is refused after 0.6.1 (docs/bases.md).
test-lerobot-main: setup  ## the fast tests against a checkout of LeRobot (SOURCE=folder)
	@test -f "$(SOURCE)/src/lerobot/__init__.py" || { echo "Name a checkout of LeRobot: make test-lerobot-main SOURCE=folder" >&2; exit 1; }
	@rm -rf $(OTHER)/source $(OTHER)/dist && mkdir -p $(OTHER) && cp -R $(SOURCE) $(OTHER)/source
	@$(UV) build --quiet --wheel --no-build-isolation --python $(BIN)/python --out-dir $(OTHER)/dist $(OTHER)/source
	@sed "s/\(lerobot\[.*\]\)>=[^\"]*/\1==$$(ls $(OTHER)/dist/*.whl | sed 's/.*lerobot-\([^-]*\)-.*/\1/')/" pyproject.toml > $(OTHER)/pyproject.toml
	@cp requirements.lock $(OTHER)/requirements.lock
	@$(UV) pip compile --quiet $(OTHER)/pyproject.toml $(LOCKED) --find-links $(OTHER)/dist --no-emit-find-links --output-file $(OTHER)/requirements.lock
	@$(UV) venv --quiet --allow-existing --python $(BIN)/python $(OTHER)/venv
	@$(UV) pip sync --quiet --python $(OTHER)/venv/bin/python --find-links $(OTHER)/dist $(OTHER)/requirements.lock
	@$(UV) pip install --quiet --python $(OTHER)/venv/bin/python --no-deps --reinstall-package lerobot $(OTHER)/dist/*.whl
	@$(UV) pip install --quiet --python $(OTHER)/venv/bin/python --no-deps --no-build-isolation --editable .
	HF_HUB_OFFLINE=1 $(OTHER)/venv/bin/python -m pytest -n $(JOBS) -m "not slow" -k "not molmoact2" $(ARGS)

check: setup  ## lint, format, types and the import contract
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## format and fix what can be fixed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup  ## the benchmarks: a table, and JSON under benchmarks/results
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/run.py $(ARGS)

grid: setup  ## a grid of learning runs, as far as it is missing (GRID=single_task ARGS="--jobs 2")
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.grid $(GRID) $(ARGS)

demo: setup  ## demonstrations, supervised training, PI-RL and evaluation (SEED=0)
	HF_HUB_OFFLINE=1 $(BIN)/python examples/metaworld_demo.py --seed $(SEED)

# `make lock` keeps the present pins where it can; `make lock ARGS=--upgrade` takes the newest.
lock: | $(BIN)/python  ## write requirements.lock anew from pyproject.toml
	@$(UV) --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet uv
	$(UV) pip compile pyproject.toml $(LOCKED) \
		--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
		--quiet --output-file requirements.lock $(ARGS)

clean:  ## remove the environment and everything generated
	rm -rf $(VENV) build dist outputs .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 20
