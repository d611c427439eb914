# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
# Idle threads of OpenMP must not spin: they would slow down the other test process.
export OMP_WAIT_POLICY := PASSIVE
VENV ?= .venv
BIN := $(VENV)/bin

# The oldest Triton that is supported: the tests compile the kernels with it too. It exists for Linux on x86-64 only.
export GAKERNELS_OLDEST_TRITON := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(abspath $(VENV))/triton-3.6.0)

# The oldest Python that is there: on the path, or among those that pyenv has.
OLDEST_PYTHON ?= $(firstword $(shell python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null) \
	$(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python3.10) $(PYTHON))
OLDEST := $(VENV)-oldest
OLDEST_TESTS ?= tests

.PHONY: demo test test-all test-oldest lint clean

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

demo: $(VENV)/ready
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

test: lint $(GAKERNELS_OLDEST_TRITON)
	$(BIN)/pytest -m "not slow and not gpu" --numprocesses 2

test-all: lint $(GAKERNELS_OLDEST_TRITON)
	$(BIN)/pytest -m "not gpu" --numprocesses 2

# With the oldest versions that pyproject.toml allows. PyTorch brings the oldest Triton.
test-oldest: export GAKERNELS_OLDEST_TRITON :=
test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/pytest -m "not slow and not gpu" --numprocesses 2 $(OLDEST_TESTS)

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
