# SPDX-License-Identifier: Apache-2.0
"""A server's child that takes longer to be there than its orders may take: as on a machine with much else to do."""

import time

from csi_driver.linux import remote_worker

if __name__ == "__main__":
    time.sleep(1)
    remote_worker.serve(remote_worker.OPERATIONS)
