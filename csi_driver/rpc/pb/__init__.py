# SPDX-License-Identifier: Apache-2.0
"""Generated from proto/ by `make proto`; nothing here is written by hand."""
