# Needs Python 3.11 and make.  make demo | test | docs | evidence | bench | gpu | browser | lint | format | clean
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
BENCH := .venv-bench/bin
INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test docs evidence browser lint format bench gpu clean
.DEFAULT_GOAL := test

demo: .venv/installed
	$(BIN)/python examples/char_transformer.py

test: lint browser
	$(BIN)/python -m pytest -rs

# Long runs behind figures of the docs, at full length.
evidence: .venv/installed
	$(BIN)/python -m pytest -m evidence -rs

# What the tests of TensorBoard's tab need: Debian's, where we may install it. They say so where they were left out, and in CI they fail.
browser:
	@has() { command -v chromium && command -v chromedriver; }; \
	has >/dev/null && exit; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing chromium, for the tests of TensorBoard's tab"; \
		{ apt-get update && apt-get install --yes --no-install-recommends chromium chromium-driver; } >/tmp/chromium.log 2>&1 || tail -5 /tmp/chromium.log; \
	fi; \
	has >/dev/null || echo "NO BROWSER: the tab of TensorBoard will NOT BE TESTED. It takes chromium and chromedriver; as root, make browser installs Debian's." >&2

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell README.md CONTRIBUTING.md CHANGELOG.md docs lightning_lowrank
	$(BIN)/proselint check README.md CONTRIBUTING.md CHANGELOG.md $$(find docs -name "*.md")

# The site, in site/; a link or a name that leads nowhere stops it.
docs: .venv/installed
	$(BIN)/python -m docs.site

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The peers that we measure ourselves against stay out of the environment of the tests.
bench: .venv-bench/installed
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BENCH)/python -m benchmarks.$$(basename $$script .py); done

# On a machine with a GPU, which needs no environment of ours: torch, lightning and pytest will do.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
gpu:
	PYTHONPATH=. $(GPU_PYTHON) -m pytest -c tests/gpu/pytest.ini tests/gpu
	PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.gpu

clean:
	rm -rf .venv .venv-bench .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .cache docs/api site runs

.venv/installed: pyproject.toml constraints.txt
	$(call install,.venv,.[dev])

.venv-bench/installed: pyproject.toml constraints.txt
	$(call install,.venv-bench,.[bench])
	@# nngeometry asks for it and never imports it; torchmetrics does import it, which fails where torch is built without CUDA.
	@$(BENCH)/python -m pip uninstall --quiet --yes torchvision
	@# benchmarks/galore_peers.py reads no more of them than their AdamW; galore-torch also asks for bitsandbytes.
	@$(BENCH)/python -m pip install --quiet --disable-pip-version-check --no-deps galore-torch==1.0 fira==1.0.2

define install
	@test -n "$(PYTHON)" || { echo "Python 3.11 was not found: put it on PATH, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "installing $(2) into $(1), a few minutes the first time"
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(1)/bin/python $(INSTALL) '$(2)'
	@touch $@
endef
