# SPDX-License-Identifier: Apache-2.0
"""Orlop, a Kubernetes CSI driver. This module holds the version and nothing else."""

__version__ = "0.1.0.dev0"
