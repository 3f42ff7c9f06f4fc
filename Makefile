# make demo   installs, then compresses a small diffusion transformer on the embedded digits: runs/demo/report.html
# make demo-t2i   installs, then trains an elastic text-to-image supernet on captioned digits: runs/demo-t2i/report.html
# make demo-few-step   installs, then compresses one and distils it to four steps: runs/demo-few-step/report.html
# make demo-t2i-few-step   continues (or makes) runs/demo-t2i: every width in four steps, in that run's report
# make check   installs, then looks at the code and the docs: ruff, its formatter, mypy, mkdocs
# make results   installs, then puts what benchmarks/results/ holds into the tables of README and docs
# make test   installs, then runs the quick tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Two threads a process: the tested setting. Numbers in a report state the threads they were measured with.
export OMP_NUM_THREADS ?= 2
# Threads that wait for each other spin for microseconds before they sleep: never spinning made the demo's training 1.6
# times slower on two free cores, and spinning for long makes it ten times slower beside another busy process.
export GOMP_SPINCOUNT ?= 4000
export MKL_NUM_THREADS ?= $(OMP_NUM_THREADS)
export TOKENIZERS_PARALLELISM := false

OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

.PHONY: install demo demo-t2i demo-few-step demo-t2i-few-step check results test test-slow clean

install: $(INSTALLED)

# The constraint file pins the tested set, torch included; nothing is resolved freely. Where npm is, the runtime of web
# pages is fetched as well (pinned too); without it the rest works.
$(INSTALLED): setup.cfg setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(None if sys.version_info >= (3, 11) else \
	"edgedit_hf needs Python 3.11 or newer; $(PYTHON) is " + v + ". Use: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[test]'
	@if command -v npm >/dev/null; then $(BIN)/python -m edgedit_hf.export.web.runtime || true; fi
	@touch $@

demo: install
	$(OFFLINE) $(BIN)/edgedit train compress --config_file training/accelerate/cpu.yaml --config training/recipes/digits.yaml

demo-t2i: install
	$(OFFLINE) $(BIN)/edgedit train text-to-image --config_file training/accelerate/cpu.yaml --config training/recipes/digits-t2i.yaml

demo-few-step: install
	$(OFFLINE) $(BIN)/edgedit train compress --config_file training/accelerate/cpu.yaml --config training/recipes/digits-few-step.yaml

demo-t2i-few-step: install
	$(OFFLINE) $(BIN)/edgedit train text-to-image --config_file training/accelerate/cpu.yaml --config training/recipes/digits-t2i-few-step.yaml

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

results: install
	$(BIN)/python benchmarks/results.py

test: install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 GOMP_SPINCOUNT=0 $(OFFLINE) $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

# PART=demos, kills, ranks, export, browser, sweep or rest runs that part alone; every slow test is in one.
PART ?=
test-slow: install
	$(OFFLINE) $(BIN)/python -m pytest -q -m "$(or $(PART),slow)"

clean:
	rm -rf runs build dist .pytest_cache .ruff_cache .mypy_cache src/*.egg-info
	find src tests training benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
