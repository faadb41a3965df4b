PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m
SOURCES := pdserve engine kvtransfer prefill decode router sim pdctl bench docs tests

.PHONY: help setup run test check fmt proto docs bench bench-kv bench-cpu bench-engines bench-speculation bench-gpu test-gpu clean test-optimized chaos abort-matrix mutants sim-soak

help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## */\t/'

# The stamp follows what decides the environment, so `make setup` twice is free.
.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: .venv/.stamp ## make .venv with everything a developer needs

run: setup       ## start a cluster on the bundled model, ask it something, serve until Ctrl-C
	$(RUN) pdctl up --ask "Tell me a story about a fox." $(ARGS)

test: setup      ## all tests; pass ARGS="-k name"
	$(RUN) pytest -q $(ARGS)

check: setup proto docs ## format, lint, types, floors, sizes, generated files, fast tests
	git diff --exit-code -- pdserve/v1 docs deploy/cluster.toml
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(RUN) pytest -q -m "not slow"

# No check of what comes from outside may be an assert: without them everything still holds.
test-optimized: setup ## the fast tests under python -O
	PYTHONOPTIMIZE=1 $(RUN) pytest -q -m "not slow" $(ARGS)

sim-soak: setup  ## fresh simulated schedules, an hour of them; pass ARGS="--minutes 600 --jobs 2"
	$(RUN) sim $(or $(ARGS),--minutes 60)

chaos: setup     ## faults on real processes, told as a table; pass ARGS="--only NAME --out results.json"
	$(BIN)/python tests/chaos/run.py $(ARGS)

abort-matrix: setup ## aborts at every stage on a live cluster; pass ARGS="--out results.json"
	$(RUN) tests.chaos.abort_matrix $(ARGS)

mutants: setup   ## take each guard away in a copy; the tests have to notice
	$(RUN) tests.mutants.run $(ARGS)

fmt: setup       ## rewrite files in place
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

# The oldest toolchain we support writes the code; newer runtimes read it.
.venv/.proto-stamp: pyproject.toml
	$(PYTHON) -m venv .venv/proto
	.venv/proto/bin/pip install --quiet 'grpcio-tools==1.71.2' 'mypy-protobuf==3.6.0' 'setuptools<81'
	@touch $@

proto: .venv/.stamp .venv/.proto-stamp ## regenerate pdserve/v1 from proto/
	PATH=$(CURDIR)/.venv/proto/bin:$$PATH .venv/proto/bin/python -m grpc_tools.protoc -I proto \
	  --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. proto/pdserve/v1/*.proto

docs: setup      ## regenerate the pages that are written from the source
	PYTHONPATH=. $(BIN)/python docs/generate.py

bench: setup     ## end-to-end benchmark: TTFT, TPOT, tokens/s
	$(RUN) bench.end_to_end

bench-kv: setup  ## KV transfer against memcpy and ucx_perftest
	$(RUN) bench.kv_transfer

bench-cpu: setup ## steps of the engine against this machine's roofline; pass ARGS="--models 100m"
	$(RUN) bench.cpu $(ARGS)

bench-engines: setup ## the engine and the cluster beside vLLM, llama.cpp, transformers
	$(RUN) bench.engines $(ARGS)

bench-speculation: setup ## tokens per step, by who guesses
	$(RUN) bench.speculation $(ARGS)

bench-gpu: setup ## decode and prefill on a GPU against its copy bandwidth and GEMM rate
	$(RUN) bench.gpu $(ARGS)

test-gpu: setup  ## the tests that need a GPU
	$(RUN) pytest -q -m gpu $(ARGS)

clean:           ## remove the environment and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
