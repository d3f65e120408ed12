# SPDX-License-Identifier: Apache-2.0
"""A controller's work on exports; and what becomes of it when one of two servers dies: the other's volumes do not notice."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver import apart, backends
from csi_driver.config import parse
from csi_driver.errors import Aborted, Error, InvalidArgument, Unavailable
from csi_driver.linux.remote import Breaker, Servers
from csi_driver.model import GIB, MIB, AccessMode, Source, SourceKind, TopologyRequirement
from csi_driver.pool import Pool
from csi_driver.pools import Pools
from tests.lab.disks import Disk, run
from tests.lab.hosts import GaneshaServer, KernelServer, processes, wait_for
from tests.rig import Rig, capability, volume

POOL = """
[pools.{name}]
backend = "nfs"
server = "{server}"
path = "{path}"
root = "{root}"
mount_options = {options}
"""
DEADLINES = apart.Deadlines(open_s=15.0, call_s=6.0, copy_s=8.0)
PATIENT = apart.Deadlines(open_s=60.0, call_s=60.0, copy_s=120.0)
"""For a server that stays well: this machine may be busy with other things for a while."""
MANY = (capability(AccessMode.MULTI_NODE_MULTI_WRITER),)
Start = Callable[..., GaneshaServer]
AnyServer = GaneshaServer | KernelServer


@pytest.fixture
def start(make_disk: Callable[..., Disk]) -> Iterator[Start]:
    started: list[GaneshaServer | KernelServer] = []

    def make(kind: type[GaneshaServer] | type[KernelServer] = GaneshaServer) -> GaneshaServer | KernelServer:
        disk = make_disk("xfs", size="320M")
        (disk.target / "share").mkdir()
        started.append(kind(disk.target))
        started[-1].start()
        return started[-1]

    yield make  # type: ignore[misc]  # most tests want a server that can be frozen
    for server in started:
        server.remove()


@pytest.fixture
def open_driver(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []
    breakers: list[Breaker] = []

    def make(
        path: str = "/share", options: Sequence[str] = (), warm: bool = True, **servers: AnyServer
    ) -> Rig:
        known, opened = Servers(), {}
        for name, server in servers.items():
            text = POOL.format(
                name=name, server=server.address, root=tmp_path / name, path=path, options=list(options)
            )
            configured = parse('scope = "shared"\n' + text).pools[name]
            local = backends.create(configured)
            breaker = known.breaker(local.features.server)
            breakers.append(breaker)
            deadlines = DEADLINES if name == "dead" else PATIENT
            opened[name] = Pool(configured, *apart.stand_ins(configured, local, breaker, deadlines))
        rigs.append(Rig(Pools(opened)))
        for pool in opened.values() if warm else ():
            # How long a child takes to start and mount is not what these tests are about.
            repeated(pool.catalog.ids)
        for name, server in servers.items() if warm else ():
            if isinstance(server, KernelServer):
                wait_out_grace(rigs[-1], name)
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        if line.split()[2].startswith("nfs"):
            run("umount", "-l", line.split()[1])
    # Children that a dead server held end with it.
    wait_for(lambda: not any(breaker.left_behind() for breaker in breakers), 180)


def create(rig: Rig, pool: str, name: str, source: Source | None = None, **parameters: str) -> str:
    asked = volume(name, 16 * MIB, capabilities=MANY)
    request = replace(asked, parameters={"pool": pool, **parameters}, source=source)
    return rig.controller.create_volume(request).id


def wait_out_grace(rig: Rig, pool: str) -> None:
    """nfsd grants no lock in its first seconds, in which clients of an earlier life might claim theirs."""
    made = str(repeated(lambda: create(rig, pool, "warm")))
    repeated(lambda: rig.controller.delete_volume(made))
    repeated(rig.settle)


def repeated(call: Callable[[], object]) -> object:
    """As Kubernetes does: until it works."""
    for _ in range(300):
        try:
            return call()
        except (Unavailable, Aborted):
            time.sleep(1)
    raise AssertionError("the server is back, its volumes are not")


@pytest.mark.parametrize("version", ["3", "4.0", "4.1"])
@pytest.mark.parametrize("kind", [KernelServer, GaneshaServer])
def test_every_protocol_carries_a_pool(
    kind: type[GaneshaServer] | type[KernelServer],
    version: str,
    start: Start,
    open_driver: Callable[..., Rig],
) -> None:
    path = "/export/share" if version == "3" and kind is KernelServer else "/share"
    options = [f"vers={version}", *(["nolock"] if version == "3" else [])]
    rig = open_driver(path, options, p=start(kind))
    root = rig.pool.config.root

    def made(name: str, source: Source | None = None) -> str:
        # On a busy machine a call may be late; Kubernetes repeats it.
        return str(repeated(lambda: create(rig, "p", name, source, mode="0750")))

    original = made("a")
    assert made("a") == original
    (root / "volumes" / original / "data/file").write_text("then")
    repeated(lambda: rig.snapshots.create("s", original, {}, TopologyRequirement()))
    snapshot = rig.pool.snapshot_id_of("s")
    (root / "volumes" / original / "data/file").write_text("now")
    restored = made("b", Source(SourceKind.SNAPSHOT, snapshot))
    assert (root / "volumes" / restored / "data/file").read_text() == "then"
    repeated(lambda: rig.controller.delete_volume(original))
    repeated(lambda: rig.controller.delete_volume(restored))
    repeated(lambda: rig.snapshots.delete(snapshot))
    repeated(rig.settle)

    left = [name for area in ("volumes", "snapshots", "staging", "trash") for name in os.listdir(root / area)]
    assert not left
    mounted = Path("/proc/self/mounts").read_text().splitlines()
    assert any(f"vers={version}" in line for line in mounted if str(root) in line)


def calls_meanwhile(rig: Rig, name: str) -> int:
    """How many volumes of the well server are made while a call waits for the dead one, in vain, until its deadline."""
    began, made = time.monotonic(), 0
    ended: list[float] = []
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(create, rig, "dead", "b")
        waiting.add_done_callback(lambda _: ended.append(time.monotonic()))
        while not waiting.done():
            try:
                create(rig, "well", f"{name} {made}")
                made += 1
            except Unavailable:
                time.sleep(0.2)  # A busy machine may be late; what counts is how many are made.
    with pytest.raises(Unavailable):
        waiting.result()
    assert ended[0] - began < 60
    return made


@pytest.mark.parametrize("how", ["frozen", "killed", "cut"])
def test_a_dead_server_is_only_its_own_pool_s_trouble(
    how: str, start: Start, open_driver: Callable[..., Rig]
) -> None:
    dead, well = start(), start()
    rig = open_driver(dead=dead, well=well)
    standing = str(repeated(lambda: create(rig, "dead", "a")))
    create(rig, "well", "warm")

    {"frozen": dead.freeze, "killed": dead.stop, "cut": dead.cut}[how]()
    # A busy machine may hold everything for seconds, but not each time.
    for turn in range(3):
        meanwhile = calls_meanwhile(rig, f"meanwhile {turn}")
        # If they waited for it, it would be two at most.
        if meanwhile >= 3:
            break
        wait_for(lambda: not rig.pool.catalog._child.problem, 60)  # type: ignore[attr-defined]
    assert meanwhile >= 3
    before, began = processes(), time.monotonic()
    for number in range(200):
        with pytest.raises(Unavailable):
            create(rig, "dead", "b")
        if number % 40 == 0:
            repeated(lambda: create(rig, "well", f"w{number}"))  # noqa: B023 - called at once
    # Each that waited would take 6 s.
    assert time.monotonic() - began < 400
    wait_for(lambda: processes() <= before + 2, 60)
    with pytest.raises(Unavailable):
        rig.controller.delete_volume(standing)
    entries = rig.health.of_volume(rig.pool, rig.pool.catalog.home(standing))
    assert [entry.status.name for entry in entries] == ["INACCESSIBLE"]
    assert rig.controller.capacity((), {"pool": "dead"}, None).available_bytes == 0
    assert rig.controller.capacity((), {"pool": "well"}, None).available_bytes > 0

    {"frozen": dead.thaw, "killed": dead.restart, "cut": dead.mend}[how]()
    repeated(lambda: create(rig, "dead", "b"))
    repeated(lambda: rig.controller.delete_volume(standing))
    listed: list[str] = []
    repeated(lambda: listed.extend(one.id for one in rig.controller.list_volumes(0, "")[0]))
    assert rig.pool.id_of("b") in listed
    repeated(rig.settle)
    assert not os.listdir(dead.export / "share/trash") and not os.listdir(dead.export / "share/staging")


def test_a_driver_starts_though_a_server_is_away(start: Start, open_driver: Callable[..., Rig]) -> None:
    dead, well = start(), start()
    dead.cut()

    rig = open_driver(warm=False, dead=dead, well=well)

    repeated(lambda: create(rig, "well", "a"))
    # Nobody has asked the other one yet.
    assert not rig.pool.catalog._child.problem  # type: ignore[attr-defined]
    with pytest.raises(Unavailable):
        create(rig, "dead", "a")
    dead.mend()
    repeated(lambda: create(rig, "dead", "a"))


def test_a_copy_that_a_server_s_death_ends_is_made_anew(
    start: Start, open_driver: Callable[..., Rig]
) -> None:
    server = start()
    rig = open_driver(dead=server)
    original = str(repeated(lambda: create(rig, "dead", "a")))
    data = rig.pool.config.root / "volumes" / original / "data"
    (data / "big").write_bytes(os.urandom(24 * MIB))
    (data / "link").symlink_to("big")
    os.chmod(data, 0o2775)
    server.freeze()

    with pytest.raises((Unavailable, Error)):
        create(rig, "dead", "b", Source(SourceKind.VOLUME, original))
    server.thaw()
    clone = str(repeated(lambda: create(rig, "dead", "b", Source(SourceKind.VOLUME, original))))

    copied = rig.pool.config.root / "volumes" / clone / "data"
    assert (copied / "big").read_bytes() == (data / "big").read_bytes()
    assert os.readlink(copied / "link") == "big" and copied.stat().st_mode & 0o7777 == 0o2775
    assert not os.listdir(rig.pool.config.root / "staging")


def test_a_class_says_what_becomes_of_deleted_volumes(start: Start, open_driver: Callable[..., Rig]) -> None:
    server = start(KernelServer)
    rig = open_driver(p=server)
    root = rig.pool.config.root
    made = {kind: create(rig, "p", kind, onDelete=kind) for kind in ("delete", "retain", "archive")}
    for kind, volume_id in made.items():
        (root / "volumes" / volume_id / "data/file").write_text(kind)

    for volume_id in made.values():
        rig.controller.delete_volume(volume_id)
        rig.controller.delete_volume(volume_id)
    rig.settle()

    (kept,) = (root / "kept").iterdir()
    assert kept.name.startswith(made["retain"]) and (kept / "data/file").read_text() == "retain"
    (archived,) = (root / "archive").iterdir()
    assert archived.name.startswith("archive-2") and (archived / "file").read_text() == "archive"
    assert not os.listdir(root / "trash") and not os.listdir(root / "volumes")
    # The name is free again.
    assert create(rig, "p", "retain") == made["retain"]
    assert not os.listdir(root / "volumes" / made["retain"] / "data")


def test_a_class_of_another_driver_is_understood(start: Start, open_driver: Callable[..., Rig]) -> None:
    server = start(KernelServer)
    rig = open_driver(p=server)
    before = (server.export / "share").stat()

    asked = volume(
        "a",
        16 * MIB,
        capabilities=MANY,
        server=server.address,
        share="/share",
        subDir="x/${pv.metadata.name}",
        mountPermissions="2770",
        uid="7",
        gid="8",
    )
    made = rig.controller.create_volume(replace(asked, pv_name="pv-1"))

    data = (rig.pool.config.root / "volumes" / made.id / "data").stat()
    assert (oct(data.st_mode)[-4:], data.st_uid, data.st_gid) == ("2770", 7, 8)
    assert made.context["subPath"] == "x/pv-1"
    after = (server.export / "share").stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    with pytest.raises(InvalidArgument, match="no pool"):
        rig.controller.create_volume(
            volume("b", 16 * MIB, capabilities=MANY, server=server.address, share="/other")
        )


def test_a_server_that_shares_blocks_copies_nothing(start: Start, open_driver: Callable[..., Rig]) -> None:
    rig = open_driver(p=start(KernelServer))
    original = create(rig, "p", "a")
    big = rig.pool.config.root / "volumes" / original / "data/big"
    big.write_bytes(os.urandom(64 * MIB))
    os.sync()
    before = os.statvfs(rig.pool.config.root)

    clone = create(rig, "p", "b", Source(SourceKind.VOLUME, original))

    after = os.statvfs(rig.pool.config.root)
    assert (before.f_bfree - after.f_bfree) * after.f_frsize < 16 * MIB
    assert (rig.pool.config.root / "volumes" / clone / "data/big").read_bytes() == big.read_bytes()


def test_snapshots_are_copies_that_outlive_their_volume(
    start: Start, open_driver: Callable[..., Rig]
) -> None:
    rig = open_driver(p=start(KernelServer))
    original = create(rig, "p", "a")
    (rig.pool.config.root / "volumes" / original / "data/file").write_text("then")

    snapshot = rig.snapshots.create("s", original, {}, TopologyRequirement())
    rig.controller.delete_volume(original)
    restored = create(rig, "p", "b", Source(SourceKind.SNAPSHOT, snapshot.record.id))

    assert (rig.pool.config.root / "volumes" / restored / "data/file").read_text() == "then"
    assert 0 < rig.controller.capacity((), {}, None).available_bytes < GIB


def test_an_export_whose_handles_changed_is_not_taken_for_the_pool(
    start: Start, open_driver: Callable[..., Rig], make_disk: Callable[..., Disk]
) -> None:
    server = start(KernelServer)
    assert isinstance(server, KernelServer)
    rig = open_driver(p=server)
    create(rig, "p", "a")
    other = make_disk("xfs", size="320M")
    (other.target / "share").mkdir()

    server.replace_export(other.target)
    for _ in range(3):
        with pytest.raises(Unavailable):
            create(rig, "p", "b")
        time.sleep(2)
    assert not os.listdir(other.target / "share")
