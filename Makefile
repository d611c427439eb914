# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
# Idle threads of OpenMP must not spin: they would slow down the other test process.
export OMP_WAIT_POLICY := PASSIVE
VENV ?= .venv
BIN := $(VENV)/bin

# The oldest Triton that is supported: the tests compile the kernels with it too. It exists for Linux on x86-64 only.
export GAKERNELS_OLDEST_TRITON := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(abspath $(VENV))/triton-3.6.0)

.PHONY: audit demo test test-all lint clean

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

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint $(GAKERNELS_OLDEST_TRITON)
	$(BIN)/pytest -m "not slow and not gpu" --numprocesses 2

test-all: lint $(GAKERNELS_OLDEST_TRITON)
	$(BIN)/pytest -m "not gpu" --numprocesses 2

# Licences of what is installed, from its metadata (the allowed ones: pyproject.toml), and known vulnerabilities.
audit: $(VENV)/ready
	$(BIN)/pip-licenses --format csv --output-file $(VENV)/licenses.csv
	$(BIN)/python .ci/audit.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
