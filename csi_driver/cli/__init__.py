# SPDX-License-Identifier: Apache-2.0
"""The commands for people: plain clients of a driver's socket, and readers of its pools and of the kernel.

`orlop serve` is dispatched before this package is imported. Nothing here changes a pool; `demo` has one of its own.
"""
