# make demo: from a bare Python 3.11+ to a distilled student and its report.   make quick: the same in a few minutes, on
# little text.   make test: everything CI checks.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Test files run side by side; a file's tests stay together, for the fixtures they share. They begin in the order of
# their names, the long ones of integration before the short ones of unit, so that no worker waits at the end.
WORKERS ?= 2
# Which tests: make test-long runs the long ones, which make test leaves out.
MARKED  ?= not long
TEACHER := teachers/smollm2-135m-instruct

# make docs: the documentation, in site/index.html.
.PHONY: quick demo test test-long docs lint types imports pytest format clean

quick demo:
	@$(PYTHON) .ci/bootstrap.py $(VENV) gguf eval
	@$(BIN)/kdscale get-teacher smollm2-135m-instruct $(TEACHER)
	@$(BIN)/kdscale run $@

test:
	@$(PYTHON) .ci/bootstrap.py $(VENV) dev
	@$(MAKE) --no-print-directory lint imports
	@$(MAKE) --no-print-directory -j 2 types pytest

docs:
	@$(PYTHON) .ci/bootstrap.py $(VENV) docs
	@$(BIN)/mkdocs build --strict
	@echo "open site/index.html"

test-long:
	@$(PYTHON) .ci/bootstrap.py $(VENV) dev
	@$(MAKE) --no-print-directory pytest MARKED=long

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

imports:
	$(BIN)/lint-imports

# Tests start hundreds of processes: where Python writes no bytecode, each would compile kdscale again.
pytest:
	@$(BIN)/python -m compileall -q kdscale kernels launch
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
		--durations 40 -m "$(MARKED)"

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
