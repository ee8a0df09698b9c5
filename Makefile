# One command each; the first one run also sets up .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# These import gradio, which is an extra.
WITHOUT_GRADIO := $(addprefix --ignore=src/expunge/studio/,handlers.py page.py theme.py)

demo: $(VENV)/ready      ## erase an object, a person and an artist, look and measure
	$(BIN)/python examples/forget_three.py

test: $(VENV)/ready      ## run the tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not browser"

check: $(VENV)/ready     ## lint, format, types, doctests and tests: what CI runs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --allow-untyped-defs --no-check-untyped-defs --disable-error-code arg-type tests training
	$(BIN)/python -m pytest --doctest-modules src $(WITHOUT_GRADIO)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not browser"

check-browser: $(VENV)/browser-ready  ## try the studio in Chromium
	BROWSER_TESTS=required $(BIN)/python -m pytest -n 2 --dist loadfile -m browser tests/test_studio_*.py

format: $(VENV)/ready    ## put the code into its format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/docs-ready ## build the documentation into site/, links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

help:                    ## say this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/docs-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/browser-ready: $(VENV)/ready scripts/install_chromium.sh
	scripts/install_chromium.sh
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,studio]' playwright
	touch $@

.PHONY: demo test check check-browser format docs help
