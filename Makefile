# The commands of the README. `make demo` and `make test` are all that a fresh machine needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CHECKOV := $(VENV)/checkov/.installed

.PHONY: demo test test-quick lint format protos golden docs screenshots bench bench-full load simulate clean
.DEFAULT_GOAL := demo

# torch first and alone: a wheel for this machine's CPU or GPU, in the one version we test with.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[cloud,edge,training,dev]'
	touch $@

# The policy linter of deploy/kubernetes pins dozens of packages that others need newer: it has a place of its own.
$(CHECKOV): Makefile
	$(PYTHON) -m venv $(VENV)/checkov
	$(VENV)/checkov/bin/pip install --quiet --no-compile checkov==3.3.30
	touch $@

demo: $(INSTALLED)  ## start a cloud and an edge on this machine, make an image, say where it is
	$(BIN)/python deploy/run_demo.py

test: lint $(CHECKOV)  ## everything that needs no GPU and no real weights; ends with pytest's own closing line
# Three workers on two cores: the third works while others wait for a browser, a server or a time-out. One that crashes
# ends the run: xdist starts another in its place, which waits for ever for the rest of a file.
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test-quick: lint $(CHECKOV)  ## lint and every test that is not marked slow: for every save
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

lint: $(INSTALLED)  ## style, types, who may import whom, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python protos/generate.py --check
	$(BIN)/python docs/generate_cli.py --check
	$(BIN)/python deploy/kubernetes/make_rule.py --check

format: $(INSTALLED)  ## fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(INSTALLED)  ## regenerate the stubs from the .proto files
	$(BIN)/python protos/generate.py

golden: $(INSTALLED)  ## rewrite the golden files after a deliberate change
	$(BIN)/python -m tests.contract.golden

docs: $(INSTALLED)  ## regenerate docs/cli.md
	$(BIN)/python docs/generate_cli.py

screenshots: $(INSTALLED)  ## take the images of the page again; needs chromium
	$(BIN)/python -m tests.e2e.screenshots

bench: $(INSTALLED)  ## ratios inside one run, with the machine named; BENCH="--full" for full-size shapes
	$(BIN)/python -m tests.benchmarks.bench $(BENCH)

bench-full: $(INSTALLED)  ## real sizes against diffusers' own pipeline in one run; BENCH="--provider openvino"
	$(BIN)/python -m tests.benchmarks.bench_full $(BENCH)

load: $(INSTALLED)  ## real processes under many clients, for a quarter of an hour; LOAD="contention --tiny"
	$(BIN)/python -m tests.load.run $(LOAD)

simulate: $(INSTALLED)  ## a day against one, four, sixteen devices, in virtual time; SIMULATE="--table sd15-cpu --hours 24"
	$(BIN)/python -m tests.load.simulate $(SIMULATE)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
