# SPDX-License-Identifier: Apache-2.0
"""What backends have in common whose pool is on a file server's export, which the controller mounts at the pool's root.

What volumes are there is each backend's own.
"""

from collections.abc import Sequence
from dataclasses import replace

from csi_driver.backends.parameters import PROVISIONING
from csi_driver.config import PoolConfig
from csi_driver.errors import ConfigurationError, invalid
from csi_driver.linux import export

FS_TYPE = "nfs"
PROVISIONINGS = ("directory", "image")
"""What a pool's volumes are, by its option and by a class's parameter, both called `provisioning`."""

_OPTIONS = ("lookupcache=positive",)
"""Of controllers: what another one has made is there at once, also for who has looked for it in vain before. nfs(5)."""


def source(pool: PoolConfig, server: str, path: str, mount_options: Sequence[str]) -> export.Source:
    """The pool's export.

    Raises:
        ConfigurationError: the path is none.
    """
    if not path.startswith("/"):
        raise ConfigurationError(f"{pool.where} path {path!r}: give the absolute path of an export")
    return export.Source(export.address(server, path), FS_TYPE, tuple(mount_options))


def ensure_mounted(pool: PoolConfig, wanted: export.Source) -> None:
    """Mount the export at the pool's root, if it is not.

    Raises:
        ConfigurationError: it cannot be, or something else is there.
    """
    standing = export.find_source(pool.root)
    if standing == wanted.source:
        return
    if standing is not None:
        raise ConfigurationError(
            f"{pool.where} root {str(pool.root)!r}: {standing} is mounted there: unmount it, or give the pool "
            "another root"
        )
    try:
        export.mount(replace(wanted, options=(*_OPTIONS, *wanted.options)), pool.root)
    except OSError as error:
        raise ConfigurationError(
            f"{pool.where}: {wanted.source} cannot be mounted at {pool.root}: {error}"
        ) from error


def check_provisioning(pool: PoolConfig, given: str, have: str) -> None:
    """Refuse a class that asks for another kind of volumes.

    Raises:
        InvalidArgument: says what this pool's are.
    """
    if given not in ("", have):
        remedy = f"volumes of pool {pool.name!r} are {have.replace('y', 'ie')}s: leave it out, or name another pool"
        if given in PROVISIONINGS:
            remedy += f', one with provisioning = "{given}"'
        raise invalid(f"parameters.{PROVISIONING}", given, remedy)
