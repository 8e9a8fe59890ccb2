# Backcast: `make demo` shows the main job, `make test` proves it.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := service train otel fuzz dev

.DEFAULT_GOAL := help
.PHONY: help demo test test-long lint format lock licences picture openapi dashboard \
	bench-serving bench-feast soak fuzz clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/installed-apps  ## Train, serve, promote; a consumer that never retrains; a table
	$(BIN)/backcast demo

test: .venv/installed-dev  ## The whole suite, on real PostgreSQL and Redis
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile

test-long: .venv/installed-dev  ## What takes minutes by nature
	$(BIN)/python -m pytest -m long

lint: .venv/installed-dev  ## ruff, mypy strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed-dev  ## Put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: .venv/installed-dev  ## Resolve the lock files of requirements/ anew, one per extra
	$(call compile,requirements/build.in,build)
	$(call compile,--extra dev pyproject.toml requirements/torch-needs.in,dev)
	$(foreach extra,$(filter-out dev,$(EXTRAS)),$(call like-dev,--extra $(extra) pyproject.toml requirements/torch-needs.in,$(extra)))
	$(call like-dev,pyproject.toml,core)

picture: .venv/installed-dev  ## Draw the README's picture
	$(BIN)/python docs/draw_idea.py docs/idea.svg

openapi: .venv/installed-dev  ## Write docs/openapi.json from the code
	$(BIN)/python -m service.openapi > docs/openapi.json

dashboard: .venv/installed-dev  ## Write deploy/grafana/backcast.json from deploy/dashboard.py
	$(BIN)/python -m deploy.dashboard > deploy/grafana/backcast.json

licences: .venv/installed-dev  ## Write docs/licences.md from the lock files and what is installed
	$(BIN)/python -m tests.licences > docs/licences.md

bench-serving: .venv/installed-apps  ## How fast the service is: a table, from real servers under load
	$(BIN)/python benchmarks/serving.py $(ARGS)

bench-feast: .venv/installed-apps .venv-feast/installed  ## Only the comparison with Feast's feature server
	$(BIN)/python benchmarks/serving.py --only feast $(ARGS)

soak: .venv/installed-dev  ## Replicas under faults, every vector verified: make soak ARGS='--minutes 10'
	$(BIN)/python -m tests.soak $(ARGS)

fuzz: .venv/installed-dev  ## Hostile input, and figures: make fuzz ARGS='--minutes 10'
	$(BIN)/python -m tests.fuzz $(ARGS)

clean:  ## Remove what the targets made
	rm -rf .venv .venv-feast .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# torch is left to requirements/torch.txt: the index at hand decides which build it is.
define compile
$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header \
	--override requirements/without-torch.txt --no-emit-package torch \
	$(1) -o requirements/$(2).txt

endef

# A lock file that is there is kept to where possible: so all of them have the same versions, and
# any two can be installed together.
define like-dev
cp requirements/dev.txt requirements/$(2).txt
$(call compile,$(1),$(2))
endef

# The lock files are complete, so nothing is resolved; torch and what only its build needs come last.
PIP := $(BIN)/pip install -q --disable-pip-version-check
define install
$(PIP) --no-deps --require-hashes $(foreach file,build $(1),-r requirements/$(file).txt)
$(PIP) -r requirements/torch.txt
$(PIP) --no-deps --no-build-isolation -e .
$(BIN)/pip check --disable-pip-version-check
touch $@
endef

.venv/installed-dev: pyproject.toml requirements/dev.txt requirements/torch.txt | .venv/bin/python
	$(call install,dev)

.venv/installed-apps: pyproject.toml requirements/service.txt requirements/train.txt \
		requirements/torch.txt | .venv/bin/python
	$(call install,service train)

.venv-feast/installed:
	$(PYTHON) -m venv .venv-feast
	.venv-feast/bin/pip install -q --disable-pip-version-check 'feast[redis]==0.67.*'
	touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
