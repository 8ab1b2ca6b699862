# make demo  installs into .venv, then fine-tunes a small Stable Diffusion on scanned digits
# make demo-lora  pretrains one on digits 0 to 4, and teaches it 5 to 9 by LoRA
# make demo-class  the same for classes: a small DiT, in the latents of a small autoencoder
# make test  installs into .venv, then runs the linter, the type checker and the tests
# make test-lowest, make test-newest  the tests with the oldest versions allowed, and the newest
# A bare machine with Python 3.11 or newer is enough. TORCH_INDEX passes pip options for torch.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
TORCH_INDEX ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

# The tools must come from the environment and offline; one thread keeps the numbers repeatable.
export HF_HUB_OFFLINE = 1
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1

.PHONY: install demo demo-lora demo-class tests test test-lowest test-newest test-reliability docs release-check lint clean
.DEFAULT_GOAL := test

install: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c $(CONSTRAINTS) $(TORCH_INDEX) torch
	$(PIP) install --quiet -c $(CONSTRAINTS) -e ".[train,dev]"
	touch $@

demo: install
	$(BIN)/python examples/text_to_image/demo.py

demo-lora: install
	$(BIN)/python examples/text_to_image/demo_lora.py

demo-class: install
	$(BIN)/python examples/class_conditional/demo.py

lint: install
	$(BIN)/ruff check .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pyright --pythonpath $(BIN)/python

test: lint tests

tests: install
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

test-lowest:
	$(MAKE) tests VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

test-newest:
	$(MAKE) tests VENV=.venv-newest CONSTRAINTS=/dev/null

# The documents as a site, in build/site.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# What must hold of a release, beside `make test`.
release-check: install
	$(BIN)/python -m pytest -m "" tests/structure/test_packaging.py tests/structure/test_release.py

# Kills, two processes and resumes in full; the figures are printed.
test-reliability: install
	$(BIN)/python -m pytest -m reliability -rP $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest outputs build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
