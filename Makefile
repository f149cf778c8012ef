# `make demo` and `make test` set up everything they need in $(VENV). To use an environment that is already active:
#   make demo PYTHON=python VENV=
PYTHON ?= python3
VENV ?= .venv
# Arguments for the commands, e.g. make demo DEMO="--seeds 3", make test PYTEST="-k nn", make bench BENCH=--quick.
DEMO ?=
LM ?=
TABLES ?=
QUICK ?=
BENCH ?= --isa native,avx512,avx2
# Some tests take minutes: a process that is done takes over what another has before it.
PYTEST ?= -n 2 --dist worksteal
# torch's CUDA builds bring their own. Beside a CPU build: what GPU machines with torch 2.11 have, and the table of machine
# code was made with.
TRITON := 'triton==3.6.0; platform_system == "Linux"'
GPU ?=
STATIC ?=
# One hour, or 10^7 executions if they come first; CI takes FUZZ_SECONDS=60. Or libFuzzer's own: make fuzz FUZZ="-runs=1000".
FUZZ_SECONDS ?= 3600
FUZZ ?= -runs=10000000 -max_total_time=$(FUZZ_SECONDS)
# Of make faults: kills of a training run at counted system calls, and at random moments.
KILLS ?= 1000
# The CUDA library, where nvcc is: for the GPUs of this machine, and for none where there are none, so that nobody waits
# for a build that cannot run here. CI builds all.
INQ_CUDA_ARCHS ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo native || echo none)
export INQ_CUDA_ARCHS
# What only a device shows first; then the tests of Triton's kernels, not interpreted.
GPU_TESTS = tests/test_gpu.py $(wildcard tests/test_triton_*.py)
# Where `make gpu` writes.
GPU_OUT = $(or $(OUT),bench/results)

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.built
endif

.PHONY: demo bars language-model tables bench bench-native static static-cuda gpu gpu-sanitize test test-integrations emulate mutants mutants-files sanitize fuzz faults lint format clean help

help:
	@echo "make demo      quantize a real network at 5, 4, 3 and 2 bits, in a few minutes (report: demo/report.html)"
	@echo "make bars      the demo, and its accuracies against what they must reach"
	@echo "make language-model   a language model in float32, INQ, plain and calibrated rounding (LM=--quick: seconds)"
	@echo "make tables    the paper's tables in small: INQ, DNS + INQ, TWN, BWN, Deep Compression (QUICK=1: minutes, no claims)"
	@echo "make bench     time every operator beside torch's, into bench/results/ (25 minutes; BENCH=--quick: one)"
	@echo "make bench-native   time products by plans of your own: NATIVE=\"m=64 / n_group=32\" (tests/native/bench_linear.cpp)"
	@echo "make static    compile every Triton kernel for six kinds of GPU, and count its instructions (needs no GPU)"
	@echo "make static-cuda   the same for the compiled CUDA library, as it is in the file"
	@echo "make gpu-sanitize   there, compute-sanitizer over the CUDA library's tests"
	@echo "make gpu       on a machine with one: the tests of its kernels, then the benchmarks (under 8 minutes)"
	@echo "make test      the whole test suite"
	@echo "make test-integrations   transformers, PEFT, vLLM and torchvision themselves, in environments of their own (.integrations/)"
	@echo "make emulate   CUDA kernels on the CPU, 20 schedules of each (make test runs 3)"
	@echo "make mutants   put known mistakes into copies of the code and see the tests catch them"
	@echo "make mutants-files   the same for files and the command line (ten minutes)"
	@echo "make sanitize   the C++ kernels' own tests under the address, undefined-behaviour and thread sanitizers"
	@echo "make fuzz      fuzz everything that reads files, an hour (FUZZ_SECONDS=60: a minute)"
	@echo "make faults    disks that fail and kill -9, at every system call of every save and in $(KILLS) places of a training run"
	@echo "make lint      ruff; make format rewrites"
	@echo "make clean     remove $(VENV), demo/ and caches"

demo: $(READY)
	$(PY) -m inq_kernels.cli demo $(DEMO)

bars: demo
	$(PY) tests/demo_bars.py demo/results.json

# Real numbers for docs/language_model: half an hour of a processor; LM=--quick takes seconds. Stopped, it goes on where it was.
language-model: $(READY)
	$(PY) examples/language_model.py $(LM)

# The paper's comparisons on small networks (docs/comparisons.md), into tables/. QUICK=1, into tables/quick/: everything
# runs, and no number means anything. Stopped, it goes on where it was.
tables: $(READY)
	$(PY) -m examples.tables $(if $(filter-out 0,$(QUICK)),--quick) $(TABLES)

bench: $(READY)
	$(PY) -m inq_kernels.cli bench --bars $(BENCH)

