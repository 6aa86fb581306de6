# Each target makes its own virtual environment, so a fresh machine needs python3 >= 3.11 and make.
PYTHON ?= python3
DEMO_VENV := .venv-demo
DEV_VENV := .venv-dev

.PHONY: demo test test-types lint docs bench clean

demo: $(DEMO_VENV)/ready
	$(DEMO_VENV)/bin/python -m jaxopt_ext.bench.demo

test: $(DEV_VENV)/ready
	$(DEV_VENV)/bin/python -m pytest -n auto

# Annotated types and shapes checked while the solvers run. Refusals of bad input are left out: there
# the checker would speak before the library does.
test-types: $(DEV_VENV)/ready
	$(DEV_VENV)/bin/python -m pytest -n auto tests/battery tests/solvers -k 'not refused' \
		--jaxtyping-packages=jaxopt_ext,beartype.beartype

lint: $(DEV_VENV)/ready
	$(DEV_VENV)/bin/ruff check .
	$(DEV_VENV)/bin/ruff format --check .
	$(DEV_VENV)/bin/lint-imports
	$(DEV_VENV)/bin/pyright --pythonpath $(DEV_VENV)/bin/python

docs: $(DEV_VENV)/ready
	$(DEV_VENV)/bin/python -m sphinx -n -W --keep-going -b html docs docs/_build/html

# All suites in their quick form, and the report.
bench: $(DEV_VENV)/ready
	$(DEV_VENV)/bin/python -m jaxopt_ext.bench run all --quick --out bench.jsonl
	$(DEV_VENV)/bin/python -m jaxopt_ext.bench report bench.jsonl -o report.html

$(DEMO_VENV)/ready: pyproject.toml
	$(PYTHON) -m venv --clear $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(DEMO_VENV)/bin/python -m pip install --quiet --editable '.[bench]'
	touch $@

$(DEV_VENV)/ready: pyproject.toml
	$(PYTHON) -m venv --clear $(DEV_VENV)
	$(DEV_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(DEV_VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(DEMO_VENV) $(DEV_VENV) build dist docs/_build docs/generated *.egg-info
