# SPDX-License-Identifier: Apache-2.0
# A second Linux kernel, for what this machine's may lack (root; Debian packages are installed when missing).

.PHONY: lab
lab: venv  ## a shell, or CMD='command', under a throw-away Linux kernel (root)
	@tests/lab/run $(CMD)

.PHONY: test-lab
test-lab: setup-test  ## NFS and project quotas, under a throw-away Linux kernel (root, minutes)
	@tests/lab/run --or-skip -- $(PYTEST) -m lab -p no:cacheprovider $(ARGS)
