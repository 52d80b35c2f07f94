# Python 3.11+ and make are all that these need; the environment is .venv. PYTHON=… says which Python it is
# made with (a program, without arguments); otherwise scripts/venv.sh chooses.
PYTHON ?=
PY := .venv/bin/python
BUF := tools/buf/node_modules/.bin/buf
# Bytecode and caches belong to whoever runs it; nothing of the caller's Python leaks in.
unexport PYTHONPATH PYTHONHOME

MINUTES ?= 10
SEED ?= 1

.PHONY: help demo up test check check-proto faults faults-mutants generate bench profile lock clean

help: ## Show what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: .venv/embedded ## Send real mails through all of it, show what happens, and exit
	@$(PY) -m mailgrpc demo

up: .venv/embedded ## Run all of it here until Ctrl-C
	@$(PY) -m mailgrpc up

test: .venv/dev ## Run the tests, on a real PostgreSQL and Valkey
	$(PY) -m pytest $(ARGS)

check: .venv/dev check-proto ## Lint, types, layers, contract, generated code
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

check-proto: .venv/dev $(BUF)
	$(PY) scripts/generate.py --check
	$(BUF) lint
	$(BUF) format -d --exit-code
	$(BUF) breaking --against . --against-config proto/released/buf.yaml

faults: .venv/dev ## Hurt everything for MINUTES (10) by SEED (1), and check the ledgers
	$(PY) -m tests.faults.scenarios
	$(PY) -m tests.faults --minutes $(MINUTES) --seed $(SEED)

faults-mutants: .venv/dev ## Take out one guard after the other: each must be noticed
	$(PY) -m tests.faults.scenarios --mutants

generate: .venv/dev ## Generate the stubs from proto/
	$(PY) scripts/generate.py

bench: .venv/dev ## Measure what it costs, against limits (ROW=enqueue for one row)
	$(PY) -m bench $(ROW)

profile: .venv/dev ## Show where the time of a row goes (ROW=enqueue, batch or drain)
	$(PY) -m bench.profile $(ROW)

lock: ## Pin the dependencies anew (needs uv)
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header \
	    pyproject.toml --all-extras --group dev -o requirements/dev.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header \
	    pyproject.toml --extra embedded --group build -c requirements/dev.txt \
	    -o requirements/embedded.txt

clean: ## Remove the environment and the local data
	rm -rf .venv .mailgrpc

# What runs; `dev` is a superset, so whoever has it needs no second look.
.venv/embedded: requirements/embedded.txt pyproject.toml | .venv/bin/python
	@test -e .venv/dev || $(MAKE) --no-print-directory install LOCK=requirements/embedded.txt
	@touch $@

.venv/dev: requirements/dev.txt pyproject.toml | .venv/bin/python
	@$(MAKE) --no-print-directory install LOCK=requirements/dev.txt
	@touch $@

.PHONY: install
install:
	@echo "installing $(LOCK) into .venv"
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r $(LOCK)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .

.venv/bin/python:
	@sh scripts/venv.sh "$(PYTHON)"

$(BUF): tools/buf/package-lock.json
	@command -v npm >/dev/null || { echo "make check needs npm, for buf"; exit 1; }
	npm ci --silent --no-audit --no-fund --prefix tools/buf
	@touch $@
