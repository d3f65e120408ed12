# SPDX-License-Identifier: Apache-2.0
"""Linux itself: system calls, ioctls and processes, and nothing of CSI.

The only package that imports `subprocess`, `ctypes` and `fcntl`. What a volume is, which mount is wanted
and what an error means to a caller are not its business: failures are OSError (errno, strerror, name) or
`run.CommandFailed`.
"""
