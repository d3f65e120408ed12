# SPDX-License-Identifier: Apache-2.0
# Every way to build, try and test Orlop; `make help` lists them.
.DEFAULT_GOAL := help
# Tests and benchmarks share one machine's mounts and loop devices.
.NOTPARALLEL:

BIN := .venv/bin
PYTEST := $(BIN)/pytest
BACKEND ?= image
# Directories of Python that may not all exist in every state of the repository.
SOURCES := $(wildcard csi_driver tests bench tools/*.py)
SCRIPTS = $(shell grep -rlE --include=* -m1 '^\#!/bin/(ba)?sh' tools .ci $(wildcard tests deploy))
QUICK := not (crash or soak or bench or cluster or lab)

##@ Try it

.PHONY: help
help:  ## this list
	@awk -F ':.*## *' '/^##@/ { printf "\n%s\n", substr($$0, 5) } \
	    /^[a-z-]+:.*##/ { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: setup-run  ## walk a real volume through its whole life on this machine (root; BACKEND=image|directory|btrfs)
	@$(BIN)/orlop demo --pool-backend $(BACKEND)

##@ Tests

.PHONY: test
test: setup-test  ## unit, conformance and kernel tests; those that need root skip without it
	$(PYTEST) -m "$(QUICK)" $(ARGS)

.PHONY: test-unit
test-unit: venv  ## pure logic: no root, seconds
	$(PYTEST) tests/unit -m "$(QUICK)" $(ARGS)

.PHONY: test-conformance
test-conformance: setup-test  ## the contract suite over every backend
	$(PYTEST) -m "conformance and $(QUICK)" $(ARGS)

.PHONY: test-kernel
test-kernel: setup-test  ## real mounts and loop devices (root), with a leak check after each test
	$(PYTEST) -m "kernel and $(QUICK)" $(ARGS)

.PHONY: test-crash
test-crash: setup-test  ## the crash matrix: every operation dies after every step (root, minutes)
	@$(if $(ARGS),$(PYTEST) -m crash $(ARGS),tests/crash/all $(PYTEST))

.PHONY: test-soak
test-soak: setup-test  ## many clients, and a driver killed every few seconds (root, minutes)
	$(PYTEST) -m soak $(ARGS)

.PHONY: sanity
sanity: setup-test  ## csi-sanity against a served driver (root, Go; BACKEND=image|directory|btrfs, ARGS="--settings xfs")
	@$(BIN)/python -m tests.sanity.run --backend $(BACKEND) $(ARGS)

##@ Measure

.PHONY: bench
bench: setup-test  ## latency and throughput of the calls, as ratios to their floor (root)
	$(BIN)/python -m bench $(ARGS)

.PHONY: bench-io
bench-io: setup-bench  ## data path with fio: each backend against the filesystem beneath it (root)
	$(BIN)/python -m bench.io $(ARGS)

##@ Develop

.PHONY: check
check: setup-check  ## all that needs no running driver: format, lint, types, layers, spelling, scripts, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(SOURCES)
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell
	@tools/shellcheck $(SCRIPTS)
	tools/proto --check

.PHONY: format
format: venv  ## let ruff format the code and mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: proto
proto: venv  ## generate csi_driver/rpc/pb anew from proto/
	tools/proto

##@ Set up (done by the targets above as they need it)

.PHONY: venv
venv:  ## make .venv, or bring it up to date with pyproject.toml
	@tools/venv

.PHONY: debian-packages
debian-packages:  ## install every Debian package of tools/debian-packages.txt that is missing (root)
	@tools/debian-packages run test check bench

.PHONY: setup-run setup-test setup-check setup-bench
setup-run:
	@tools/debian-packages run
	@tools/venv

setup-test:
	@tools/debian-packages run test
	@tools/venv

setup-check:
	@tools/debian-packages run check
	@tools/venv

setup-bench:
	@tools/debian-packages run test bench
	@tools/venv

.PHONY: clean
clean:  ## remove the virtual environment and every cache
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build

##@ A cluster, a second kernel (tests/cluster, tests/lab)

include $(wildcard tests/*/*.mk)
