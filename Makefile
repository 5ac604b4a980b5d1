# Every target sets up what it needs first; a second run starts at once.
PYTHON ?= python3
BIN := .venv/bin
CLUSTER_TESTS ?= tests/cluster tests/engine
# A worker for each core; `make test WORKERS=` has none, as `pytest path` has none. The order is kept: long files come first.
WORKERS ?= -n logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

.PHONY: help setup demo test test-cluster check images bench lock clean
help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup:  ## .venv with everything in it, llama.cpp built from source
	@$(PYTHON) scripts/setup.py

demo: setup  ## one YAML to a tested GGUF, on this machine
	@scripts/demo

test: setup  ## all tests that need no Kubernetes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) --ignore=tests/engine --ignore=tests/cluster

test-cluster: setup  ## tests on a real Kubernetes, built here as root with Go 1.26, or on that of KUBECONFIG
	@$(BIN)/python -m pytest $(WORKERS) $(CLUSTER_TESTS)

check: setup  ## lint, types, layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

images:  ## container images, with buildah, podman or docker; BASE, REPOSITORY, TAG
	@BASE="$(BASE)" REPOSITORY="$(REPOSITORY)" TAG="$(TAG)" $(PYTHON) scripts/images.py $(IMAGES)

bench: setup  ## how fast, compared with the obvious way
	@$(BIN)/python benchmarks/merge.py
	@$(BIN)/python benchmarks/quantize.py
	@$(BIN)/python benchmarks/transfer.py

lock: setup  ## new requirements/*.txt from pyproject.toml
	@$(BIN)/python scripts/lock.py

clean:  ## remove what set-up made here (not the caches)
	rm -rf .venv build
