# SPDX-License-Identifier: Apache-2.0
"""All pools of one driver: which one a volume is in, which ones may take a new one."""

from collections.abc import Collection, Iterator, Mapping

from csi_driver.catalog import Home
from csi_driver.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted, invalid
from csi_driver.linux.export import address
from csi_driver.model import VolumeId
from csi_driver.pool import Pool


class Pools:
    """The pools by name, in the order of the configuration."""

    def __init__(
        self,
        pools: Mapping[str, Pool],
        default_pool: str = "",
        retired_tags: frozenset[str] = frozenset(),
        elsewhere: frozenset[str] = frozenset(),
    ) -> None:
        self._pools = dict(pools)
        self._default_pool = default_pool
        self._retired_tags = retired_tags
        self._elsewhere = elsewhere

    def __iter__(self) -> Iterator[Pool]:
        return iter(self._pools.values())

    def find(self, volume_id: str) -> tuple[Pool, Home] | None:
        """The pool and home of a volume, or None."""
        parsed = VolumeId.find(volume_id)
        pool = self._pools.get(parsed.pool) if parsed else None
        home = pool.catalog.find(volume_id) if pool else None
        return (pool, home) if pool and home else None

    def find_snapshot(self, snapshot_id: str) -> tuple[Pool, Home] | None:
        """The pool and home of a snapshot, or None."""
        parsed = VolumeId.find(snapshot_id)
        pool = self._pools.get(parsed.pool) if parsed else None
        home = pool.catalog.find_snapshot(snapshot_id) if pool else None
        return (pool, home) if pool and home else None

    def find_group(self, group_id: str) -> tuple[Pool, Home] | None:
        """The pool and home of a group of snapshots, or None."""
        parsed = VolumeId.find(group_id)
        pool = self._pools.get(parsed.pool) if parsed else None
        home = pool.catalog.find_group(group_id) if pool else None
        return (pool, home) if pool and home else None

    def has_group(self, group_id: str) -> bool:
        """Whether there is such a group, where much depends on it; see `Catalog.has_group`."""
        pool = self.named_of(group_id)
        return pool is not None and pool.catalog.has_group(group_id)

    def find_snapshot_name(self, name: str, meant: Collection[Pool]) -> tuple[Pool, Home] | None:
        """The snapshot of this name, in whichever pool it is; see `near`."""
        for pool in self.near(meant):
            home = pool.catalog.find_snapshot(pool.snapshot_id_of(name))
            if home is not None:
                return pool, home
        return None

    def get(self, volume_id: str) -> tuple[Pool, Home]:
        """The pool and home of a volume.

        Raises:
            NotFound: there is none on this node.
        """
        found = self.find(volume_id)
        if found is None:
            raise NotFound(
                f"volume {volume_id!r}: does not exist on this node (pools: {', '.join(self._pools)})"
            )
        return found

    def find_name(self, name: str, meant: Collection[Pool] = ()) -> tuple[Pool, Home] | None:
        """The volume of this name, in whichever pool it is; see `near`."""
        for pool in self.near(meant):
            home = pool.catalog.find(pool.id_of(name))
            if home is not None:
                return pool, home
        return None

    def near(self, meant: Collection[Pool]) -> Iterator[Pool]:
        """The pools that a call looks through that means some of them: those, and all that are of this machine.

        Not the others on servers: it would wait for one that is dead, which is nothing to it.
        """
        return (pool for pool in self if pool in meant or not pool.is_apart)

    def holding(self, *ids: str) -> list[Pool]:
        """The pools that volumes of these ids would be in."""
        parsed = [VolumeId.find(one) for one in ids]
        names = {one.pool for one in parsed if one is not None}
        return [pool for pool in self if pool.name in names]

    def named_of(self, volume_id: str) -> Pool | None:
        """The pool that a volume of this id would be in, whether it exists or not; None for foreign ids."""
        parsed = VolumeId.find(volume_id)
        pool = self._pools.get(parsed.pool) if parsed else None
        return pool if pool and parsed and pool.catalog.tag == parsed.tag else None

    def check_foreign(self, volume_id: str) -> None:
        """For a volume or snapshot that is to be deleted and is not here: make sure that it is nowhere.

        Raises:
            FailedPrecondition: its id names a pool this driver does not have, so it may exist there.
        """
        parsed = VolumeId.find(volume_id)
        if parsed is None or parsed.tag in self._retired_tags:
            return
        if self.named_of(volume_id) is not None:
            return
        raise FailedPrecondition(
            f"{volume_id!r}: belongs to a pool with tag {parsed.tag} that this node does not have: delete it "
            f"where that pool is, or, when the pool is gone for good, add {parsed.tag!r} to retired_tags"
        )

    def discard_leftover(self, made_id: str) -> None:
        """For one that is to be deleted and is not here: remove what a try of making it has left, if anything.

        Raises:
            Aborted: it cannot be removed yet, or another driver that has the pool is making it.
        """
        pool = self.named_of(made_id)
        if pool is not None:
            pool.discard_leftover(made_id)

    def check_elsewhere(self, volume_id: str) -> None:
        """For a volume that is not here and is to be changed: a caller that asks everybody must not give up for us.

        Raises:
            FailedPrecondition: its id names a pool this driver does not have.
        """
        parsed = VolumeId.find(volume_id)
        if parsed is not None and self.named_of(volume_id) is None:
            raise FailedPrecondition(
                f"{volume_id!r}: belongs to a pool with tag {parsed.tag} that this node does not have: the driver of "
                "the node with that pool has to be asked"
            )

    def candidates(self, parameters: Mapping[str, str]) -> list[Pool]:
        """The pools that may take a volume with these parameters, the one with most room first.

        Raises:
            ResourceExhausted: `pool` or `type` names what the configuration says that other nodes have.
            InvalidArgument: it names nothing that is known here.
        """
        name, label = parameters.get("pool", ""), parameters.get("type", "")
        server, share = parameters.get("server", ""), parameters.get("share", "")
        if server or share:
            return [self._exporting(server, share, name)]
        if name:
            self._check_here("pool", name, self._pools.keys())
            chosen = [self._pools[name]]
            if label and label not in chosen[0].config.classes:
                raise invalid(
                    "parameters.type", label, f"pool {name!r} does not carry it; leave one of the two out"
                )
            return chosen
        if label:
            self._check_here("type", label, {known for pool in self for known in pool.config.classes})
            chosen = [pool for pool in self if label in pool.config.classes]
        else:
            chosen = self._defaults()
        return sorted(chosen, key=Pool.room, reverse=True)

    def _exporting(self, server: str, share: str, name: str) -> Pool:
        """The pool on this export: no others are used than the configuration names."""
        known = {pool.backend.features.export.source: pool for pool in self if pool.backend.features.export}
        pool = known.get(address(server, share))
        if pool is None or name not in ("", pool.name):
            raise invalid(
                "parameters.server, share",
                f"{server}:{share}",
                f"no pool {name} is configured on it; exports: {', '.join(sorted(known)) or 'none'}".replace(
                    "  ", " "
                ),
            )
        return pool

    def named(self, name: str, field: str = "parameters.pool") -> Pool:
        """The pool of this name.

        Raises:
            InvalidArgument: there is none.
        """
        pool = self._pools.get(name)
        if pool is None:
            raise invalid(field, name, f"no such pool on this node; pools: {', '.join(sorted(self._pools))}")
        return pool

    def _check_here(self, key: str, value: str, known: Collection[str]) -> None:
        if value in known:
            return
        if value in self._elsewhere:
            raise ResourceExhausted(f"parameters.{key} {value!r}: other nodes have it, this one has not")
        raise invalid(
            f"parameters.{key}",
            value,
            f"no such {key} on this node, which knows {', '.join(sorted(known)) or 'none'}; correct the class, or, if "
            "other nodes have it, name it in `elsewhere` of this node's configuration",
        )

    def _defaults(self) -> list[Pool]:
        """Without `pool` and `type`: the configured default, the only pool, or any that keeps sizes."""
        if self._default_pool:
            return [self._pools[self._default_pool]]
        enforcing = [pool for pool in self if pool.backend.features.enforces_capacity]
        if not enforcing and len(self._pools) > 1:
            raise InvalidArgument(
                "parameters.pool: missing, and no pool here enforces sizes: name one of "
                f"{', '.join(sorted(self._pools))}"
            )
        return enforcing or list(self)
