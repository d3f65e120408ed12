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
test-cluster: venv cluster-deploy  ## every way a user meets a volume, in a real cluster; logs are shown on failure
	@.venv/bin/pytest -m "cluster and not lab" $(ARGS) || { tests/cluster/cluster logs; exit 1; }

.PHONY: bench-cluster
bench-cluster: CLUSTER_NODES = 1
bench-cluster: venv cluster-deploy  ## from a claim to a running pod against emptyDir, on a cluster of one node (15 minutes)
	.venv/bin/python -m bench.cluster $(ARGS)