# One minute to build, then seconds.
bench-native: $(READY)
	$(PY) tests/native_bench.py $(NATIVE)

static: $(READY)
	$(PY) -m inq_kernels.cli bench static $(STATIC)

# What nvcc made: needs the library (INQ_CUDA_ARCHS=all make static-cuda builds it for all GPUs).
static-cuda: $(READY)
	$(PY) -m inq_kernels.cli bench static --library $(STATIC)

# Each part ends by itself: no test begins after 60 and 110 seconds, no case after 120; the build takes one minute at most.
# What was left out is counted in the report. Both backends are tested whatever the first one's tests say, and a test that
# fails does not hide the next. No speed without correct results: the benchmarks do not run if a test fails. The fragments
# come first, since they compile. What another torch than CI's warns of is shown, and is no error.
GPU_PYTEST = $(PY) -m pytest -p no:cacheprovider $$($(PY) tests/gpu_ready.py processes) -W default --maxfail=20 -rs
gpu: $(READY)
	$(PY) tests/gpu_ready.py
	$(if $(READY),,INQ_REQUIRE_NATIVE=1 $(PY) -m pip install --quiet --no-build-isolation --no-deps -e .)
	mkdir -p "$(GPU_OUT)"
	status=0; \
	INQ_GPU_BACKEND=cuda INQ_TESTS_WITHIN=60 timeout 105 $(GPU_PYTEST) --junitxml="$(GPU_OUT)/gpu-tests-cuda.xml" \
	  tests/test_gpu_fragments.py tests/test_gpu.py || status=$$?; \
	INQ_TESTS_WITHIN=110 timeout 150 $(GPU_PYTEST) --junitxml="$(GPU_OUT)/gpu-tests.xml" $(GPU_TESTS) || status=$$?; \
	exit $$status
	timeout 150 $(PY) -m inq_kernels.cli bench --device cuda --bars --seconds-per-case 0.15 --within 120 \
	  --out "$(GPU_OUT)/gpu" $(GPU)

# compute-sanitizer over the CUDA library's tests: memcheck, initcheck and synccheck must find nothing, racecheck nothing
# but what tests/racecheck-allowed.txt lists and explains. Needs a GPU; minutes.
gpu-sanitize: $(READY)
	$(if $(READY),,INQ_REQUIRE_NATIVE=1 $(PY) -m pip install --quiet --no-build-isolation --no-deps -e .)
	$(PY) tests/gpu_sanitize.py

test: $(READY)
	$(PY) -m pytest $(PYTEST)

# The oldest and the newest transformers, PEFT, vLLM's Python, and torchvision with a torch of its own, which takes 5 GB;
# INTEGRATIONS names some of the environments.
INTEGRATIONS ?=
test-integrations: $(READY)
	$(PY) tests/integrations/run.py $(INTEGRATIONS)

# Tests that use the emulator import its support.
emulate: $(READY)
	INQ_EMULATOR_SEEDS=20 $(PY) -m pytest $(PYTEST) $(shell grep -l support_emulator tests/test_*.py)

mutants: $(READY)
	$(PY) tests/mutants.py

# Takes ten minutes, so CI leaves it out.
mutants-files: $(READY)
	$(PY) tests/mutants_files.py

# A few minutes: two more builds of the kernels.
sanitize: $(READY)
	$(PY) tests/sanitize.py

# atheris has wheels for Linux and CPython 3.11 to 3.13; elsewhere pip needs clang to build it.
fuzz: $(READY)
	$(PY) -c "import atheris" 2>/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt atheris
	$(PY) tests/fuzz/run.py $(FUZZ)

# What make test does in seconds, at length: six minutes.
faults: $(READY)
	folder=$$(mktemp -d) && mkdir $$folder/a $$folder/b $$folder/c && \
	  $(PY) tests/faults/saves.py $$folder/a && \
	  $(PY) tests/faults/lives.py $$folder/b $(KILLS) && \
	  $(PY) tests/faults/lives.py $$folder/c 200 --by-time; \
	  status=$$?; rm -rf $$folder; exit $$status

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) .integrations demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

ifneq ($(strip $(VENV)),)
# torch first, and pinned: a looser requirement would fetch gigabytes of CUDA libraries.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 setuptools wheel ninja
	$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check $(TRITON)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[test]"
	@touch $@ $(VENV)/.built

# Changed C++ needs a compiler, not a new installation. After one there is nothing to do: make comes here all the same,
# since .ready has changed, and would build everything twice.
$(VENV)/.built: $(VENV)/.ready $(wildcard csrc/*.* csrc/*/*.*)
	test -e $@ -a -z "$$(find csrc -newer $@)" || $(PY) setup.py -q build_ext --inplace
	@touch $@
endif
