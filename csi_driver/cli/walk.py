# SPDX-License-Identifier: Apache-2.0
"""A volume's whole life as a client of the socket: what each call answers, and what the kernel then shows.

The driver's process and the pool are given; what is shown, and how, is `steps`' business.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from csi_driver.backends.base import PAYLOAD_IMAGE
from csi_driver.cli import kernel, pod, words
from csi_driver.cli.calls import Calls, Volume
from csi_driver.cli.driver import Driver
from csi_driver.cli.plan import GROWTH_BYTES, Plan
from csi_driver.cli.scratch import Scratch, settle
from csi_driver.cli.steps import Call, Report, Step
from csi_driver.linux import mount, privileges
from csi_driver.model import MIB

TOLERANCE_BYTES = 8 * MIB
"""How much a pool's free space may differ when all is deleted: btrfs keeps some metadata."""

SETTLE_TIMEOUT_S = 15.0
"""The driver counts anew what volumes have taken every ten seconds."""


class Walk:
    """Runs the steps in order; each leaves its facts in the report."""

    def __init__(self, report: Report, place: Scratch, plan: Plan, driver: Driver) -> None:
        self._report = report
        self._place = place
        self._plan = plan
        self._driver = driver
        self._calls = Calls(driver, plan, place.root)
        self._volume = Volume("volume", place.root)
        self._neighbour = Volume("neighbour", place.root)
        self._sums: dict[str, str] = {}
        self._free_bytes = 0

    def run(self, pause: Callable[[Path], None]) -> None:
        """All of it; `pause` is called with the volume's path before it is taken down.

        Raises:
            CallFailed, DriverFailed, OSError: it cannot go on. What does not hold is only noted.
        """
        self._start()
        self._ask_room()
        self._create()
        self._make_neighbour()
        if self._calls.stages:
            self._stage()
        self._publish()
        self._write()
        self._ask_usage()
        self._publish_readonly()
        if self._plan.enforces:
            self._fill()
            self._expand()
        else:
            self._tell_not_enforced()
        self._crash()
        pause(self._volume.target)
        self._take_down()
        self._delete()
        self._stop()

    def _start(self) -> None:
        with self._step("The driver starts") as step:
            seconds = self._driver.start()
            step.calls.append(Call("orlop serve", "from exec to the first answer", seconds))
            info, ready = self._calls.identify(step)
            step.answers.append(f"{info.name}, version {info.vendor_version}")
            step.kernel.append(f"process {self._driver.pid}, socket {self._place.socket.name}")
            step.check("it says that it is ready", ready)

    def _ask_room(self) -> None:
        with self._step("How much room is there?") as step:
            answer = self._calls.capacity(step)
            self._free_bytes = answer.available_capacity
            largest = words.size(answer.maximum_volume_size.value)
            step.answers.append(f"{words.size(self._free_bytes)} for volumes, the largest {largest}")
            step.kernel.append(self._df(self._place.pool))
            step.check("there is enough for two volumes", self._free_bytes > 2 * self._plan.grown_bytes)

    def _create(self) -> None:
        with self._step("A volume is made, complete or not at all") as step:
            made = self._calls.create(step, self._volume)
            again = self._calls.create(step, self._volume)
            step.answers.append(f"volume_id {made.volume_id}, {_told(made.capacity_bytes)}")
            home = self._place.pool / "volumes" / self._volume.id
            step.kernel += self._home_facts(home)
            step.check("its home stands in the pool's volumes/", home.is_dir())
            step.check("asked again: the same volume", again.volume_id == made.volume_id)
            if self._plan.enforces:
                step.check("as large as it was asked for", made.capacity_bytes == self._plan.size_bytes)
            else:
                step.check("its size is told as unknown: it is not enforced", made.capacity_bytes == 0)

    def _make_neighbour(self) -> None:
        with self._step("A neighbour in the same pool, with data") as step:
            self._calls.create(step, self._neighbour)
            self._calls.stage(step, self._neighbour)
            self._calls.publish(step, self._neighbour, self._neighbour.target)
            self._sums["neighbour"] = pod.write_data(self._neighbour.file, seed=2)
            step.check("its data is there", self._is_intact(self._neighbour))

    def _stage(self) -> None:
        with self._step("It is staged: made usable on this node") as step:
            self._calls.stage(step, self._volume)
            image = self._place.pool / "volumes" / self._volume.id / PAYLOAD_IMAGE
            device = kernel.loop_of(image)
            if device is not None:
                step.kernel.append(kernel.describe_loop(device, image, self._place.root))
            step.kernel += self._mounts_at(self._volume.staging)
            step.check("a loop device is over its image", device is not None)
            step.check("its filesystem is mounted", mount.find_mounted(self._volume.staging) is not None)

    def _publish(self) -> None:
        with self._step("It is published to a pod") as step:
            self._calls.publish(step, self._volume, self._volume.target)
            self._calls.publish(step, self._volume, self._volume.target)
            here = self._mounts_at(self._volume.target)
            step.kernel += here
            step.check("asked twice, mounted once", len(here) == 1)
            step.check("it is empty (no lost+found)", not list(self._volume.target.iterdir()))

    def _write(self) -> None:
        with self._step("The pod writes") as step:
            self._sums["volume"] = pod.write_data(self._volume.file, seed=1)
            step.kernel.append(kernel.describe_file(self._volume.file, self._place.root))
            step.kernel.append(f"sha256 {self._sums['volume'][:16]}…")
            step.check("it reads back what it wrote", self._is_intact(self._volume))

    def _ask_usage(self) -> None:
        with self._step("How full is it?") as step:
            usage = self._calls.usage(step, self._volume)
            step.answers.append(f"{words.size(usage.used)} of {words.size(usage.total)} used")
            step.kernel.append(self._df(self._volume.target))
            step.check("at least what was written is in use", usage.used >= pod.DATA_BYTES)
            if self._plan.enforces:
                step.check("the total is no more than its size", usage.total <= self._plan.size_bytes)

    def _publish_readonly(self) -> None:
        with self._step("A second pod gets it read-only") as step:
            target = self._volume.second_target
            self._calls.publish(step, self._volume, target, readonly=True)
            step.kernel += self._mounts_at(target)
            word = pod.refused(target / "intruder")
            step.kernel.append(f"a write there: {word or 'went through'}")
            step.check("writing is refused (EROFS)", word == "EROFS")
            read = pod.checksum(target / self._volume.file.name)
            step.check("the data can be read", read == self._sums["volume"])

    def _fill(self) -> None:
        with self._step("The pod writes until nothing fits any more") as step:
            filler = self._volume.target / "filler"
            written, word = pod.fill(filler, 2 * self._plan.size_bytes)
            step.kernel.append(f"{words.size(written)} written, then: {word or 'no end'}")
            step.kernel.append(self._df(self._volume.target))
            ended = bool(word) and written <= self._plan.size_bytes
            step.check(f"the volume ends at its size ({word})", ended)
            more = self._neighbour.target / "more"
            step.check("the neighbour can still write", pod.write_data(more, seed=3) == pod.checksum(more))
            step.check("the neighbour's data is unharmed", self._is_intact(self._neighbour))
            step.check("so is what was there before", self._is_intact(self._volume))
            filler.unlink()

    def _tell_not_enforced(self) -> None:
        with self._step("What this pool does not do") as step:
            step.answers += [
                "enforce_capacity = false: a volume has no size, so it is neither filled nor grown here.",
                "A directory pool with project quotas enforces sizes; image and btrfs pools always do.",
            ]

    def _expand(self) -> None:
        online = self._grows_online()
        with self._step("It grows while it is used" if online else "It grows") as step:
            before = self._calls.usage(step, self._volume).total
            step.kernel.append(f"before: {self._df(self._volume.target)}")
            if online:
                self._grow_online(step)
            else:
                self._grow_offline(step)
            after = self._calls.usage(step, self._volume).total
            step.kernel.append(f"after:  {self._df(self._volume.target)}")
            grown = after - before >= GROWTH_BYTES // 2
            step.check(f"there is more room: {words.size(before)} before, {words.size(after)} now", grown)
            step.check("the data is still there", self._is_intact(self._volume))

    def _grows_online(self) -> bool:
        able = kernel.has_capability(self._driver.pid, privileges.CAP_SYS_RESOURCE)
        return able or self._plan.fs_type != "ext4"

    def _grow_online(self, step: Step) -> None:
        with self._volume.file.open("rb"):
            told = self._calls.expand(step, self._volume)
        step.check(f"it is as large as asked: {_told(told)}", told == self._plan.grown_bytes)

    def _grow_offline(self, step: Step) -> None:
        """Where the driver may not grow a mounted ext4, the pod has to be started again."""
        calls, volume = self._calls, self._volume
        code = calls.refused(step, "NodeExpandVolume", lambda: calls.expand(step, volume))
        step.check(f"only CAP_SYS_RESOURCE, missing here, grows a mounted ext4: refused ({code})", bool(code))
        for target in (volume.target, volume.second_target):
            calls.unpublish(step, volume, target)
        calls.unstage(step, volume)
        calls.stage(step, volume)
        calls.publish(step, volume, volume.target)
        calls.publish(step, volume, volume.second_target, readonly=True)
        step.answers.append("so it grows when its pods start anew, and it is staged again")

    def _crash(self) -> None:
        with self._step("The driver is killed (SIGKILL) and started again") as step:
            killed = self._driver.pid
            self._driver.kill()
            step.kernel.append(f"process {killed} killed")
            step.check("without a driver, the pod reads on", self._is_intact(self._volume))
            seconds = self._driver.start()
            step.calls.append(Call("orlop serve", "from exec to the first answer", seconds))
            known = {entry.volume.volume_id for entry in self._driver.client.volumes()}
            self._calls.publish(step, self._volume, self._volume.target)
            self._calls.usage(step, self._volume)
            here = self._mounts_at(self._volume.target)
            step.kernel += here
            step.check("it knows both volumes", known == {self._volume.id, self._neighbour.id})
            step.check("it finds what is mounted, and mounts nothing twice", len(here) == 1)
            step.check("the data is still there", self._is_intact(self._volume))

    def _take_down(self) -> None:
        with self._step("The pods end") as step:
            calls = self._calls
            code = calls.refused(step, "DeleteVolume", lambda: calls.delete(step, self._volume))
            step.check(f"while it is in use, it cannot be deleted ({code})", code == "FAILED_PRECONDITION")
            calls.unpublish(step, self._volume, self._volume.target)
            calls.unpublish(step, self._volume, self._volume.second_target)
            calls.unpublish(step, self._neighbour, self._neighbour.target)
            for volume in (self._volume, self._neighbour):
                calls.unstage(step, volume)
            step.check("nothing is mounted any more", not self._place.mounts())
            step.check("no loop device is left", not self._place.loops())

    def _delete(self) -> None:
        with self._step("The volumes are deleted") as step:
            for volume in (self._volume, self._neighbour, self._volume):
                self._calls.delete(step, volume)
            left = settle(self._place)
            free = self._settled_room(step)
            step.answers.append("deleting what is gone is fine, too")
            step.answers.append(
                f"{words.size(free)} for volumes; {words.size(self._free_bytes)} at the beginning"
            )
            step.kernel += left
            step.check("nothing is left: no mount, no loop device, no file of theirs", not left)
            step.check("the room is back", self._is_back(free))

    def _settled_room(self, step: Step) -> int:
        """What is free once the driver has counted anew, which it does in the background."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while not self._is_back(self._calls.capacity(Step("unseen")).available_capacity):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return self._calls.capacity(step).available_capacity

    def _is_back(self, free_bytes: int) -> bool:
        return abs(free_bytes - self._free_bytes) <= TOLERANCE_BYTES

    def _stop(self) -> None:
        with self._step("The driver ends") as step:
            began = time.monotonic()
            self._driver.stop()
            step.calls.append(Call("orlop serve", "from SIGTERM to exit code 0", time.monotonic() - began))
            step.check("its socket is gone", not self._place.socket.exists())

    # Parts

    @contextmanager
    def _step(self, title: str) -> Iterator[Step]:
        step = Step(title)
        try:
            yield step
        finally:
            self._report.add(step)

    def _home_facts(self, home: Path) -> list[str]:
        image = home / PAYLOAD_IMAGE
        files = sorted(entry.name for entry in home.iterdir())
        facts = [f"{kernel.shorter(home, self._place.root)}: {', '.join(files)}"]
        return facts + ([kernel.describe_file(image, self._place.root)] if image.exists() else [])

    def _mounts_at(self, path: Path) -> list[str]:
        entries = kernel.mounts_beneath(path)
        return [kernel.describe_mount(one, self._place.root) for one in entries if one.target == str(path)]

    def _df(self, path: Path) -> str:
        return kernel.describe_usage(path, self._place.root)

    def _is_intact(self, volume: Volume) -> bool:
        return pod.checksum(volume.file) == self._sums[volume.name]


def _told(size_bytes: int) -> str:
    return words.size(size_bytes) if size_bytes else "size unknown"
