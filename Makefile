# Every target that needs an environment makes it first; see scripts/setup.py.

# The first that runs: a version manager may put a python3.11 on the path that only answers "not installed".
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv/bin
SETUP = $(or $(PYTHON),$(error no python3.11 or python3 on the path; name one: make PYTHON=...)) scripts/setup.py

PYTEST_ARGS ?=
DEMO_ARGS ?=
# One worker has the tests with engines, which come first, the other the rest. TEST_WORKERS=0: all in this process.
TEST_WORKERS ?= 2
WORKERS = -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
BENCHES ?= bench/disk.py bench/eviction.py bench/fetch.py bench/lookup.py bench/registry.py bench/transport.py bench/vllm_ttft.py

# What is run imports the same modules in process after process, and set-up compiles none of them.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-fast test-verbs chaos bench lint clean setup setup-vllm

help: ## print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup-vllm ## two stock vLLM replicas, one serving the prefix that the other computed
	@$(VENV)/python -u examples/demo_vllm.py $(DEMO_ARGS)

test: setup-vllm ## all tests, real engines included (PYTEST_ARGS="-k name" for some)
	@$(VENV)/python -u -m pytest $(WORKERS) $(PYTEST_ARGS)

test-fast: setup ## the tests without engines
	@$(VENV)/python -u -m pytest $(WORKERS) -m "not vllm" $(PYTEST_ARGS)

test-verbs: setup ## the transport over RDMA, in a QEMU guest with soft-RoCE (Debian on x86-64; ten minutes)
	@$(VENV)/python -u scripts/verbs_guest/run.py $(PYTEST_ARGS)

chaos: setup ## bad days at length: 10,000 simulated ones of leases, 10,000 fetches among real ones
	@$(VENV)/python -u tests/property/test_lease_simulation.py 10000
	@PYTHONPATH=tests/integration $(VENV)/python -u tests/chaos/test_registry_server.py 10000

bench: setup-vllm ## the benchmarks; the last line of each is JSON (BENCHES="bench/fetch.py" for some)
	@for bench in $(BENCHES); do echo "== $$bench"; $(VENV)/python -u $$bench || exit 1; done

lint: setup ## ruff, formatting and types
	@$(VENV)/ruff check
	@$(VENV)/ruff format --check
	@$(VENV)/mypy

clean: ## remove the environment and all that tools left
	rm -rf .venv .venv-setup.log build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup:
	@$(SETUP)

setup-vllm:
	@$(SETUP) --vllm
