# `make` alone prints the targets. Everything is installed into .venv/, nothing elsewhere.
# pip's own settings work as always: PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, a proxy, ...

PYTHON ?= python3
INSTALL = bin/python -m pip install --quiet --disable-pip-version-check
PYTEST = bin/python -m pytest -n 2
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=undefined

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo dev test lint types tests test-oldest test-sanitize registers bench bench-wkv format clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: .venv/.package ## write a story with the model in the box
	@echo '==> rwkv generate "Once upon a time"'
	@.venv/bin/rwkv generate "Once upon a time"

test: lint types tests ## lint, types and tests: what a change must pass

dev: .venv/.dev ## set up .venv for development
	@echo "==> ready: .venv/bin/pytest, .venv/bin/ruff, .venv/bin/mypy, .venv/bin/rwkv"

lint: .venv/.dev ## check format and style
	@echo "==> ruff"
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .

types: .venv/.dev ## check types
	@echo "==> mypy"
	@.venv/bin/mypy

tests: .venv/.dev ## run the tests
	@echo "==> pytest"
	@.venv/$(PYTEST)

test-oldest: .venv-oldest/.package ## run the tests on the oldest supported transformers
	@echo "==> pytest on the oldest supported transformers"
	@.venv-oldest/$(PYTEST) --ignore=tests/test_house.py --ignore=tests/test_readme.py

test-sanitize: .venv/.dev ## run the tests of the CPU kernels under AddressSanitizer and UBSan
	@echo "==> pytest under sanitizers"
	@CXX="g++ -g $(SANITIZE)" LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 \
	  .venv/$(PYTEST) tests/test_wkv4.py tests/test_wkv4_native.py tests/test_wkv4_gradients.py tests/test_mixing.py \
	  -k "cpu or mixing"

registers: .venv/.dev ## print registers and spills of the CUDA kernels
	@.venv/bin/python benchmarks/registers.py

bench: .venv/.dev ## time whole models beside their peers (minutes)
	@.venv/bin/python benchmarks/model.py

bench-wkv: .venv/.dev ## time the WKV operator alone, on the GPU if there is one
	@.venv/bin/python benchmarks/wkv.py

format: .venv/.dev ## rewrite the code in the house format
	@.venv/bin/ruff check --fix-only --quiet .
	@.venv/bin/ruff format .

clean: ## remove the environments and everything that was built
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Set-up. A step's stamp is written last, so a step that was interrupted is done again.
# torch comes before everything else: were it pulled in by another package, pip might choose
# another build of it. It also brings the setuptools that the package itself is built with.

.venv/.package: .venv/.python pyproject.toml constraints.txt
	@echo "==> installing torch (the first time this takes minutes)"
	@.venv/$(INSTALL) -c constraints.txt torch
	@echo "==> installing modeling-rwkv"
	@.venv/$(INSTALL) -c constraints.txt --no-build-isolation -e .
	@touch $@

.venv/.dev: .venv/.package
	@echo "==> installing what development needs"
	@.venv/$(INSTALL) -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

.venv-oldest/.package: .venv-oldest/.python pyproject.toml constraints-oldest.txt
	@echo "==> installing torch and the oldest supported transformers"
	@.venv-oldest/$(INSTALL) -c constraints-oldest.txt torch
	@.venv-oldest/$(INSTALL) -c constraints-oldest.txt --no-build-isolation -e '.[finetune,test]'
	@touch $@

.venv/.python .venv-oldest/.python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "This needs Python 3.11 or newer, and '$(PYTHON)' is not one." >&2; \
	  echo "Name one that is: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "==> creating $(@D) with $$("$(PYTHON)" --version)"
	@$(@D)/bin/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(@D)
	@touch $@
