# make help lists the targets.
PYTHON ?= $(shell command -v python3.11 2>/dev/null || echo python3)
# More arguments for pip, such as --extra-index-url https://download.pytorch.org/whl/cpu for a torch without CUDA.
PIP_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Several torch processes on few cores: a waiting thread must sleep, not spin.
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help venv test demo bench quality cards lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-7s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## create .venv and install the package with its development tools

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	@touch $@

test: venv ## run the tests in two processes, without the Hub
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests

demo: venv ## run the demonstration
	$(BIN)/python examples/demo.py

# Each script ends with an error if something misses its target; the others are to run all the same.
bench: venv ## measure speed, and write the figures into README.md: about four hours on 2 idle cores
	for script in few_rows speed "estimate --fresh" "serving --exported" lossless export_quality training generate_overhead; do \
		set -- $$script; script=$$1; shift; env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/$$script.py $$@ || true; \
	done
	$(BIN)/python benchmarks/readme.py

quality: venv ## train one row of the table of quality again, beside the stored one: 20 to 30 minutes
	$(BIN)/python benchmarks/quality.py --reproduce

cards: venv ## write model_cards/ anew, from the recorded results
	$(BIN)/python benchmarks/model_cards.py

lint: venv ## check style, format and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy src

clean: ## remove everything that can be made again, downloaded models excepted
	rm -rf $(VENV) build dist demo_output quality_work .pytest_cache .mypy_cache .ruff_cache
	find src tests examples -type d -name __pycache__ -prune -exec rm -rf {} +
