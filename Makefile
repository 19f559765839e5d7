# make demo    set everything up, then watch the embedded model write, with its speed and a verdict
# make test    set everything up, then run the whole test suite
# make check   formatting, lint and types, as CI runs them
# make check-native  the kernels' own tests under AddressSanitizer with UBSan, then under ThreadSanitizer
# make gpu     on a machine with an NVIDIA GPU: its tests and figures (make gpu-probe: its memory and barriers alone);
#              make gpu-wheels before, where there is a network
# make format  rewrite the sources as `make check` wants them

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

NATIVE  := $(wildcard src/finial/kernels/cpu/*)
CUDA    := $(wildcard src/finial/kernels/cuda/* tests/cuda/* benchmarks/gpu/*.cuh)
CXX_SRC := $(filter %.cpp %.h %.hpp %.inc,$(NATIVE)) $(wildcard tests/native/*) $(CUDA)

.PHONY: demo test check gpu gpu-probe gpu-wheels check-native check-address check-thread format clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(VENV)/python:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here: install Python 3.11 or newer, or set PYTHON="; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) --version) is too old: finial needs 3.11; set PYTHON="; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The package, built in place: Python changes count at once, native ones when this runs again.
$(VENV)/package: $(VENV)/python pyproject.toml CMakeLists.txt $(NATIVE)
	$(PIP) install --quiet --editable .
	@touch $@

# torch goes first and alone: what comes after it must not choose a build with gigabytes of CUDA. The extras' packages are
# installed by name, since ".[test]" would build finial again.
$(VENV)/test-packages: $(VENV)/package tools/extras.py
	$(PIP) install --quiet "$(TORCH)"
	@$(BIN)/python tools/extras.py test > $(VENV)/test.txt
	$(PIP) install --quiet --requirement $(VENV)/test.txt
	$(PIP) install --quiet --no-deps reasoning-from-scratch
	@touch $@

$(VENV)/check-packages: $(VENV)/test-packages
	@$(BIN)/python tools/extras.py test dev > $(VENV)/check.txt
	$(PIP) install --quiet --requirement $(VENV)/check.txt
	@touch $@

demo: $(VENV)/package
	$(BIN)/finial run demo -p "ROMEO:" --max-tokens 160 --seed 1 --stats --verify

# Two files at a time: most tests keep one core busy.
test: $(VENV)/test-packages
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: $(VENV)/check-packages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SRC)

# No Python is needed for these, only cmake. Any report is an error.
CMAKE  ?= $(shell command -v cmake || echo $(BIN)/cmake)
SANITIZE_address := -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZE_thread  := -fsanitize=thread

check-native: check-address check-thread

check-address check-thread: check-%:
	@command -v $(CMAKE) >/dev/null || { echo "no cmake here: install it, or run make test first"; exit 1; }
	$(CMAKE) -S . -B build/$* -DFINIAL_NATIVE_TESTS=ON -DFINIAL_OPTIMIZE=-O1 \
	  -DCMAKE_CXX_FLAGS="-g1 -fno-omit-frame-pointer $(SANITIZE_$*)"
	$(CMAKE) --build build/$* --parallel $$(nproc 2>/dev/null || echo 2)
	TSAN_OPTIONS=halt_on_error=1 build/$*/finial_op_tests

format: $(VENV)/check-packages
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_SRC)

clean:
	rm -rf $(VENV) build dist src/finial/_native*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# On a machine with an NVIDIA GPU; nothing is fetched. What Python lacks there may lie as wheels in .whl.
GPU_PYTHON ?= python3
GPU_WHEELS := msgspec gguf

gpu:
	@if ls .whl/*.whl >/dev/null 2>&1; then \
	  $(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target build/gpu-site .whl/*.whl; fi
	PYTHONPATH=build/gpu-site $(GPU_PYTHON) -m benchmarks.gpu

# The micro-benchmarks of the persistent kernel alone, in half a minute.
gpu-probe:
	PYTHONPATH=build/gpu-site $(GPU_PYTHON) -m benchmarks.gpu --only machine,probe --name probe.json

gpu-wheels:
	$(GPU_PYTHON) -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform any -d .whl $(GPU_WHEELS)
