# SPDX-License-Identifier: Apache-2.0
# A real Kubernetes on this machine (root, Go >= 1.26; Debian packages are installed when missing).
CLUSTER_NODES ?= 2

.PHONY: cluster
cluster:  ## start a Kubernetes of CLUSTER_NODES=2 nodes on this machine (first time: 20 minutes of building)
	@tests/cluster/cluster up $(CLUSTER_NODES)

.PHONY: cluster-down
cluster-down:  ## remove the cluster: every process, mount, device, interface and file of it
	@tests/cluster/cluster down

.PHONY: cluster-deploy
cluster-deploy: cluster  ## build the driver's image and install it in the cluster by its chart
	@tests/cluster/cluster deploy

.PHONY: test-cluster
test-cluster: SHELL := /bin/bash
test-cluster: venv cluster-deploy  ## every way a user meets a volume, in a real cluster; logs are shown on failure
	@# The verdict last: who reads only the end of this wants that, not a kubelet's last lines.
	@mkdir -p .cache
	@set -o pipefail; .venv/bin/pytest -m "cluster and not lab" $(ARGS) 2>&1 | tee .cache/test-cluster.log \
	    || { tests/cluster/cluster logs; tail -n 120 .cache/test-cluster.log; exit 1; }

.PHONY: bench-cluster
bench-cluster: CLUSTER_NODES = 1
bench-cluster: venv cluster-deploy  ## from a claim to a running pod against emptyDir, on a cluster of one node (15 minutes)
	.venv/bin/python -m bench.cluster $(ARGS)
