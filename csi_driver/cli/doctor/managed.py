# SPDX-License-Identifier: Apache-2.0
"""The backings of managed pools: whether they can be made and mounted here, what they hold, and what is beneath them.

Changes nothing, but that a kernel loads the filesystem's module when it is asked whether it has it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from csi_driver import backing
from csi_driver.backing import mounted
from csi_driver.backing.identity import State
from csi_driver.cli import words
from csi_driver.cli.doctor.finding import Finding, error, ok, warning
from csi_driver.config import BackingConfig, PoolConfig
from csi_driver.errors import ConfigurationError
from csi_driver.linux import files, mount

REFUSED = "the driver refuses to start"


def look_at_backing(area: str, pool: PoolConfig, config: BackingConfig) -> Iterator[Finding]:
    """The file or device of a managed pool."""
    problem = backing.unable(config)
    if problem:
        yield error(area, problem, f"the pool's own filesystem could not be mounted: {REFUSED}", "see there")
    try:
        content = backing.inspect(pool, config)
    except (OSError, ConfigurationError) as failure:
        yield error(area, f"{config.target}: {failure}", REFUSED, "correct the path, or bring it back")
        return
    if content is None or content.state in (State.BLANK, State.HALF_MADE):
        holds = f"holds {content.what}" if content else "is not there"
        yield ok(area, f"{config.target} {holds}: the driver makes the pool's {config.fs_type} there")
    elif content.state is State.FOREIGN or content.what != config.fs_type:
        yield error(
            area,
            f"{config.target} holds {content.what}",
            f"Orlop has not made that for this pool, as {config.fs_type}: {REFUSED}, and touches nothing",
            "give another, or clear it if that may be lost",
        )
        return
    else:
        yield ok(area, f"{config.target} holds the pool's own {content.what}, uuid {content.uuid}")
    if not config.is_device:
        yield from _look_at_host(area, config)
    yield _look_at_mount(area, pool)


def _look_at_mount(area: str, pool: PoolConfig) -> Finding:
    if mount.find_mounted(pool.root) is None:
        try:
            mounted.check_empty(pool)
        except FileNotFoundError:
            pass  # made by the driver
        except ConfigurationError as failure:
            return error(area, str(failure), REFUSED, "see there")
        return ok(area, f"{pool.root}: not mounted; the driver does it when it starts")
    target = os.path.realpath(pool.root)
    if any(one.shared for one in mount.mounts() if one.target == target):
        return ok(area, f"{pool.root}: mounted, for the node")
    return warning(
        area,
        f"{pool.root}: mounted in this mount namespace alone",
        "in a pod, the pool's mount would end with it, and the node's volumes would lose theirs at its next start",
        "mount the directory above it into the pod with mountPropagation: Bidirectional; outside of pods, leave it",
    )


def _look_at_host(area: str, config: BackingConfig) -> Iterator[Finding]:
    above = next(path for path in config.target.parents if path.is_dir())
    free, size_bytes = files.usage(above).free_bytes, config.size_bytes
    missing = size_bytes - _allocated(config.target)
    told = f"{config.target}: {words.size(max(0, missing))} of {words.size(size_bytes)} still to come, {words.size(free)} free"
    if missing <= free:
        yield ok(area, told)
    elif config.preallocate:
        yield error(
            area, told, f"`preallocate` takes all of it at the start: {REFUSED}", "free some, or lower `size`"
        )
    else:
        yield warning(
            area,
            told,
            "the pool has no more room than its file's disk; if others fill that, writes in volumes fail",
            "leave it so if the disk is the pool's alone; else lower `size`, or set preallocate = true",
        )


def _allocated(file: Path) -> int:
    try:
        return file.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
