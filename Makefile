# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
# Idle threads of OpenMP must not spin: they would slow down the other test process.
export OMP_WAIT_POLICY := PASSIVE
VENV ?= .venv
BIN := $(VENV)/bin

# The oldest Triton that is supported: the tests compile the kernels with it too. It exists for Linux on x86-64 only.
export GAKERNELS_OLDEST_TRITON := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(abspath $(VENV))/triton-3.6.0)

# A Python of a version: the one on the path, or one that pyenv has.
find-python = $(firstword $(shell python$(1) -c 'import sys; print(sys.executable)' 2>/dev/null) \
	$(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python$(1)))
OLDEST_PYTHON ?= $(or $(call find-python,3.10),$(PYTHON))
OLDEST ?= $(VENV)-oldest
OLDEST_TESTS ?= tests
NEWEST ?= $(VENV)-newest

.PHONY: audit demo docs test test-all test-oldest test-newest test-matrix lint clean

# The pinned versions of requirements.txt are what is tested; pyproject.toml has the ranges that the library accepts.
$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(abspath $(VENV))/triton-3.6.0: $(VENV)/ready
	rm -rf $@.part
	$(BIN)/pip install --quiet --no-deps --target $@.part triton==3.6.0
	mv $@.part $@

# What the demo needs alone, for a quick start; `make test` adds the rest.
$(VENV)/demo: requirements.txt pyproject.toml
	test -e $(VENV)/ready || $(PYTHON) -m venv $(VENV)
	sed 's/\[.*\]//' requirements.txt > $(VENV)/constraints.txt
	test -e $(VENV)/ready || $(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[gguf]'
	touch $@

demo: $(VENV)/demo
	$(BIN)/gakernels demo

$(OLDEST)/ready: requirements-oldest.txt pyproject.toml
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --requirement requirements-oldest.txt
	$(OLDEST)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: lint $(GAKERNELS_OLDEST_TRITON)
	$(BIN)/pytest -m "not slow and not gpu" --numprocesses 2

test-all: lint $(GAKERNELS_OLDEST_TRITON)
	$(BIN)/pytest -m "not gpu" --numprocesses 2

# With the oldest versions that pyproject.toml allows. PyTorch brings the oldest Triton.
test-oldest: export GAKERNELS_OLDEST_TRITON :=
test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/pytest -m "not slow and not gpu" --numprocesses 2 $(OLDEST_TESTS)

# With the newest versions that pip finds.
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --upgrade --editable '.[dev]'
	$(NEWEST)/bin/pytest -m "not slow and not gpu" --numprocesses 2

# Each Python with the oldest and with the newest versions, eight runs of about 15 minutes and 6 GB of disk.
test-matrix: $(foreach version,3.10 3.11 3.12 3.13,matrix-$(version))

matrix-%:
	$(if $(call find-python,$*),,$(error there is no Python $* on the path or in pyenv))
	$(MAKE) test-oldest OLDEST_PYTHON=$(call find-python,$*) OLDEST=$(VENV)-$*-oldest
	rm -rf $(VENV)-$*-oldest
	$(MAKE) test-newest PYTHON=$(call find-python,$*) NEWEST=$(VENV)-$*-newest
	rm -rf $(VENV)-$*-newest

# The pages in docs/ as a site, in build/site. A link that leads nowhere is an error.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

# Licences of what is installed, from its metadata (the allowed ones: pyproject.toml), and known vulnerabilities.
audit: $(VENV)/ready
	$(BIN)/pip-licenses --format csv --output-file $(VENV)/licenses.csv
	$(BIN)/python .ci/audit.py

clean:
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
