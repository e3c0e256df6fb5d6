# The two main commands are `make demo` and `make test`. You may run both again at any time.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DELETE_ON_ERROR:
.PHONY: demo space docs docs-serve test test-long test-gpu lint browser clean help

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo  ## the Gradio app on 127.0.0.1:7860, with the bundled models (no torch needed)
	$(BIN)/python app.py

space: $(VENV)/.demo  ## build/space: the demo as a Hugging Face Space, ready to push
	$(BIN)/python -m zoo.demo.space build/space

docs: $(VENV)/.dev  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.dev  ## the same on http://127.0.0.1:8000, updated as you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

test: $(VENV)/.dev browser lint  ## lint, types and all tests (a few minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-long: $(VENV)/.dev browser  ## the long tests (under 40 minutes on 2 cores), and docs/robustness.md with their figures
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m '(long or promise) and not gpu' \
		--junitxml build/robustness.xml; status=$$?; \
	$(BIN)/python -m benchmarks.robustness build/robustness.xml && exit $$status

test-gpu: $(VENV)/.dev  ## the tests that need a GPU; without one they are skipped, with the reason
	$(BIN)/python -m pytest -m gpu -rs

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

# Installs Debian's Chromium if apt is there. Without a browser, the tests that need one say that they skip.
browser:
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then :; \
	elif command -v apt-get && [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq chromium >/dev/null; \
	elif command -v apt-get && sudo -n true; then sudo apt-get update -qq && sudo apt-get install -y -qq chromium >/dev/null; \
	fi >/dev/null 2>&1 || true

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.demo

clean:  ## remove the environment and the files that tests leave
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .test-data
