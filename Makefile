# Everything a person or CI does with this checkout. `make` alone explains.

PYTHON ?= python3
BIN := .venv/bin
# What the engine is built for is found out; CHORUS_LLAMA_BACKEND=cpu|cuda|vulkan says it instead.
SETUP := $(PYTHON) tools/setup.py

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help setup demo test lint policy format protos bench lock sbom clean

help: ## this text
	@echo "Chorus: a handful of machines answering as one private LLM service."
	@echo
	@awk -F ':[^#]*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  A machine that only coordinates needs no llama.cpp: $(PYTHON) tools/setup.py --no-dev --no-llama"
	@echo "  Pick the engine's backend: CHORUS_LLAMA_BACKEND=cpu|cuda|vulkan   Pick a Python: make PYTHON=python3.12 setup"

setup: ## .venv with all that development needs, llama.cpp built for this machine (minutes once, then kept)
	@$(SETUP)

demo: ## a mesh on this machine answers a question: start here
	@$(SETUP) --no-dev
	@$(BIN)/chorus demo

test: ## every check and every test; PYTEST="-k placement -x" narrows it
	@$(SETUP)
	@$(BIN)/python tools/check.py
	@$(BIN)/python tools/llama_server.py
	@if [ -f tests/interop/setup.sh ]; then bash tests/interop/setup.sh; fi
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(PYTEST)

lint: ## style, types, layers, protos, generated code, locks
	@$(SETUP) --no-llama
	@$(BIN)/python tools/check.py

policy: build/policy/bin/checkov ## checkov judges the manifests of deploy/k3s (kustomize >= 4.5), from a .venv of its own
	@$(SETUP) --no-llama
	@$(BIN)/python -m pytest tests/deploy/test_policy.py tests/deploy/test_checkov.py

build/policy/bin/checkov: requirements/policy.txt
	@$(PYTHON) -m venv --clear build/policy
	@build/policy/bin/python -m pip install --quiet --no-deps --require-hashes -r $<
	@touch $@

format: ## rewrite the code in the project's style
	@$(SETUP) --no-llama
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format .

protos: ## generate services/chorus/api from protos/
	@$(SETUP) --no-llama
	@$(BIN)/buf lint
	@$(BIN)/python tools/protos.py

BENCHMARKS := serving fairness engine speculation placement heartbeats hop failover fast_failing rolling rotation join revocation overload quotas simulation ensemble
# Half an hour and more by themselves, so only by name: ONLY=soak, ONLY=adaptive.
bench: ## measure, beside llama-server too, and judge (over an hour); ONLY="serving engine" picks, ARGS=--quick is a first look
	@$(SETUP)
	-@$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements/bench.txt
	@status=0; for name in $(or $(ONLY),$(BENCHMARKS)); do echo "## $$name"; echo; \
		$(BIN)/python benchmarks/$$name.py $(ARGS) || status=1; echo; done; exit $$status

lock: ## lock the dependencies anew after pyproject.toml changed; ARGS=--upgrade takes newer versions
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) tools/lock.py $(ARGS)

sbom: ## what Chorus is installed from, as CycloneDX, in chorus.cdx.json
	@$(SETUP) --no-llama
	@$(BIN)/python tools/sbom.py > chorus.cdx.json

clean: ## remove .venv and everything else that was made here (wheels kept for other checkouts stay)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	rm -rf tests/interop/node/node_modules
	find services tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
