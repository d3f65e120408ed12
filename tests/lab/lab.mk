# SPDX-License-Identifier: Apache-2.0
# A second Linux kernel, for what this machine's may lack (root; Debian packages are installed when missing).

LAB_PYTEST := tests/lab/run --or-skip -- $(PYTEST) -p no:cacheprovider

.PHONY: lab
lab: venv  ## a shell, or CMD='command', under a throw-away Linux kernel (root)
	@tests/lab/run $(CMD)

.PHONY: test-lab
test-lab: setup-lab  ## NFS, project quotas and I/O limits, under a throw-away Linux kernel (root, minutes)
	@# With the contract suite over pools on a file server, and a sample of their crash matrix.
	@$(if $(ARGS),$(LAB_PYTEST) -m "(lab or served) and not cluster" $(ARGS),tests/lab/all $(PYTEST))

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

# The second kernel changes hands with its processes at every system call; where others compute on its CPU, it would wait
# for them each time. Before them, it does not.
BEFORE_OTHERS = $(shell chrt --rr 1 true 2>/dev/null && echo chrt --rr 1)

.PHONY: test-cluster-nfs
test-cluster-nfs: setup-test  ## pods on two nodes over an NFS server: the cluster inside that kernel (root, Go, minutes)
	@tests/cluster/cluster build
	@tests/cluster/cluster image localhost/orlop:nfs
	@# In memory: containerd lays overlays there, and the root of that kernel is one itself.
	@ORLOP_CLUSTER_DIR=/dev/shm/cluster $(BEFORE_OTHERS) tests/lab/run --or-skip --memory 8G -- \
	    $(PYTEST) -p no:cacheprovider tests/lab/test_kubernetes.py $(ARGS)
