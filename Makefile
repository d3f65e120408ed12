# SPDX-License-Identifier: Apache-2.0
.DEFAULT_GOAL := help
.PHONY: venv
venv:  ## make .venv, or bring it up to date with pyproject.toml
	@tools/venv
