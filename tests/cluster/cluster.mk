# SPDX-License-Identifier: Apache-2.0
# A real Kubernetes on this machine (root, Go >= 1.26; Debian packages are installed when missing).
CLUSTER_NODES ?= 2

.PHONY: cluster
cluster:  ## start a Kubernetes of CLUSTER_NODES=2 nodes on this machine (first time: 20 minutes of building)
	@tests/cluster/cluster up $(CLUSTER_NODES)

.PHONY: cluster-down
cluster-down:  ## remove the cluster: every process, mount, device, interface and file of it
	@tests/cluster/cluster down
