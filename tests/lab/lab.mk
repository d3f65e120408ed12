# SPDX-License-Identifier: Apache-2.0
# A second Linux kernel, for what this machine's may lack (root; Debian packages are installed when missing).

.PHONY: lab
lab: venv  ## a shell, or CMD='command', under a throw-away Linux kernel (root)
	@tests/lab/run $(CMD)

.PHONY: test-lab
test-lab: setup-test  ## NFS, project quotas and I/O limits, under a throw-away Linux kernel (root, minutes)
	@tests/lab/run --or-skip -- $(PYTEST) -m lab -p no:cacheprovider $(ARGS)
	@# Growing a mounted ext4 needs CAP_SYS_RESOURCE, which hardened machines withhold from root: here it is to be had.
	@tests/lab/run --or-skip -- $(PYTEST) -m kernel -k "growth or grown" -p no:cacheprovider \
	    tests/kernel/test_linux_filesystem.py tests/kernel/test_node.py
