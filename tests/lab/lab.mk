# SPDX-License-Identifier: Apache-2.0
# A second Linux kernel, for what this machine's may lack (root; Debian packages are installed when missing).

LAB_PYTEST := tests/lab/run --or-skip -- $(PYTEST) -p no:cacheprovider

.PHONY: lab
lab: venv  ## a shell, or CMD='command', under a throw-away Linux kernel (root)
	@tests/lab/run $(CMD)

.PHONY: test-lab
test-lab: setup-lab  ## NFS, project quotas and I/O limits, under a throw-away Linux kernel (root, minutes)
	@# With the contract suite over pools on a file server, and a sample of their crash matrix.
	@$(if $(ARGS),$(LAB_PYTEST) -m "lab or served" $(ARGS),tests/lab/all $(PYTEST))

.PHONY: test-lab-crash
test-lab-crash: setup-test  ## the whole crash matrix of pools on a file server, there (root, half an hour)
	@$(LAB_PYTEST) -m "served and crash" $(ARGS)

.PHONY: bench-lab
bench-lab: setup-test  ## calls for volumes on file servers, there, as ratios to their floor (root, minutes)
	@mkdir -p .cache/bench
	@tests/lab/run --writable .cache/bench -- $(BIN)/python -m bench.lab $(ARGS)

.PHONY: setup-lab
setup-lab: setup-test
	@# There is no network in there: what is not built before cannot be had.
	@tools/csi-sanity || [ "$$CI" != true ]
