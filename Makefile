# Two commands matter: `make demo` and `make test`. Both need only Python 3.11+ and make.
.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs bench fuzz soak clients clean

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
DOCS_VENV ?= .venv-docs
# Without an NVIDIA driver the CPU build of torch is installed, and tests run on all cores, with one worker more, since
# some wait for processes; with a driver they share a GPU.
CONSTRAINTS ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo -c constraints-cpu.txt)
WORKERS ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 0 || echo $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )))
# Threads that wait for each other take longer than one. Bytecode is kept even if the environment says not to, as tests
# start hundreds of processes. Plugins are named, because pytest rewrites every file of those that it finds by itself.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(BIN)/python -m pytest \
	-p xdist.plugin -p pytest_timeout -p _hypothesis_pytestplugin

help:  ## Say what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# pip would compile thirty times as many files of the packages as are imported; Python compiles those that are.
$(VENV)/.installed: pyproject.toml constraints-cpu.txt
	@test -n "$(PYTHON)" || { echo "nanoflow needs Python 3.11 or newer; set PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --no-compile $(CONSTRAINTS) -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## Serve the embedded model and ask it through the official openai client
	$(BIN)/python tools/demo.py

test: $(VENV)/.installed  ## Run the tests, of long sweeps a fixed part
	$(PYTEST) -n $(WORKERS) --maxprocesses 8 --dist worksteal -m 'not timing'
	$(PYTEST) -m timing $$(grep -rl --include='test_*.py' 'mark\.timing' tests)

test-all: export NANOFLOW_ALL_CASES = 1
test-all: test  ## Run the tests, of long sweeps every case

lint: $(VENV)/.installed  ## Check style, types and the layers between packages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPY_NUM_WORKERS=2 $(BIN)/mypy
	$(BIN)/lint-imports

$(DOCS_VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "nanoflow needs Python 3.11 or newer; set PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(DOCS_VENV)
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		> $(DOCS_VENV)/requirements.txt
	$(DOCS_VENV)/bin/pip install -q --disable-pip-version-check -r $(DOCS_VENV)/requirements.txt
	@touch $@

docs: $(DOCS_VENV)/.installed  ## Build the documentation as a site in site/, and check every link of it
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	$(DOCS_VENV)/bin/python tools/check_site.py site

bench: $(VENV)/.installed  ## Measure the scheduler and CPU decode against their targets
	$(BIN)/python -m benchmarks.engine.scheduler --check
	$(BIN)/python -m benchmarks.engine.cpu_decode --check

fuzz: $(VENV)/.installed  ## Send 100,000 hostile inputs to a server and to the loaders of files
	PYTHONPATH=. $(BIN)/python -m benchmarks.robustness.fuzz

soak: $(VENV)/.installed  ## Load a server for 20 minutes and see that memory stays flat
	PYTHONPATH=. $(BIN)/python -m benchmarks.robustness.soak --check

clients: $(VENV)/.installed  ## Ask a server through the client libraries that people use (installs them)
	$(BIN)/python tools/clients.py

clean:  ## Remove the environment and caches
	rm -rf $(VENV) $(DOCS_VENV) site .venv-clients .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
