# SPDX-License-Identifier: Apache-2.0
"""The kinds of storage, by the names that a configuration calls them.

A new backend is one file here and one line in `BACKENDS`. A backend's module is imported when a pool uses it and not
before: a driver neither pays for, nor can be stopped by, what it does not use.
"""

import importlib
from typing import TYPE_CHECKING, cast

from csi_driver.config import PoolConfig
from csi_driver.errors import ConfigurationError

if TYPE_CHECKING:
    from csi_driver.backends.base import Backend

BACKENDS = {
    "btrfs": "BtrfsBackend",
    "directory": "DirectoryBackend",
    "image": "ImageBackend",
    "memory": "MemoryBackend",
    "nfs": "NfsBackend",
}
"""Name, which is also the module's, to class."""
_PROVISIONED = {("nfs", "image"): ("nfs_image", "NfsImageBackend")}
"""What a backend's `provisioning` makes another one of, whose pools are no others' either."""


def layout(pool: PoolConfig) -> str:
    """What a pool's volumes are: its backend's name, or that of the one that its `provisioning` makes of it."""
    return _PROVISIONED.get((pool.backend, str(pool.options.get("provisioning", ""))), (pool.backend,))[0]


def create(pool: PoolConfig) -> "Backend":
    """The backend of a pool. Touches no storage: `Backend.check` does.

    Raises:
        ConfigurationError: no such backend, or the pool's options are not its own.
    """
    kind = BACKENDS.get(pool.backend)
    if kind is None:
        raise ConfigurationError(
            f"{pool.where} backend {pool.backend!r}: no such backend; known: {', '.join(sorted(BACKENDS))}"
        )
    provisioning = str(pool.options.get("provisioning", ""))
    name, kind = _PROVISIONED.get((pool.backend, provisioning), (pool.backend, kind))
    module = importlib.import_module(f"{__name__}.{name}")
    return cast("Backend", getattr(module, kind)(pool))
