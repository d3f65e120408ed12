# SPDX-License-Identifier: Apache-2.0
"""gRPC: everything between a socket and the driver's own types. Nothing beneath this package knows the wire."""

import os

# Read when grpc is loaded. Its fork handlers stop the world at every subprocess, for a child that never speaks gRPC.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
