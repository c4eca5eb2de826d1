# Each target does its own set-up: a Debian machine with python3 (and its venv module) and g++ is enough.
#
#   make test                      in .venv, made on first use
#   make test-gpu PYTHON=python3   with an interpreter that already holds torch, pytest and
#                                  scikit-build-core; nothing is downloaded
SYSTEM_PYTHON ?= python3
TORCH ?= torch==2.13.0
BUILD = --no-build-isolation -Cbuild-dir=build/{wheel_tag} --editable

ifeq ($(origin PYTHON),command line)
SETUP := into-given-python
else
PYTHON := .venv/bin/python
SETUP := .venv/.built
# Two files at a time, each in one thread: most are one thread's work. ARGS="-n0" for one after the
# other, as --pdb needs.
PARALLEL := -n2 --dist loadfile
endif
SOURCES := pyproject.toml CMakeLists.txt $(shell find build_support cmake csrc -type f)

.PHONY: setup demo test test-gpu test-slow test-install fuzz sanitize soak lint bench docs clean into-given-python
setup: $(SETUP)

demo: $(SETUP)
	$(PYTHON) examples/mla_decode.py $(ARGS)

test: $(SETUP)
	$(PYTHON) -m pytest $(PARALLEL) $(ARGS)

test-gpu: $(SETUP)
	$(PYTHON) -m pytest -m gpu $(ARGS)

# Trains the model of docs/accuracy.md the first time: minutes, and longer than a test may hang.
test-slow: $(SETUP)
	$(PYTHON) -m pytest -m slow -o faulthandler_timeout=3600 $(ARGS)

test-install: .venv/.tools
	SYSTEM_PYTHON=$(SYSTEM_PYTHON) TORCH='$(TORCH)' bash tests/packaging/install_matrix.sh

# Nightly: ten times what `make test` draws, and the CPU code under ASan and UBSan.
fuzz: $(SETUP)
	$(PYTHON) -m pytest tests/*/test_*_fuzz.py -o faulthandler_timeout=3600 --fuzz-cases=10000 --hypothesis-show-statistics $(ARGS)

sanitize: $(SETUP)
	PYTHON=$(PYTHON) bash tests/support/sanitize_cpu.sh $(ARGS)

# Minutes of one plan of calls, over and over: make soak ARGS="--minutes 8 --state soak.json"
soak: $(SETUP)
	$(PYTHON) tests/support/soak.py $(ARGS)

lint: .venv/.built
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/python tests/support/lint.py
	find csrc examples -name '*.h' -o -name '*.cpp' -o -name '*.cu*' | xargs .venv/bin/clang-format --dry-run -Werror

bench: $(SETUP)
	$(PYTHON) benchmarks/$(if $(shell command -v nvidia-smi),gpu,cpu).py $(ARGS)

# The API reference, from the docstrings; the pages are docs/*.md.
docs: $(SETUP)
	$(PYTHON) docs/reference.py build/docs

clean:
	rm -rf build .venv

# torch comes first and alone, so that nothing below can choose another one.
.venv/.torch:
	$(SYSTEM_PYTHON) -m venv .venv
	.venv/bin/python -m pip install '$(TORCH)'
	touch $@

.venv/.tools: pyproject.toml .venv/.torch
	.venv/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > $@.txt
	.venv/bin/python -m pip install cmake ninja -r $@.txt
	touch $@

.venv/.built: .venv/.tools $(SOURCES)
	.venv/bin/python -m pip install $(BUILD) '.[dev,demo]'
	touch $@

into-given-python:
	$(PYTHON) -m pip install --no-deps $(BUILD) .
