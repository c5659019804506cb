# make quickstart   set up, then the main job: data, a sweep of two algorithms, leaderboard, figures
# make test         set up, then the fast tests (what CI runs)
#
# TORCH_BACKEND chooses the build of torch: cpu, cu128, cu130, auto, ... Empty: the default build of
# the package index, which on Linux is CUDA.
VENV ?= .venv
PYTHON ?= python3
TORCH_BACKEND ?=
BIN := $(VENV)/bin
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-faults test-all check fmt smoke bench constraints clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## create the environment

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" $(BIN)/uv pip install --quiet \
	  --python $(BIN)/python $(if $(TORCH_BACKEND),--torch-backend=$(TORCH_BACKEND)) \
	  -c constraints.txt -e '.[dev,notebooks]'
	touch $@

quickstart: install  ## the main job, on generated data, in a few minutes
	$(BIN)/harness quickstart

test: install  ## fast tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations=20 -m "not slow and not gpu"

test-slow: install  ## slow tests: faults, full sweeps, compiled steps
	$(BIN)/python -m pytest -m "slow and not gpu"

test-faults: install  ## kills, hangs, full disks, lost nodes, 100,000 odd files: docs/reliability.md
	$(BIN)/python -m pytest -s -m "not gpu" tests/test_faults.py tests/test_cluster.py \
	  tests/test_failures.py tests/test_full_disk.py tests/test_fuzz.py tests/test_untrusted.py \
	  tests/test_slurm.py tests/test_watchdog.py tests/test_store.py

test-all: test test-slow  ## both

check: install  ## lint, format and types, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy algorithms results harness analysis

fmt: install  ## format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smoke: install  ## spec to figure on CPU in about a minute, in a throw-away folder
	set -e; home=$$(mktemp -d); trap 'rm -rf "$$home"' EXIT; \
	export MINARI_DATASETS_PATH="$$home/data" HARNESS_HOME="$$home/runs"; \
	$(BIN)/harness data make bandit2d; \
	$(BIN)/harness data make pointmaze/umaze --steps 20000; \
	$(BIN)/harness sweep experiments/smoke.yaml; \
	$(BIN)/harness leaderboard experiments/smoke.yaml; \
	$(BIN)/harness figures experiments/smoke.yaml

bench: install  ## all benchmarks, as ratios measured side by side
	set -e; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file; done

# One resolution for both. The package index's torch for Linux is the CUDA build; wheels in a folder
# could hide it. Without what only that build needs it is the lock of every other.
constraints: install  ## renew constraints.txt and docker/constraints-cuda.txt (review the difference)
	set -e; lock=$$(mktemp -d); trap 'rm -rf "$$lock"' EXIT; \
	env -u UV_FIND_LINKS -u UV_TORCH_BACKEND $(BIN)/uv pip compile --quiet --upgrade pyproject.toml \
	  --all-extras --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-header \
	  --no-annotate --no-emit-index-url --no-emit-find-links -o "$$lock/pins"; \
	for file in constraints.txt docker/constraints-cuda.txt; do \
	  grep '^#' $$file > "$$lock/new"; \
	  case $$file in \
	    constraints.txt) grep -vE '^(cuda|nvidia)-|^triton==' "$$lock/pins" ;; \
	    *) cat "$$lock/pins" ;; \
	  esac >> "$$lock/new"; \
	  cat "$$lock/new" > $$file; \
	done

clean:  ## remove the environment and caches, never results
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
