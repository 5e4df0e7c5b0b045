PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help demo test test-all test-slow test-consumers test-layouts test-upstream lint sweep bench study transfer dist docs clean

help:  ## What there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

$(VENV)/.installed: setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[demo,test]'
	@touch $@

demo: $(VENV)/.installed  ## Pre-train a small ViT plain and with MTE on real images, export, compare (6 minutes)
	$(BIN)/python -m benchmarks.demo $(ARGS)

test: $(VENV)/.installed  ## The tests (10 minutes at most on two cores)
	$(BIN)/python -m pytest $(ARGS)

test-all: $(VENV)/.installed  ## The tests on every Python there is, and on the oldest torch and timm (nox; most of an hour)
	$(BIN)/pip install --quiet nox
	$(BIN)/nox $(ARGS)

test-slow: $(VENV)/.installed  ## The tests that take long
	$(BIN)/python -m pytest -m slow $(ARGS)

test-consumers: $(VENV)/.installed  ## What timm models are loaded into: transformers, ONNX Runtime, ... (3 minutes)
	$(BIN)/pip install --quiet -e '.[consumers]'
	$(BIN)/python -W ignore -m pytest -m consumers --record benchmarks/results/consumers.json tests/test_consumers.py tests/test_hub.py tests/test_examples.py $(ARGS)
	$(BIN)/python -m benchmarks.tables docs/compatibility.md

test-layouts: $(VENV)/.installed  ## Checkpoints of many codebases, some from clones in UPSTREAM, and the table of docs/checkpoints.md (3 minutes)
	$(BIN)/pip install --quiet -e '.[consumers,upstream]'
	MTE_UPSTREAM=$(UPSTREAM) $(BIN)/python -W ignore -m pytest --record benchmarks/results/layouts.json tests/test_layouts.py $(ARGS)
	$(BIN)/python -m benchmarks.tables docs/checkpoints.md

test-upstream: $(VENV)/.installed  ## The patches on clones of the SSL repositories in UPSTREAM (a quarter of an hour)
	$(BIN)/pip install --quiet -e '.[upstream]'
	MTE_UPSTREAM=$(UPSTREAM) $(BIN)/python -m pytest -s -m upstream tests/test_upstream.py tests/test_upstream_dinov.py tests/test_transfer.py $(ARGS)

lint: $(VENV)/.installed  ## Formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sweep: $(VENV)/.installed  ## Wrap every architecture of timm and write what is supported (a quarter of an hour)
	$(BIN)/python -W ignore -m benchmarks.sweep $(ARGS)
	$(BIN)/python -m benchmarks.tables README.md docs/families/supported.md

bench: $(VENV)/.installed  ## What MTE costs a training step, beside the plain one (an hour and more)
	MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=68719476736 $(BIN)/python -W ignore -m benchmarks.speed $(ARGS)
	$(BIN)/python -m benchmarks.tables README.md benchmarks/README.md

study: $(VENV)/.installed  ## The paper's experiments, and benchmarks/REPORT.md of them (many hours; goes on where it stopped)
	$(BIN)/python -W ignore -m benchmarks.study $(ARGS)
	$(BIN)/python -W ignore -m benchmarks.study --costs
	$(BIN)/python -W ignore -m benchmarks.study.report

transfer: SIDE = 96
transfer: SIZE = 180 240
transfer: $(VENV)/.installed  ## Exports in WEIGHTS on cifar10, camvid and bccd in the folder DATA (an hour each on two cores)
	$(if $(WEIGHTS),,$(error WEIGHTS="EXPORT ..." names what to take, DATA=FOLDER where cifar10, camvid and bccd are))
	$(BIN)/pip install --quiet -e '.[bench]'
	for weights in $(WEIGHTS); do \
	    for task in "knn --data $(DATA)/cifar10 --size $(SIDE) --limit 10000" "linear --data $(DATA)/cifar10 --size $(SIDE) --limit 10000" \
	        "finetune --data $(DATA)/cifar10 --size $(SIDE) --limit 10000" \
	        "segment --data $(DATA)/camvid --size $(SIZE) --frozen --head linear" "segment --data $(DATA)/camvid --size $(SIZE) --channels 64" \
	        "detect --data $(DATA)/bccd --size $(SIZE) --channels 64 --frozen" "detect --data $(DATA)/bccd --size $(SIZE) --channels 64"; do \
	        $(BIN)/python -W ignore -m benchmarks.transfer $$task --weights $$weights $(ARGS) || exit 1; \
	    done; \
	done

dist: $(VENV)/.installed  ## Wheel and sdist, each tried in an empty environment
	$(BIN)/pip install --quiet build
	rm -rf dist build/empty
	$(BIN)/python -m build
	for package in dist/*; do \
	    $(PYTHON) -m venv --clear build/empty && build/empty/bin/pip install --quiet $$package && \
	    build/empty/bin/python -W ignore tests/smoke.py || exit 1; \
	done

docs: $(VENV)/.installed  ## The documentation, in build/site
	$(BIN)/pip install --quiet -e '.[docs]'
	$(BIN)/python -m benchmarks.tables docs/cost.md docs/compatibility.md
	$(BIN)/mkdocs build

clean:
	rm -rf $(VENV) build dist *.egg-info demo_output
